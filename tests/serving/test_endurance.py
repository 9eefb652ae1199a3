"""A small edition of `bench/serving_faults.py`: nothing is lost, doubled or mixed up, whatever is killed."""

import random
import secrets
import shutil
import tempfile
from pathlib import Path

from conftest import PostgresServer
from neuroloop.bootstrap import Services
from neuroloop.model.bundle import Bundle
from serving.endurance import Clients, account, kill_postgres, kill_server, running

KILLS = 3


def nothing_wrong(found: dict[str, int]) -> bool:
    return not any(count for what, count in found.items() if what != "leftovers_swept")


def test_many_clients_each_get_their_own_answers_maps_rows_and_objects(services, champion, standard, tmp_path):
    with running(services, tmp_path / "api.log") as server:
        clients = Clients(server.port, 20, 10)
        asked = clients.join()
    assert clients.faults == []
    assert len(asked) == 200
    bundle = Bundle.load(standard[1])
    found = account(services, asked, bundle)
    assert nothing_wrong(found), found
    # It would have noticed: an image that is gone, an answer twice, and two that went to one another's clients.
    services.store.delete(services.log.prediction(asked[0].answer["id"]).object_key)
    asked[1].answer, asked[2].answer, asked[3].answer = asked[2].answer, asked[1].answer, asked[4].answer
    found = account(services, asked, bundle)
    assert (found["objects"], found["answers"], found["maps"], found["doubled"]) == (4, 3, 3, 1), found


def test_a_server_killed_at_random_moments_loses_and_doubles_nothing(services, champion, standard, tmp_path):
    with running(services, tmp_path / "api.log") as server:
        clients = Clients(server.port, 6, correct_every=3)
        try:
            seconds = kill_server(server, clients, KILLS, random.Random(1))
        finally:
            asked = clients.finish()
    assert clients.faults == []
    assert len(seconds) == KILLS
    assert max(one.tries for one in asked) > 1  # clients have noticed
    found = account(services, asked, Bundle.load(standard[1]))
    assert nothing_wrong(found), found


def test_a_database_killed_during_writes_loses_and_doubles_nothing(services, champion, standard, tmp_path, free_port):
    folder = Path(tempfile.mkdtemp(prefix="neuroloop-test-"))  # PostgreSQL's own user must reach it
    postgres = PostgresServer(folder / "postgres", free_port(), secrets.token_urlsafe(16), durable=True)
    postgres.start()
    try:
        own = Services(services.settings.model_copy(update={"database_url": postgres.new_database()}))
        with running(own, tmp_path / "api.log") as server:
            clients = Clients(server.port, 6, correct_every=3)
            try:
                seconds = kill_postgres(postgres, server, clients, KILLS, random.Random(2))
            finally:
                asked = clients.finish()
        assert clients.faults == []
        assert len(seconds) == KILLS
        found = account(own, asked, Bundle.load(standard[1]))
        assert nothing_wrong(found), found
    finally:
        postgres.stop()
        shutil.rmtree(folder, ignore_errors=True)
