"""What readers say, and where the corrected images go."""

import itertools
import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

import pytest

from neuroloop.adapters.folder import FolderStore
from neuroloop.core import keys, schemas
from neuroloop.core.errors import Unavailable
from neuroloop.core.schemas import LABELS
from serving.running import Api, encoded, head, noise, serving


@pytest.fixture
def glioma(api: Api) -> str:
    return api.predict(head("glioma")).json()["id"]


@pytest.fixture
def refused(api: Api) -> str:
    return api.predict(noise()).json()["id"]


def corrections(api: Api, prediction_id: str) -> list[str]:
    return [key.split("/")[-2] for key in api.services.store.list(keys.CORRECTIONS) if prediction_id in key]


def said(api: Api, prediction_id: str) -> list[tuple[str, str, str | None]]:
    row = api.client.get(f"/v1/predictions/{prediction_id}").json()
    return [(one["reader"], one["verdict"], one["label"]) for one in row["feedback"]]


def waiting(api: Api) -> int:
    return api.client.get("/v1/monitoring").json()["corrections_waiting"]


def test_the_last_verdict_counts_though_it_was_given_to_a_server_whose_clock_is_behind(
    api: Api, glioma: str, monkeypatch: pytest.MonkeyPatch
):
    assert api.feedback(glioma, "correct", "pituitary").status_code == 200

    class Behind(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) - timedelta(hours=1)

    monkeypatch.setattr(schemas, "datetime", Behind)
    assert api.feedback(glioma, "correct", "meningioma").json()["label"] == "meningioma"
    assert said(api, glioma) == [("ann", "correct", "meningioma")]
    assert corrections(api, glioma) == ["meningioma"]


def test_a_correction_puts_a_copy_of_the_image_under_its_new_class(api: Api, glioma: str):
    before = waiting(api)
    response = api.feedback(glioma, "correct", "pituitary")
    assert response.status_code == 200
    assert response.json() == {
        "prediction_id": glioma,
        "verdict": "correct",
        "label": "pituitary",
        "corrections_waiting": before + 1,
        "may_train": True,
    }
    store = api.services.store
    assert store.get(keys.correction("pituitary", glioma)) == store.get(keys.prediction("glioma", glioma))
    assert said(api, glioma) == [("ann", "correct", "pituitary")]


@pytest.mark.parametrize(("consent", "trains"), [("training", True), ("record", False), ("unstated", True)])
def test_a_receipt_says_whether_a_retraining_may_learn_from_the_correction(api: Api, consent: str, trains: bool):
    answer = api.client.post(
        "/v1/predictions",
        content=encoded(head("glioma")),
        headers={"Content-Type": "image/png", "X-Consent": consent},
    ).json()
    assert api.feedback(answer["id"], "correct", "pituitary").json()["may_train"] == trains
    assert (corrections(api, answer["id"]) == ["pituitary"]) == trains


@pytest.mark.parametrize("verdict", ["agree", "not_sure", "not_brain_mri"])
def test_other_verdicts_are_recorded_and_correct_nothing(api: Api, glioma: str, verdict: str):
    before = waiting(api)
    assert api.feedback(glioma, verdict).json()["corrections_waiting"] == before
    assert corrections(api, glioma) == []
    assert said(api, glioma) == [("ann", verdict, None)]


def test_only_a_refused_image_can_be_contested(api: Api, glioma: str):
    answer = api.feedback(glioma, "brain_mri")
    assert (answer.status_code, "contests a rejection" in answer.json()["detail"]) == (422, True)
    refused = api.predict(noise()).json()["id"]
    assert api.feedback(refused, "brain_mri").json()["verdict"] == "brain_mri"
    assert said(api, refused) == [("ann", "brain_mri", None)]
    assert corrections(api, refused) == []


def test_the_same_correction_twice_counts_once(api: Api, glioma: str):
    first = api.feedback(glioma, "correct", "pituitary").json()
    again = api.feedback(glioma, "correct", "pituitary").json()
    assert first == again
    assert said(api, glioma) == [("ann", "correct", "pituitary")]


def test_the_same_correction_twenty_times_at_once_counts_once(services, champion):
    with serving(services) as api:
        prediction_id = api.predict(head("glioma")).json()["id"]
        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(lambda _: api.feedback(prediction_id, "correct", "pituitary"), range(20)))
        assert {answer.status_code for answer in answers} == {200}
        assert said(api, prediction_id) == [("ann", "correct", "pituitary")]
        assert corrections(api, prediction_id) == ["pituitary"]
        assert waiting(api) == 1
        assert api.client.get("/v1/monitoring").json()["feedback"]["correct"] == 1
        assert 'neuroloop_feedback_total{verdict="correct"} 1.0' in api.client.get("/metrics").text


