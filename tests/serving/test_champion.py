"""The served model follows the alias, without a failed request."""

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from neuroloop.bootstrap import Services
from neuroloop.core.schemas import LABELS
from neuroloop.core.settings import Settings
from neuroloop.embedded.stack import Stack
from neuroloop.imaging.canonical import canonicalize
from neuroloop.model.bundle import Bundle
from servers.relay import Relay
from serving.running import SIZE, Api, head, serving, wait, write_bundle


def version(api: Api) -> str:
    return api.client.get("/v1/model").json()["version"]


def metric(api: Api, name: str) -> float:
    lines = api.client.get("/metrics").text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(f"{name} ")))


def test_a_promotion_under_the_requests_of_twenty_clients_fails_none_and_every_answer_names_the_model_that_made_it(
    services, champion, standard, promote, tmp_path
):
    first = champion
    answers, stop = [], threading.Event()
    with serving(services) as api:

        def ask() -> None:
            while not stop.is_set():
                answers.append(api.predict(head("glioma")))

        threads = [threading.Thread(target=ask) for _ in range(20)]
        for thread in threads:
            thread.start()
        wait(lambda: len(answers) > 40)
        second = promote(write_bundle(tmp_path / "b", data_version="d2", temperature=3.0))
        promoted = time.monotonic()
        wait(lambda: version(api) == second)
        seconds = time.monotonic() - promoted
        seen = len(answers)
        wait(lambda: len(answers) > seen + 60)
        stop.set()
        for thread in threads:
            thread.join()
    assert seconds < 10
    assert {answer.status_code for answer in answers} == {201}
    said = [answer.json() for answer in answers]
    # Version, data version and probability come from one and the same model in each answer
    made_by = {(one["model_version"], one["data_version"], round(one["probabilities"]["glioma"], 3)) for one in said}
    assert len(made_by) == 2
    assert {each[:2] for each in made_by} == {(first, "d1"), (second, "d2")}
    assert said[0]["model_version"] == first
    assert {one["model_version"] for one in said[-20:]} == {second}  # those that were sent last
    # ... and they are what that version's bundle says of the image when it is asked alone.
    image = canonicalize(head("glioma"), SIZE)[None]
    folders = {first: standard[1], second: tmp_path / "b"}
    alone = {v: Bundle.load(folder).predict(image).probabilities[0] for v, folder in folders.items()}
    for one in said:
        own = dict(zip(LABELS, alone[one["model_version"]].tolist(), strict=True))
        assert one["probabilities"] == pytest.approx(own, abs=1e-4)


@pytest.fixture
def mailing(services: Services, smtp_sink) -> Services:
    return Services(services.settings.model_copy(update={"notify_url": smtp_sink.url}))


def test_a_damaged_model_is_not_served_and_one_mail_says_so(mailing, champion, promote, smtp_sink, tmp_path):
    good = champion
    damaged = write_bundle(tmp_path / "damaged", data_version="d2")
    gate = (damaged / "gate.json").read_text()
    (damaged / "gate.json").write_text(gate.replace("0.5", "0.1", 1))  # valid, but not what was hashed
    with serving(mailing) as api:
        bad = promote(damaged)
        wait(lambda: metric(api, "neuroloop_model_reload_failures_total") >= 1)
        wait(lambda: len(smtp_sink.mails()) == 1)
        time.sleep(1.0)  # five polls
        assert metric(api, "neuroloop_model_reload_failures_total") == 1
        assert version(api) == good
        assert api.predict(head("glioma")).json()["model_version"] == good
        (mail,) = smtp_sink.mails()
        assert f"version {bad}" in mail.subject
        assert "hash" in mail.body
        assert f"version {good} goes on serving" in mail.body


def test_a_server_keeps_its_model_while_the_registry_is_away(
    services, champion, promote, mlflow_uri, free_port, tmp_path
):
    with Relay(int(mlflow_uri.rsplit(":", 1)[1]), free_port()) as away:
        settings = services.settings.model_copy(update={"mlflow_tracking_uri": away.url})
        with serving(Services(settings)) as api:
            served = version(api)
            away.close()
            wait(lambda: metric(api, "neuroloop_registry_unreachable_total") >= 1, 60)
            assert api.predict(head("glioma")).json()["model_version"] == served
            assert api.client.get("/health/ready").status_code == 200
            assert api.client.get("/v1/models").status_code == 503
            newer = promote(write_bundle(tmp_path / "newer", data_version="d2"))
            away.open()
            wait(lambda: version(api) == newer, 60)


def test_a_platform_that_starts_again_waits_for_its_model_and_builds_none(
    services, champion, mlflow_uri, free_port, tmp_path
):
    """A server that has just started says that it has no model, until the registry is there and the model is read."""
    with Relay(int(mlflow_uri.rsplit(":", 1)[1]), free_port()) as away:
        away.close()
        settings = services.settings.model_copy(update={"mlflow_tracking_uri": away.url})
        with serving(Services(settings), model=False) as api, ThreadPoolExecutor(1) as pool:
            stack = Stack({
                "NEUROLOOP_HOME": str(tmp_path), "NEUROLOOP_API_URL": f"http://127.0.0.1:{api.port}",
                "NEUROLOOP_UI_API_KEY": api.key, "NEUROLOOP_AIRFLOW_URL": f"http://127.0.0.1:{free_port()}",
            })  # fmt: skip
            started = pool.submit(stack.ensure_champion)  # would fail if it went to Airflow, which is not there
            time.sleep(2)
            assert not started.done()
            assert api.client.get("/v1/model").status_code == 503
            away.open()
            started.result(60)
            assert version(api) == champion


def test_the_identity_of_the_served_model_is_the_hash_of_its_manifest(services: Services, champion, standard):
    folder = standard[1]
    with serving(services) as api:
        model = api.client.get("/v1/model").json()
    assert model["sha256"] == hashlib.sha256((folder / "bundle.json").read_bytes()).hexdigest()
    assert (model["image_size"], model["simulated"], model["metrics"]) == (64, True, {"macro_f1": 0.9})


def test_predictions_of_one_image_are_the_same_to_the_bit(api: Api):
    answers = [api.predict(head("meningioma")).json()["probabilities"] for _ in range(3)]
    assert all(np.array_equal(list(one.values()), list(answers[0].values())) for one in answers)


def test_settings_bound_how_rarely_the_registry_is_asked():
    assert Settings().refresh_seconds <= 5
    with pytest.raises(ValueError, match="less than or equal to 10"):
        Settings(refresh_seconds=11)
