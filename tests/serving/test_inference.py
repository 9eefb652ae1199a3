"""A prediction through HTTP: what is answered, what is stored, what is recorded."""

import base64
import hashlib
import io

import httpx
import numpy as np
import pytest
from PIL import Image

from model.cards import FACTS
from neuroloop.core import keys
from neuroloop.core.schemas import LABELS, RESEARCH_NOTICE
from neuroloop.model.bundle import with_card
from neuroloop.model.card import compose
from serving.running import CORNERS, Api, encoded, head, noise, serving, wait, write_bundle


def png(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


@pytest.mark.parametrize("label", LABELS)
def test_a_scan_is_classified_stored_and_recorded_before_it_is_answered(api: Api, label: str):
    data = encoded(head(label))
    response = api.upload(data)
    answer = response.json()
    assert response.status_code == 201
    assert answer["label"] == label
    assert answer["tumour"] == (label != "notumor")
    assert sum(answer["probabilities"].values()) == pytest.approx(1)
    assert max(answer["probabilities"], key=answer["probabilities"].get) == label
    assert answer["notice"] == response.headers["X-Research-Use-Only"] == RESEARCH_NOTICE
    assert (answer["width"], answer["height"], answer["data_version"], answer["simulated_model"]) == (
        240,
        200,
        "d1",
        True,
    )
    row = api.client.get(response.headers["Location"]).json()
    assert row["object_key"] == keys.prediction(label, answer["id"])
    assert row["sha256"] == hashlib.sha256(data).hexdigest()
    assert row["probabilities"] == answer["probabilities"]
    assert row["model_version"] == answer["model_version"] == api.client.get("/v1/model").json()["version"]
    stored = api.services.store.get(row["object_key"])
    assert (np.asarray(Image.open(io.BytesIO(stored))) == head(label)).all()
    assert api.client.get(f"/v1/predictions/{answer['id']}/image").content == stored


@pytest.mark.parametrize("shape", [(200, 240), (1200, 700)])
@pytest.mark.parametrize("label", ["glioma", "pituitary"])
def test_the_heat_map_lies_on_the_evidence_in_the_frame_of_the_upload(api: Api, label: str, shape: tuple[int, int]):
    answer = api.predict(head(label, height=shape[0], width=shape[1])).json()
    heat, image = png(answer["heatmap"]), png(answer["image"])
    assert heat.shape == image.shape
    assert max(heat.shape) == min(512, max(shape))
    assert heat.shape[0] / heat.shape[1] == pytest.approx(shape[0] / shape[1], rel=0.01)
    ys, xs = np.nonzero(heat > 200)
    lower, right = CORNERS[label]
    for mean, far, side in ((ys.mean(), lower, heat.shape[0]), (xs.mean(), right, heat.shape[1])):
        assert mean / side == pytest.approx(0.675 if far else 0.325, abs=0.06)  # where `head` puts the spot


def test_the_answer_and_its_row_hold_the_prediction_sets_most_probable_first(api: Api):
    answer = api.predict(head("meningioma")).json()
    assert answer["prediction_sets"]["0.90"] == ["meningioma"]
    assert answer["prediction_sets"]["0.95"][0] == "meningioma"
    assert set(answer["prediction_sets"]["0.95"]) == {
        label for label, probability in answer["probabilities"].items() if probability >= 0.1
    }
    assert (answer["refer"], answer["refer_reason"]) == (False, "")
    row = api.client.get(f"/v1/predictions/{answer['id']}").json()
    for name in ("prediction_sets", "refer", "refer_reason"):
        assert row[name] == answer[name]


def test_an_uncertain_answer_is_referred_to_a_reader_in_words_and_counted(services, champion, promote, tmp_path):
    version = promote(write_bundle(tmp_path / "unsure", refer_below=0.9))
    with serving(services) as api:
        wait(lambda: api.client.get("/v1/model").json()["version"] == version)
        answer = api.predict(head("glioma")).json()
        refused = api.predict(noise()).json()
        row = api.client.get(f"/v1/predictions/{answer['id']}").json()
        seen = api.client.get("/v1/monitoring").json()
        metrics = api.client.get("/metrics").text
        other = api.client.get(f"/v1/predictions/{refused['id']}").json()
    assert (answer["refer"], answer["label"]) == (True, "glioma")
    assert f"{100 * answer['probabilities']['glioma']:.1f} %, is below 90.0 %" in answer["refer_reason"]
    assert (row["refer"], row["refer_reason"]) == (True, answer["refer_reason"])
    assert (seen["accepted"], seen["referred"], seen["per_class"]["glioma"]["referred"]) == (1, 1, 1)
    assert 'neuroloop_referrals_total{label="glioma"} 1.0' in metrics
    assert (other["refer"], other["prediction_sets"]) == (False, {})  # the gate has the word there


def test_the_model_card_of_the_served_model_can_be_read(services, champion, promote, tmp_path):
    folder = with_card(write_bundle(tmp_path / "carded"), compose(**FACTS))
    with serving(services) as api:
        wait(lambda: api.client.get("/v1/model").json()["version"] == champion)
        missing = api.client.get("/v1/model/card")
        version = promote(folder)
        wait(lambda: api.client.get("/v1/model").json()["version"] == version)
        answer = api.client.get("/v1/model/card").json()
    assert (missing.status_code, "no model card" in missing.json()["detail"]) == (404, True)
    assert answer["version"] == version
    assert answer["markdown"] == (folder / "card.md").read_text()
    assert answer["card"]["scores"]["macro_f1"] == FACTS["evaluated"]["test"]["macro_f1"]


def test_no_heat_map_is_shown_where_no_tumour_is_predicted(api: Api):
    assert api.predict(head("notumor")).json()["heatmap"] is None


def test_an_image_can_be_sent_as_the_body_itself(api: Api):
    response = api.client.post(
        "/v1/predictions", content=encoded(head("glioma"), "JPEG"), headers={"Content-Type": "image/jpeg"}
    )
    assert (response.status_code, response.json()["label"]) == (201, "glioma")


def test_metadata_and_file_names_of_an_upload_are_kept_nowhere(api: Api, caplog: pytest.LogCaptureFixture):
    exif = Image.Exif()
    exif[0x010E] = "Jane Doe 1970"  # ImageDescription
    data = encoded(head("glioma"), "JPEG", exif=exif)
    assert b"Jane Doe" in data
    with caplog.at_level("INFO"):
        answer = api.client.post("/v1/predictions", files={"file": ("../../Jane Doe.jpg", data)}).json()
    row = api.client.get(f"/v1/predictions/{answer['id']}")
    stored = api.services.store.get(row.json()["object_key"])
    assert b"Jane" not in stored
    assert "Jane" not in row.text
    assert "Jane" not in caplog.text
    assert any(answer["id"] in record.getMessage() for record in caplog.records)


def test_an_image_that_the_gate_refuses_is_recorded_without_a_class_and_answered_with_the_reason(api: Api):
    response = api.predict(noise())
    problem = response.json()
    assert (response.status_code, response.headers["content-type"]) == (422, "application/problem+json")
    assert problem["type"] == "urn:neuroloop:problem:not-a-brain-mri"
    assert problem["detail"] == problem["gate"]["reason"] != ""
    assert problem["gate"]["score"] < problem["gate"]["threshold"]
    row = api.client.get(f"/v1/predictions/{problem['id']}").json()
    assert (row["label"], row["probabilities"], row["gate"]["accepted"]) == (None, {}, False)
    assert row["object_key"] == keys.invalid(problem["id"])
    assert [key for key in api.stored() if problem["id"] in key] == [keys.invalid(problem["id"])]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"this is no image at all", 415),
        (encoded(head("glioma"))[:500], 400),
        (encoded(np.zeros((8, 8), np.uint8)), 400),
        (b"", 400),
        (encoded(np.zeros((8000, 6000), np.uint8)), 413),
        (bytes(1_200_000), 413),
    ],
    ids=["no image", "cut off", "tiny", "empty", "too many pixels", "too many bytes"],
)
def test_a_bad_upload_is_a_problem_with_a_fix_and_leaves_nothing_behind(api: Api, data: bytes, status: int):
    stored, rows = api.stored(), api.client.get("/v1/monitoring").json()["predictions"]
    response = api.upload(data)
    problem = response.json()
    assert (response.status_code, problem["status"]) == (status, status)
    assert problem["title"]
    assert problem["detail"]
    assert problem["fix"]
    assert api.stored() == stored
    assert api.client.get("/v1/monitoring").json()["predictions"] == rows