def test_correcting_to_the_predicted_class_counts_as_agreeing(api: Api, glioma: str):
    receipt = api.feedback(glioma, "correct", "glioma").json()
    assert (receipt["verdict"], receipt["label"]) == ("agree", None)
    assert corrections(api, glioma) == []


def test_a_reader_who_corrects_again_moves_the_image(api: Api, glioma: str):
    api.feedback(glioma, "correct", "pituitary")
    api.feedback(glioma, "correct", "meningioma")
    assert corrections(api, glioma) == ["meningioma"]
    assert said(api, glioma) == [("ann", "correct", "meningioma")]


@pytest.mark.parametrize(("verdict", "label"), [("agree", None), ("not_sure", None), ("correct", "glioma")])
def test_a_reader_who_takes_the_correction_back_removes_the_image(
    api: Api, glioma: str, verdict: str, label: str | None
):
    before = waiting(api)
    api.feedback(glioma, "correct", "pituitary")
    assert api.feedback(glioma, verdict, label).json()["corrections_waiting"] == before
    assert corrections(api, glioma) == []


def test_of_two_readers_corrections_the_latest_stands_and_the_other_returns_when_it_is_taken_back(
    api: Api, glioma: str
):
    api.feedback(glioma, "correct", "pituitary", "ann")
    api.feedback(glioma, "correct", "notumor", "ben")
    assert corrections(api, glioma) == ["notumor"]
    api.feedback(glioma, "correct", "pituitary", "ann")  # the same again: no later word than ben's
    assert corrections(api, glioma) == ["notumor"]
    api.feedback(glioma, "not_sure", reader="ben")
    assert corrections(api, glioma) == ["pituitary"]


@pytest.mark.parametrize(("verdict", "label"), [("agree", None), ("correct", "glioma"), ("not_brain_mri", None)])
def test_a_reader_who_denies_the_correction_of_another_later_takes_the_copy_away(
    api: Api, glioma: str, verdict: str, label: str | None
):
    api.feedback(glioma, "correct", "pituitary", "ann")
    api.feedback(glioma, verdict, label, "ben")
    assert corrections(api, glioma) == []
    api.feedback(glioma, "correct", "meningioma", "ann")
    assert corrections(api, glioma) == ["meningioma"]
    for _ in range(2):  # the same word again, after the correction: it denies this one too
        api.feedback(glioma, verdict, label, "ben")
        assert corrections(api, glioma) == []
    assert [reader for reader, *_ in said(api, glioma)] == ["ann", "ben"]


@pytest.mark.parametrize("verdict", ["agree", "not_brain_mri"])
def test_a_refused_image_that_one_reader_gave_a_class_is_not_trained_on_once_another_says_that_it_is_no_brain_mri(
    api: Api, refused: str, verdict: str
):
    api.feedback(refused, "correct", "glioma", "ann")
    api.feedback(refused, "brain_mri", reader="eve")
    assert corrections(api, refused) == ["glioma"]
    api.feedback(refused, verdict, reader="ben")
    assert corrections(api, refused) == []


def test_readers_who_correct_at_the_same_moment_leave_one_image_that_the_rows_explain(api: Api, glioma: str):
    choices = list(zip("abcdefghijkl", itertools.cycle(["pituitary", "meningioma", "notumor"])))
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda one: api.feedback(glioma, "correct", one[1], one[0]), choices))
    assert {answer.status_code for answer in answers} == {200}
    row = api.client.get(f"/v1/predictions/{glioma}").json()
    assert len(row["feedback"]) == len(choices)
    assert corrections(api, glioma) == [row["feedback"][-1]["label"]]  # oldest first


def test_a_refused_image_can_be_corrected_to_a_class(api: Api, refused: str):
    assert api.feedback(refused, "correct", "glioma").status_code == 200
    store = api.services.store
    assert store.get(keys.correction("glioma", refused)) == store.get(keys.invalid(refused))


@pytest.mark.parametrize("verdict", ["agree", "not_brain_mri"])
def test_saying_that_a_refused_image_is_no_brain_agrees_with_the_gate(api: Api, refused: str, verdict: str):
    assert api.feedback(refused, verdict).json()["verdict"] == "agree"
    assert corrections(api, refused) == []


