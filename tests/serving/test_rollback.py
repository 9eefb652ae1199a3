"""Back to another version: by one command and by one request."""

import logging
import os
import socket
import subprocess
import sys
import threading

import pytest

from neuroloop.adapters.mlflow_registry import MODEL
from neuroloop.core.errors import Unavailable
from neuroloop.model.bundle import BUNDLE_TAG
from neuroloop.serving import rollback
from serving.running import Api, head, serving, wait, write_bundle


def version(api: Api) -> str:
    return api.client.get("/v1/model").json()["version"]


def neuroloop(api: Api, *arguments: str) -> subprocess.CompletedProcess:
    settings = api.services.settings
    return subprocess.run(
        [sys.executable, "-m", "neuroloop.cli", *arguments],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "NEUROLOOP_HOME": str(settings.home),
            "NEUROLOOP_DATABASE_URL": settings.database_url,
            "NEUROLOOP_MLFLOW_TRACKING_URI": settings.mlflow_tracking_uri,
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def no_previous(mlflow_uri: str) -> None:
    from mlflow import MlflowClient

    MlflowClient(mlflow_uri, mlflow_uri).delete_registered_model_alias(MODEL, "previous")


def test_one_command_brings_the_previous_champion_back_with_the_same_probabilities_and_loses_no_request(
    services, champion, promote, tmp_path
):
    with serving(services) as api:
        before = api.predict(head("glioma")).json()["probabilities"]
        services.registry.set_alias("previous", champion)
        newer = promote(write_bundle(tmp_path / "b", data_version="d2", temperature=3.0))
        wait(lambda: version(api) == newer)
        assert api.predict(head("glioma")).json()["probabilities"] != before
        answers, stop = [], threading.Event()

        def ask() -> None:
            while not stop.is_set():
                answers.append(api.predict(head("glioma")))

        asking = threading.Thread(target=ask)
        asking.start()
        done = neuroloop(api, "rollback", "--reason", "Too many referrals", "--by", "ann")
        wait(lambda: version(api) == champion, 60)
        stop.set()
        asking.join()
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"ann went from version {newer} to version {champion}: Too many referrals."
        assert {answer.status_code for answer in answers} == {201}
        assert api.predict(head("glioma")).json()["probabilities"] == before
        ledger = api.client.get("/v1/models").json()["promotions"][0]
        assert (ledger["version"], ledger["previous"], ledger["promoted"]) == (champion, newer, True)
        assert "Too many referrals" in ledger["checks"][0]["reason"]
        # Once more goes forward again: the previous one is now the newer.
        assert neuroloop(api, "rollback").returncode == 0
        wait(lambda: version(api) == newer, 60)


def test_a_named_version_is_made_the_champion_by_a_request(services, champion, promote, register, tmp_path):
    newer = promote(write_bundle(tmp_path / "b", data_version="d2"))
    with serving(services) as api:
        wait(lambda: version(api) == newer)
        answer = api.client.post(f"/v1/models/{champion}/champion", json={"by": "ann", "reason": "Wrong on pituitary."})
        assert answer.status_code == 200
        assert answer.json()["checks"][0]["reason"].endswith("Wrong on pituitary.")
        wait(lambda: version(api) == champion)
        assert services.registry.by_alias("previous").version == newer
        again = api.client.post(f"/v1/models/{champion}/champion", json={"by": "ann", "reason": "again"})
        assert (again.status_code, "already" in again.json()["detail"]) == (409, True)


def test_a_version_that_cannot_be_served_is_refused_and_nothing_moves(services, champion, register, tmp_path):
    damaged = write_bundle(tmp_path / "damaged")
    (damaged / "gate.json").write_text((damaged / "gate.json").read_text() + " ")
    broken, legacy = register(damaged), register(write_bundle(tmp_path / "legacy", split="legacy"))
    run = services.registry.open_run(f"serving-{tmp_path.name}", experiment="serving")
    other = services.registry.register(run, write_bundle(tmp_path / "other"), tags={BUNDLE_TAG: "0" * 64}).version
    cases = [(broken, 409, "damaged"), (other, 409, "registered"), (legacy, 409, "own split")]
    with serving(services) as api:
        for target, status, word in (*cases, ("987654", 404, "987654")):
            answer = api.client.post(f"/v1/models/{target}/champion", json={"by": "ann", "reason": "why not"})
            assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
            assert word in answer.json()["detail"]
        assert services.registry.by_alias("champion").version == champion
        assert api.client.get("/v1/models").json()["promotions"] == []


@pytest.mark.parametrize("body", [{}, {"by": "ann"}, {"by": " ", "reason": "x"}, {"by": "a", "reason": "x", "z": 1}])
def test_a_change_of_champion_without_who_and_why_is_refused(api: Api, body: dict):
    assert api.client.post("/v1/models/1/champion", json=body).status_code == 422


def test_without_a_previous_champion_the_command_says_so(services, champion, no_previous):
    with serving(services) as api:
        done = neuroloop(api, "rollback")
    assert done.returncode == 1
    assert "no previous champion" in done.stderr
    assert "--to" in done.stderr


@pytest.mark.parametrize("lost", ["request", "answer"])
def test_a_registry_that_breaks_off_leaves_no_half_a_move(services, champion, promote, tmp_path, monkeypatch, lost):
    services.registry.set_alias("previous", champion)
    newer = promote(write_bundle(tmp_path / "b", data_version="d2"))
    whole = services.registry.set_alias

    def breaks_off(alias: str, version: str) -> None:
        if alias != "champion" or lost == "answer":
            whole(alias, version)
        if alias == "champion":
            raise Unavailable("the registry does not answer")

    monkeypatch.setattr(services.registry, "set_alias", breaks_off)
    if lost == "request":
        with pytest.raises(Unavailable):
            rollback.make_champion(services, champion, by="ann", reason="x")
        expected = {"champion": newer, "previous": champion}
    else:
        assert rollback.make_champion(services, champion, by="ann", reason="x").version == champion
        expected = {"champion": champion, "previous": newer}
    assert {alias: services.registry.by_alias(alias).version for alias in expected} == expected


def test_after_a_move_that_broke_off_in_the_midst_the_ledger_knows_the_way_back(services, champion, promote, tmp_path):
    newer = promote(write_bundle(tmp_path / "b", data_version="d2"))
    rollback.make_champion(services, champion, by="ann", reason="x")
    rollback.make_champion(services, newer, by="ann", reason="y")
    services.registry.set_alias("previous", newer)  # all that was written before the registry went away
    assert rollback.make_champion(services, None, by="ann", reason="z").version == champion
    assert services.registry.by_alias("champion").version == champion
    assert services.registry.by_alias("previous").version == newer


def test_without_the_database_the_champion_stays(services, champion, promote, postgres_server, tmp_path):
    newer = promote(write_bundle(tmp_path / "b", data_version="d2"))
    with serving(services) as api:
        postgres_server.stop()
        try:
            answer = api.client.post(f"/v1/models/{champion}/champion", json={"by": "ann", "reason": "x"})
        finally:
            postgres_server.start()
        assert answer.status_code == 503
        assert services.registry.by_alias("champion").version == newer


def while_fetching(services, monkeypatch, do) -> None:
    """`do()` while a bundle is being fetched."""
    whole = services.registry.download_bundle

    def meanwhile(*where):
        do()
        return whole(*where)

    monkeypatch.setattr(services.registry, "download_bundle", meanwhile)


def test_a_champion_that_was_promoted_meanwhile_is_not_lost(
    services, champion, promote, register, tmp_path, monkeypatch
):
    promote(write_bundle(tmp_path / "b", data_version="d2"))
    latest = register(write_bundle(tmp_path / "c", data_version="d3"))
    with serving(services) as api:
        while_fetching(services, monkeypatch, lambda: services.registry.set_alias("champion", latest))
        answer = api.client.post(f"/v1/models/{champion}/champion", json={"by": "ann", "reason": "x"})
        assert (answer.status_code, "meanwhile" in answer.json()["detail"]) == (409, True)
        assert services.registry.by_alias("champion").version == latest
        assert services.log.promotions() == []


def test_a_change_that_was_answered_503_is_not_made_later(services, champion, promote, tmp_path, monkeypatch):
    newer = promote(write_bundle(tmp_path / "b", data_version="d2"))
    monkeypatch.setattr("neuroloop.serving.api.CHAMPION_SECONDS", 0.2)
    monkeypatch.setattr("neuroloop.serving.api.MOVING_SECONDS", 0.2)
    answered, fetched, others = threading.Event(), threading.Event(), set(threading.enumerate())
    with serving(services) as api:
        while_fetching(services, monkeypatch, lambda: answered.wait(60) and fetched.set())
        answer = api.client.post(f"/v1/models/{champion}/champion", json={"by": "ann", "reason": "x"})
        answered.set()
        assert answer.status_code == 503
        assert fetched.wait(60)
        moving = [each for each in threading.enumerate() if each.name.startswith("registry") and each not in others]
        assert moving
    for each in moving:  # it ends with the server, once its work is done
        each.join(60)
    assert services.registry.by_alias("champion").version == newer
    assert services.log.promotions() == []


def test_a_change_whose_caller_has_gone_is_not_made(services, champion, promote, tmp_path, monkeypatch, caplog):
    newer = promote(write_bundle(tmp_path / "b", data_version="d2"))
    caplog.set_level(logging.INFO)
    gone, fetching = threading.Event(), threading.Event()
    with serving(services) as api:
        while_fetching(services, monkeypatch, lambda: fetching.set() or gone.wait(60))
        body = b'{"by": "ann", "reason": "x"}'
        with socket.create_connection(("127.0.0.1", api.port)) as client:
            start = f"POST /v1/models/{champion}/champion HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            client.sendall(f"{start}Content-Type: application/json\r\nAuthorization: Bearer {api.key}\r\n\r\n".encode())
            client.sendall(body)
            assert fetching.wait(60)
        for _ in range(3):  # by then the server has noticed
            assert api.client.get("/health/live").status_code == 200
        gone.set()
        wait(lambda: "/v1/models/{version}/champion" in caplog.text)
        assert services.registry.by_alias("champion").version == newer
        assert services.log.promotions() == []


FAR = {"X-Forwarded-For": "203.0.113.9"}


def test_a_change_that_was_made_but_not_written_down_is_told_and_the_reason_is_for_the_log(
    services, champion, promote, tmp_path, monkeypatch, caplog
):
    promote(write_bundle(tmp_path / "b", data_version="d2"))

    def away(_) -> None:
        raise Unavailable("the database does not answer", why="no route to db-7.internal")

    with serving(services) as api, api.holder("admin") as admin:
        monkeypatch.setattr(services.log, "record_promotion", away)
        answer = admin.post(f"/v1/models/{champion}/champion", json={"reason": "x"}, headers=FAR)
        assert (answer.status_code, answer.json()["type"]) == (500, "urn:neuroloop:problem:ledger-behind")
        assert f"Version {champion} is the champion now" in answer.json()["detail"]
        assert services.registry.by_alias("champion").version == champion
    assert "db-7" not in answer.text
    assert "db-7" in caplog.text


def test_a_version_without_a_bundle_is_refused_without_the_address_of_the_registry(services, champion, mlflow_uri):
    from mlflow import MlflowClient

    client = MlflowClient(mlflow_uri, mlflow_uri)
    run = services.registry.open_run("without a bundle", experiment="serving")
    empty = client.create_model_version(MODEL, f"{client.get_run(run).info.artifact_uri}/model", run_id=run).version
    with serving(services) as api, api.holder("admin") as admin:
        answer = admin.post(f"/v1/models/{empty}/champion", json={"reason": "x"}, headers=FAR)
    assert (answer.status_code, answer.json()["type"]) == (409, "urn:neuroloop:problem:not-promotable")
    assert "no bundle" in answer.json()["detail"]
    assert mlflow_uri not in answer.text
    assert services.registry.by_alias("champion").version == champion