def test_without_the_database_no_object_is_left_and_the_answer_is_503(services, champion, postgres_server):
    with serving(services) as api:
        assert api.predict(head("glioma")).status_code == 201
        stored = api.stored()
        postgres_server.stop()
        try:
            response = api.predict(head("glioma"))
            ready = api.client.get("/health/ready")
        finally:
            postgres_server.start()
        assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
        assert response.elapsed.total_seconds() < 15
        assert api.stored() == stored
        assert ready.status_code == 503
        assert {part for part, state in ready.json()["checks"].items() if state != "ok"} == {"database"}
        assert api.predict(head("glioma")).status_code == 201


def test_without_the_store_no_row_is_written_and_the_answer_is_503(services, champion, tmp_path):
    with serving(services) as api:
        (tmp_path / "store").write_text("a file where the folder should be")
        response = api.predict(head("glioma"))
        assert response.status_code == 503
        assert api.client.get("/health/ready").json()["checks"]["store"] != "ok"
        (tmp_path / "store").unlink()
        assert api.client.get("/v1/monitoring").json()["predictions"] == 0
        assert api.client.get("/health/ready").json()["checks"] == {"database": "ok", "store": "ok", "model": "ok"}


def test_without_a_champion_the_server_lives_but_is_not_ready(services, champion, mlflow_uri):
    from mlflow import MlflowClient

    from neuroloop.adapters.mlflow_registry import MODEL

    MlflowClient(mlflow_uri, mlflow_uri).delete_registered_model_alias(MODEL, "champion")
    with serving(services, model=False) as api:
        for response in (api.predict(head("glioma")), api.client.get("/v1/model"), api.client.get("/health/ready")):
            assert response.status_code == 503
            assert response.headers["Retry-After"]
        assert api.client.get("/health/live").status_code == 200
        assert api.upload(b"no image").status_code == 415
        assert api.stored() == []


