"""Consent and erasure through HTTP."""

import uuid

import pytest

from neuroloop.bootstrap import Services
from neuroloop.core import keys
from neuroloop.core.schemas import Erasure
from neuroloop.records.corrections import may_train
from serving.running import Api, encoded, head, noise, serving


def erase(api: Api, prediction_id: str, reason: str = "consent_withdrawn", by: str = "ann"):
    return api.client.delete(f"/v1/predictions/{prediction_id}", params={"reason": reason, "by": by})


def objects(api: Api, prediction_id: str) -> list[str]:
    return [key for key in api.stored() if prediction_id in key]


@pytest.mark.parametrize("pixels", [head("glioma"), noise()], ids=["accepted", "refused"])
def test_erasing_removes_the_image_its_corrected_copy_and_the_row_and_leaves_a_mark(api: Api, pixels):
    prediction_id = api.predict(pixels).json()["id"]
    api.feedback(prediction_id, "correct", "pituitary")
    assert len(objects(api, prediction_id)) == 2
    response = erase(api, prediction_id)
    mark = response.json()
    assert response.status_code == 200
    assert (mark["prediction_id"], mark["reason"], mark["by"]) == (prediction_id, "consent_withdrawn", "ann")
    assert mark["requested_at"] <= mark["finished_at"]
    assert set(mark) == {"prediction_id", "requested_at", "reason", "by", "finished_at"}  # no content
    assert objects(api, prediction_id) == []
    assert erase(api, prediction_id, "mistake", "bob").json() == mark  # again: nothing new


def test_what_was_erased_is_gone_for_every_route(api: Api):
    prediction_id = api.predict(head("glioma")).json()["id"]
    erase(api, prediction_id)
    for response in (
        api.client.get(f"/v1/predictions/{prediction_id}"),
        api.client.get(f"/v1/predictions/{prediction_id}/image"),
        api.feedback(prediction_id, "correct", "pituitary"),
    ):
        assert (response.status_code, response.headers["content-type"]) == (410, "application/problem+json")
        assert "consent_withdrawn" in response.json()["detail"]
    assert objects(api, prediction_id) == []


@pytest.mark.parametrize("unknown", [str(uuid.UUID(int=7)), "7", "x" * 300, "%00"])
def test_what_never_was_cannot_be_erased(api: Api, unknown: str):
    assert erase(api, unknown).status_code == 404


@pytest.mark.parametrize("query", [{}, {"reason": "mistake"}, {"by": "ann"}, {"reason": "because", "by": "ann"}])
def test_an_erasure_says_who_and_why_in_the_words_there_are(api: Api, query: dict):
    prediction_id = api.predict(head("glioma")).json()["id"]
    assert api.client.delete(f"/v1/predictions/{prediction_id}", params=query).status_code == 422
    assert api.client.get(f"/v1/predictions/{prediction_id}").status_code == 200


def test_a_retry_of_an_erased_upload_does_not_bring_it_back(api: Api):
    key = {"Idempotency-Key": str(uuid.uuid4())}
    data = encoded(head("glioma"))
    first = api.client.post("/v1/predictions", files={"file": ("a", data)}, headers=key).json()
    erase(api, first["id"])
    again = api.client.post("/v1/predictions", files={"file": ("a", data)}, headers=key)
    assert again.status_code == 410
    assert objects(api, first["id"]) == []


def test_an_erasure_that_finds_the_store_away_is_marked_and_ended_by_its_repeat(services: Services, champion, tmp_path):
    with serving(services) as api:
        prediction_id = api.predict(head("glioma")).json()["id"]
        store = tmp_path / "store"
        folder = store / keys.prediction("glioma", prediction_id)
        hidden = folder.parent.rename(folder.parent.with_name("hidden"))
        folder.parent.symlink_to(folder.parent.with_name("loop"))  # a folder that cannot be reached: a loop of links
        folder.parent.with_name("loop").symlink_to(folder.parent)
        marked = erase(api, prediction_id)
        assert (marked.status_code, marked.json()["finished_at"]) == (202, None)
        assert api.client.get(f"/v1/predictions/{prediction_id}").status_code == 410
        assert api.feedback(prediction_id, "agree").status_code == 410
        folder.parent.unlink()
        folder.parent.with_name("loop").unlink()
        hidden.rename(folder.parent)
        assert folder.exists()
        finished = erase(api, prediction_id)
        assert finished.status_code == 200
        assert finished.json()["requested_at"] == marked.json()["requested_at"]
        assert not folder.exists()


def test_an_erasure_whose_server_was_killed_after_the_mark_is_ended_by_its_repeat(api: Api):
    prediction_id = api.predict(head("glioma")).json()["id"]
    api.services.log.mark_erased(Erasure(prediction_id=prediction_id, reason="requested", by="ann"))
    assert api.client.get(f"/v1/predictions/{prediction_id}/image").status_code == 410
    assert erase(api, prediction_id, "requested").status_code == 200
    assert objects(api, prediction_id) == []


def test_a_simulated_scan_is_trained_on_after_a_model_of_such_only(api: Api):
    given = api.client.post(
        "/v1/predictions", files={"file": ("a", encoded(head("glioma")))}, headers={"X-Consent": "simulated"}
    ).json()
    row = api.services.log.prediction(given["id"])
    assert (row.consent, row.simulated_model) == ("simulated", True)
    assert may_train(row)
    assert not may_train(row.model_copy(update={"simulated_model": False}))
    assert not may_train(row.model_copy(update={"consent": "record"}))


@pytest.mark.parametrize("consent", ["training", "record", "unstated", "simulated", None])
def test_the_consent_that_came_with_an_upload_is_recorded(api: Api, consent: str | None):
    headers = {"X-Consent": consent} if consent else {}
    answer = api.client.post("/v1/predictions", files={"file": ("a", encoded(head("glioma")))}, headers=headers).json()
    assert api.client.get(f"/v1/predictions/{answer['id']}").json()["consent"] == (consent or "unstated")


def test_a_consent_outside_the_vocabulary_is_refused_and_nothing_is_stored(api: Api):
    stored = api.stored()
    response = api.client.post(
        "/v1/predictions", files={"file": ("a", encoded(head("glioma")))}, headers={"X-Consent": "everything"}
    )
    assert response.status_code == 422
    assert "X-Consent" in response.json()["detail"]
    assert api.stored() == stored


def test_an_image_given_for_the_record_only_is_never_trained_on_whatever_readers_say(api: Api):
    waiting = api.client.get("/v1/monitoring").json()["corrections_waiting"]
    answer = api.client.post(
        "/v1/predictions", files={"file": ("a", encoded(head("glioma")))}, headers={"X-Consent": "record"}
    ).json()
    receipt = api.feedback(answer["id"], "correct", "pituitary").json()
    assert (receipt["verdict"], receipt["corrections_waiting"]) == ("correct", waiting)
    assert objects(api, answer["id"]) == [keys.prediction("glioma", answer["id"])]


def test_a_service_can_demand_that_consent_is_stated(services: Services, champion):
    strict = Services(services.settings.model_copy(update={"require_consent": True}))
    with serving(strict) as api:
        refused = api.predict(head("glioma"))
        assert refused.status_code == 422
        assert "X-Consent" in refused.json()["detail"]
        assert api.stored() == []
        stated = api.client.post(
            "/v1/predictions", files={"file": ("a", encoded(head("glioma")))}, headers={"X-Consent": "training"}
        )
        assert stated.status_code == 201