@pytest.mark.parametrize(
    "unknown", [str(uuid.UUID(int=7)), "7", "x" * 300, "..%2F..%2Fetc%2Fpasswd", "%00", "{%7B}", "A" * 32]
)
def test_feedback_on_an_unknown_prediction_is_404(api: Api, unknown: str):
    stored = api.stored()
    response = api.feedback(unknown, "correct", "glioma")
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"
    assert api.stored() == stored


@pytest.mark.parametrize(
    "body",
    [
        {"verdict": "correct", "label": "sarcoma", "reader": "ann"},
        {"verdict": "correct", "label": "../../glioma", "reader": "ann"},
        {"verdict": "correct", "reader": "ann"},
        {"verdict": "agree", "label": "glioma", "reader": "ann"},
        {"verdict": "perhaps", "reader": "ann"},
        {"verdict": "agree"},
        {"verdict": "agree", "reader": "   "},
        {"verdict": "agree", "reader": "a" * 101},
        {"verdict": "agree", "reader": "a\0b"},
        {"verdict": "agree", "reader": "\ud800"},
        {"verdict": "agree", "reader": "ann", "surprise": 1},
    ],
)
def test_contradictory_or_malformed_feedback_is_422_and_changes_nothing(api: Api, glioma: str, body: dict):
    response = api.client.post(
        f"/v1/predictions/{glioma}/feedback", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    problem = response.json()
    assert (response.status_code, response.headers["content-type"]) == (422, "application/problem+json")
    assert problem["detail"]
    assert problem["fix"]
    assert said(api, glioma) == []
    assert corrections(api, glioma) == []


def test_a_correction_used_by_a_batch_no_longer_waits_even_if_it_moves(services, champion):
    with serving(services) as api:
        ids = [api.predict(head("glioma")).json()["id"] for _ in range(3)]
        for number, prediction_id in enumerate(ids, 1):
            assert api.feedback(prediction_id, "correct", "pituitary").json()["corrections_waiting"] == number
        used = {"corrections": [keys.correction("pituitary", ids[0])]}
        services.store.create(keys.batch(1), json.dumps(used).encode())
        assert waiting(api) == 2
        assert api.feedback(ids[0], "correct", "notumor").json()["corrections_waiting"] == 2


def test_without_the_database_a_correction_leaves_no_image(services, champion, postgres_server):
    with serving(services) as api:
        prediction_id = api.predict(head("glioma")).json()["id"]
        postgres_server.stop()
        try:
            assert api.feedback(prediction_id, "correct", "pituitary").status_code == 503
        finally:
            postgres_server.start()
        assert corrections(api, prediction_id) == []
        assert api.feedback(prediction_id, "correct", "pituitary").status_code == 200
        assert corrections(api, prediction_id) == ["pituitary"]


def test_a_verdict_whose_copy_could_not_be_put_in_order_is_recorded_and_counted_and_its_repeat_succeeds(
    services, champion
):
    class Refusing(FolderStore):
        """A folder that goes away once the verdict is recorded: what it outdated cannot be removed."""

        away = False

        def delete(self, key: str) -> None:
            if self.away:
                raise Unavailable("the store is away")
            super().delete(key)

    store = Refusing(str(services.settings.home / "store"))
    services.__dict__["store"] = store
    with serving(services) as api:
        prediction_id = api.predict(head("glioma")).json()["id"]
        store.away = True
        assert api.feedback(prediction_id, "correct", "pituitary").status_code == 503
        assert said(api, prediction_id) == [("ann", "correct", "pituitary")]
        assert 'neuroloop_feedback_total{verdict="correct"} 1.0' in api.client.get("/metrics").text
        store.away = False
        assert api.feedback(prediction_id, "correct", "pituitary").status_code == 200
        assert corrections(api, prediction_id) == ["pituitary"]
        assert 'neuroloop_feedback_total{verdict="correct"} 1.0' in api.client.get("/metrics").text


def test_every_class_can_be_corrected_to_every_other(api: Api):
    for predicted, corrected in itertools.permutations(LABELS, 2):
        prediction_id = api.upload(encoded(head(predicted, height=64, width=64))).json()["id"]
        assert api.feedback(prediction_id, "correct", corrected).json()["label"] == corrected
        assert corrections(api, prediction_id) == [corrected]