def test_monitoring_counts_predictions_rejections_and_corrections(services, champion):
    with serving(services) as api:
        first = api.predict(head("glioma")).json()
        api.predict(head("glioma"))
        api.predict(noise())
        api.feedback(first["id"], "correct", "pituitary")
        seen = api.client.get("/v1/monitoring").json()
    assert (seen["predictions"], seen["accepted"], seen["rejected"]) == (3, 2, 1)
    assert seen["per_class"]["glioma"]["predictions"] == 2
    assert [point["accepted"] for point in seen["gate_scores"]] == [True, True, False]
    assert seen["feedback"]["correct"] == seen["corrections_waiting"] == 1
    assert seen["feedback_threshold"] == 50


def test_models_and_mails_are_listed_newest_first(services, register, promote, smtp_sink, tmp_path):
    first = register(write_bundle(tmp_path / "a"))
    second = promote(write_bundle(tmp_path / "b", data_version="d2"))
    smtp = services.settings.model_copy(update={"notify_url": smtp_sink.url})
    notifier = type(services)(smtp).notifier
    notifier.send("One", "first")
    notifier.send("Two", "second")
    broken = b"Subject: Three\r\nContent-Type: text/plain; charset=klingon\r\n\r\nnuqneH"
    services.store.put(keys.mail("9999-broken"), broken)
    with serving(services) as api:
        models = api.client.get("/v1/models").json()
        assert models["serving"] == second
        assert [each["version"] for each in models["versions"]][:2] == [second, first]
        assert models["versions"][0]["aliases"] == ["champion"]
        assert models["promotions"] == []
        assert models["mlflow_url"] == f"{services.settings.mlflow_tracking_uri}/#/models"
        mails = api.client.get("/v1/mails").json()
        assert [mail["subject"] for mail in mails] == ["Three", "Two", "One"]
        assert mails[1]["body"].startswith("second")


def test_metrics_count_what_happened_to_this_server_only(services, champion):
    with serving(services) as api:
        api.predict(head("glioma"))
        api.predict(noise())
        text = api.client.get("/metrics").text
    assert 'neuroloop_predictions_total{label="glioma"} 1.0' in text
    assert 'neuroloop_predictions_total{label="rejected"} 1.0' in text
    assert f'neuroloop_model_info{{data_version="d1",simulated="true",version="{champion}"}} 1.0' in text
    assert 'neuroloop_requests_total{method="POST",route="/v1/predictions",status="201"} 1.0' in text
    assert "neuroloop_model_reloads_total 1.0" in text


def test_many_clients_at_once_each_get_the_answer_to_their_own_image(api: Api):
    from concurrent.futures import ThreadPoolExecutor

    def ask(label: str) -> tuple[str, httpx.Response]:
        return label, api.predict(head(label))

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, LABELS * 6))
    assert all(response.status_code == 201 and response.json()["label"] == label for label, response in answers)
    assert len({response.json()["id"] for _, response in answers}) == len(answers)
    wait(lambda: api.client.get("/health/ready").status_code == 200)
