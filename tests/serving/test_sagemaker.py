"""The image of the API as Amazon SageMaker starts and calls it."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from conftest import stop, wait_until
from neuroloop.adapters.postgres import PostgresLog
from neuroloop.bootstrap import Services
from neuroloop.core.settings import Settings
from serving.running import Api, encoded, head, serving

ROOT = Path(__file__).parents[2]
PNG = {"Content-Type": "image/png"}


@contextlib.contextmanager
def container(folder: Path, port: int, database: str, mlflow_uri: str, **settings: str) -> Iterator[httpx.Client]:
    """`docker run IMAGE serve` without the image: the same entrypoint with the same word, until the port answers."""
    environ = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environ |= {"PYTHONPATH": os.pathsep.join(sys.path), "NEUROLOOP_ENV_FILE": str(folder / "none")}
    environ |= {"NEUROLOOP_HOME": str(folder), "NEUROLOOP_API_PORT": str(port), "NEUROLOOP_SAGEMAKER": "true"}
    environ |= {"NEUROLOOP_DATABASE_URL": database, "NEUROLOOP_MLFLOW_TRACKING_URI": mlflow_uri} | settings
    log = folder / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [ROOT / "entrypoint.sh", "serve"], env=environ, stdout=output, stderr=output, start_new_session=True
        )
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

        def answers() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return client.get("/ping").status_code == 200
            return False

        try:
            wait_until(answers, process, log)
            yield client
        finally:
            stop(process, signal.SIGTERM)


def test_the_entrypoint_serves_pings_and_records_an_invocation(
    tmp_path: Path, free_port, postgres_url: str, mlflow_uri: str, champion: str
):
    with container(tmp_path, free_port(), postgres_url, mlflow_uri, NEUROLOOP_DECODE_SECONDS="10") as client:
        answer = client.post("/invocations", content=encoded(head("glioma")), headers=PNG)
        assert answer.status_code == 200
        said = answer.json()
        assert (said["label"], said["model_version"]) == ("glioma", champion)
        row = PostgresLog(postgres_url).prediction(said["id"])
        assert (row.label, row.owner, row.consent) == ("glioma", "sagemaker", "unstated")
        assert client.get("/v1/model").status_code == 401  # all else still takes a key


@pytest.fixture(scope="module")
def managed(tmp_path_factory, postgres_server, mlflow_uri: str, standard) -> Iterator[Api]:
    """An API with the setting, serving the standard bundle."""
    from neuroloop.adapters.mlflow_registry import MlflowRegistry

    MlflowRegistry(mlflow_uri).set_alias("champion", standard[0])
    settings = Settings(
        home=tmp_path_factory.mktemp("managed"),
        database_url=postgres_server.new_database(),
        mlflow_tracking_uri=mlflow_uri,
        sagemaker=True,
        max_upload_mb=1,
        decode_seconds=10,
    )
    with serving(Services(settings)) as running:
        yield running


def invoke(api: Api, body: bytes, **headers: str) -> httpx.Response:
    with api.client_of(None) as client:
        return client.post("/invocations", content=body, headers=PNG | headers)


def test_the_consent_comes_in_the_one_header_that_sagemaker_passes_on(managed: Api):
    said = invoke(managed, encoded(head("pituitary")), **{"X-Amzn-SageMaker-Custom-Attributes": "training"}).json()
    assert managed.services.log.prediction(said["id"]).consent == "training"
    assert invoke(managed, b"", **{"X-Amzn-SageMaker-Custom-Attributes": "whatever"}).status_code == 422


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [(b"no image", "image/png", 415), (b"{}", "application/json", 415), (b"\0" * 2_000_000, "image/png", 413)],
)
def test_what_is_no_image_is_a_problem_and_leaves_nothing(managed: Api, body: bytes, kind: str, status: int):
    before = managed.stored()
    answer = invoke(managed, body, **{"Content-Type": kind})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert managed.stored() == before


def test_without_the_setting_an_invocation_takes_the_key_of_an_uploader(api: Api):
    assert invoke(api, encoded(head("glioma"))).status_code == 401
    answer = api.client.post("/invocations", content=encoded(head("glioma")), headers=PNG)
    assert answer.status_code == 200


def test_a_ping_says_no_while_the_database_is_away(tmp_path: Path, mlflow_uri: str, champion: str, free_port):
    nowhere = f"postgresql://nobody@127.0.0.1:{free_port()}/none"
    settings = Settings(home=tmp_path, database_url=nowhere, mlflow_tracking_uri=mlflow_uri, sagemaker=True)
    with serving(Services(settings), model=False) as running, running.client_of(None) as client:
        said = client.get("/ping")
        assert said.status_code == 503
        assert "database" in said.text
        assert "127.0.0.1" not in said.text
        assert "nobody" not in said.text
