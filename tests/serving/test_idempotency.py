"""A repeated request is the same request: one prediction, one answer, whenever and wherever it is repeated."""

import hashlib
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from neuroloop.bootstrap import Services
from neuroloop.core import keys
from neuroloop.serving.access import FRONTEND
from neuroloop.serving.champion import Champion
from neuroloop.serving.inference import InferenceService
from neuroloop.serving.metrics import Metrics
from serving.running import Api, encoded, head, noise, serving, wait, write_bundle


def ask(api: Api, data: bytes, key: str, **headers: str):
    return api.client.post(
        "/v1/predictions", files={"file": ("scan.png", data)}, headers={"Idempotency-Key": key, **headers}
    )


def rows(api: Api) -> int:
    return api.client.get("/v1/monitoring").json()["predictions"]


@pytest.fixture
def key() -> str:
    return str(uuid.uuid4())


@pytest.mark.parametrize("label", ["glioma", "notumor"])
def test_a_retry_gets_the_same_id_and_the_same_answer_to_the_last_pixel(api: Api, key: str, label: str):
    data = encoded(head(label, height=700, width=900))
    before = rows(api)
    first, second = ask(api, data, key), ask(api, data, key)
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json() == second.json()
    assert second.headers["Location"] == f"/v1/predictions/{first.json()['id']}"
    assert rows(api) == before + 1
    assert len([stored for stored in api.stored() if first.json()["id"] in stored]) == 1


def test_a_retry_of_a_refused_image_is_refused_as_the_same_one(api: Api, key: str):
    first, second = ask(api, encoded(noise()), key), ask(api, encoded(noise()), key)
    assert (first.status_code, second.status_code) == (422, 422)
    assert first.json() == second.json()


def test_twenty_requests_with_one_key_at_once_on_two_servers_are_one_prediction(services: Services, champion, key: str):
    data = encoded(head("pituitary"))
    with serving(services) as one, serving(Services(services.settings)) as other, ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda n: ask(one if n % 2 else other, data, key), range(20)))
        assert {answer.status_code for answer in answers} == {201}
        assert all(answer.json() == answers[0].json() for answer in answers)
        assert rows(one) == 1
        assert one.stored() == [keys.prediction("pituitary", answers[0].json()["id"])]


@pytest.mark.parametrize("what", ["image", "consent"])
def test_another_request_with_a_used_key_is_a_problem_and_leaves_nothing(api: Api, key: str, what: str):
    first = ask(api, encoded(head("glioma")), key)
    stored = api.stored()
    if what == "image":
        second = ask(api, encoded(head("pituitary")), key)
    else:
        second = ask(api, encoded(head("glioma")), key, **{"X-Consent": "record"})
    assert (second.status_code, second.headers["content-type"]) == (422, "application/problem+json")
    assert second.json()["type"] == "urn:neuroloop:problem:idempotency-key-reused"
    assert "new key" in second.json()["fix"]
    assert api.stored() == stored
    assert ask(api, encoded(head("glioma")), key).json() == first.json()


@pytest.mark.parametrize("bad", ["x" * 256, "with space"])
def test_a_key_that_is_none_is_refused(api: Api, bad: str):
    assert ask(api, encoded(head("glioma")), bad).status_code == 422


def test_requests_without_a_key_are_never_taken_for_one_another(api: Api):
    data = encoded(head("glioma"))
    assert api.upload(data).json()["id"] != api.upload(data).json()["id"]


def test_after_a_crash_between_object_and_row_the_retry_ends_what_was_begun(services: Services, champion, key: str):
    data = encoded(head("glioma"))
    begun = str(uuid.uuid4())
    request = hashlib.sha256(f"{FRONTEND}\0{key}".encode()).hexdigest()
    fingerprint = f"{hashlib.sha256(data).hexdigest()} 1 unstated"
    services.log.claim(request, begun, fingerprint)
    services.store.put(keys.prediction("glioma", begun), b"as far as the killed server came")
    with serving(services) as api:
        answer = ask(api, data, key).json()
        assert answer["id"] == begun
        assert api.stored() == [keys.prediction("glioma", begun)]
        assert api.client.get(f"/v1/predictions/{begun}/image").content.startswith(b"\x89PNG")
        assert rows(api) == 1


def test_an_answer_stays_the_same_after_the_model_has_changed(services, champion, promote, tmp_path, key: str):
    data = encoded(head("glioma"))
    with serving(services) as api:
        first = ask(api, data, key).json()
        newer = promote(write_bundle(tmp_path / "b", data_version="d2", temperature=3.0))
        wait(lambda: api.client.get("/v1/model").json()["version"] == newer)
        assert ask(api, data, key).json() == first
        assert ask(api, data, str(uuid.uuid4())).json()["model_version"] == newer


def test_two_models_that_answer_one_key_at_once_leave_one_object_and_one_row(
    services: Services, champion, register, tmp_path, key: str
):
    """The class may differ between them: the object of the one whose row came second goes."""
    services_of = [Services(services.settings) for _ in range(2)]
    data, servers = encoded(head("glioma")), []
    for number, outside in enumerate(services_of):
        # The second is so unsure of what a brain is that it refuses everything.
        folder = write_bundle(tmp_path / str(number), roughest=0.12 if number == 0 else -1.0)
        services.registry.set_alias("champion", register(folder))
        metrics = Metrics()
        watching = Champion(outside, metrics)
        watching.refresh()
        servers.append(InferenceService(outside, watching, metrics))
    for attempt in range(10):
        request = f"{key}-{attempt}"
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda n, r=request: servers[n % 2].predict(data, request=r), range(8)))
        assert len({answer.id for answer in found}) == 1
        assert len({type(answer) for answer in found}) == 1
        row = services.log.prediction(found[0].id)
        stored = [each for each in services.store.list("InferenceLogs/") if found[0].id in each]
        assert stored == [row.object_key]
