"""Back to another version: by one command and by one request."""

import os
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
