"""Which roles and databases the embedded PostgreSQL is made with."""

import contextlib
from urllib.parse import quote

import psycopg2

from conftest import PostgresServer
from neuroloop.core.settings import Settings
from neuroloop.embedded.postgres import command, databases_of, url

ODD = {'air-flow "x"': "it's", "MLflow": "b"}


def test_an_external_database_makes_no_role_here():
    settings = Settings(
        postgres_port=5433,
        database_url="postgresql://cloud-user:secret@db.example:5433/neuroloop",  # pragma: allowlist secret
        airflow_database_url=url("air-flow", "a%b", 5433),
        # Another server of this machine.
        mlflow_database_url="postgresql://mlflow:secret@127.0.0.1:5432/mlflow",  # pragma: allowlist secret
    )
    assert databases_of(settings) == {"air-flow": "a%b"}


def test_names_of_any_form_get_their_role_and_database(tmp_path, free_port):
    server = PostgresServer(tmp_path / "postgres", free_port(), "secret")
    command(server.data, server.port, server.password, ODD)
    server.start()
    try:
        for name, password in ODD.items():
            login = f"{quote(name, safe='')}:{quote(password, safe='')}"
            link = f"postgresql://{login}@127.0.0.1:{server.port}/{quote(name, safe='')}"
            with contextlib.closing(psycopg2.connect(link)) as connection:
                cursor = connection.cursor()
                cursor.execute("SELECT current_user, current_database()")
                assert cursor.fetchone() == (name, name)
    finally:
        server.stop()
