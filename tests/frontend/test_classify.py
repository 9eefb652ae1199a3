"""The Classify page against a real API."""

import base64
import dataclasses
import re
from uuid import uuid4

import numpy as np
import pytest
from heatmap import grey, overlay
from layout import ACCENT, CLASS_NAMES, percent
from streamlit.testing.v1 import AppTest

from frontend.reading import address, chart, labels, picture, words
from imaging.files import axial, dicom, nifti
from neuroloop.imaging import phantom
from serving.running import encoded, head, noise


def predictions(api) -> int:
    return api.services.log.monitoring().predictions


def consent(app: AppTest, *, retrain: bool = True) -> AppTest:
    app.checkbox(key="consent").check().run()
    if retrain:
        app.checkbox(key="retrain").check().run()
    return app


def upload(app: AppTest, data: bytes, name: str = "scan.png") -> AppTest:
    app.file_uploader[0].clear().upload(name, data, "image/png").run()
    assert not app.exception, [fault.value for fault in app.exception]
    return app


@pytest.fixture
def page(open_page, live_api) -> AppTest:
    return consent(open_page("classify", live_api))


def press(app: AppTest, label: str) -> AppTest:
    next(button for button in app.button if button.label == label).click().run()
    assert not app.exception
    return app


def correct_to(app: AppTest, label: str) -> AppTest:
    app.selectbox[0].set_value(label).run()
    return press(app, "Send correction")


def test_without_consent_nothing_can_be_chosen_or_sent(open_page, live_api):
    before = predictions(live_api)
    app = open_page("classify", live_api)

    assert app.file_uploader[0].disabled
    assert all(button.disabled for button in app.button)
    assert "Tick the notice" in words(app)
    assert predictions(live_api) == before


def test_a_result_hides_as_soon_as_consent_is_withdrawn(page):
    upload(page, encoded(head("glioma")))
    page.checkbox(key="consent").uncheck().run()

    assert "the model sees" not in words(page)


def test_an_upload_shows_its_class_its_probability_and_which_model_and_data_said_so(page, live_api):
    answer = live_api.predict(head("meningioma")).json()
    upload(page, encoded(head("meningioma")))

    text = words(page)
    assert f"Tumour: the model sees a meningioma ({round(100 * answer['probabilities']['meningioma'])} %)" in text
    assert f"version {answer['model_version']}" in text
    assert "<b>d1</b>" in text
    assert "Model trained on simulated scans" in text
    captions = [caption for image in page.get("image") for caption in image.captions]
    assert "The scan as it was read" in captions
    assert "What speaks for meningioma" in captions
    assert page.slider[0].label == "Heat map opacity"


def test_the_bars_are_the_probabilities_of_the_answer_each_beside_its_class(page, live_api):
    answer = live_api.predict(head("meningioma")).json()
    upload(page, encoded(head("meningioma")))

    bars, table = chart(page, "Probability")
    assert (bars["encoding"]["y"]["field"], bars["encoding"]["color"]["field"]) == ("Class", "Colour")
    drawn = dict(zip(table["Class"], table["Probability"], strict=True))
    assert drawn == {CLASS_NAMES[label]: chance for label, chance in answer["probabilities"].items()}
    assert list(table["Words"]) == [percent(chance) for chance in table["Probability"]]
    assert list(table.loc[table["Colour"] == ACCENT, "Class"]) == ["Meningioma"]


def test_the_scan_and_the_heat_map_over_it_are_shown_pixel_by_pixel_at_every_opacity(page, live_api):
    answer = live_api.predict(head("glioma")).json()
    scan, heat = (grey(base64.b64decode(answer[part])) for part in ("image", "heatmap"))
    upload(page, encoded(head("glioma")))

    assert picture(page, "The scan as it was read") == address(scan)
    for opacity in (page.slider[0].value, 20):
        page.slider[0].set_value(opacity).run()
        assert picture(page, "What speaks for glioma") == address(overlay(scan, heat, opacity / 100))
    assert len({address(overlay(scan, heat, opacity)) for opacity in (0, 0.2, 0.65)}) == 3


def test_the_facts_beside_a_result_are_those_of_its_record(page, live_api):
    upload(page, encoded(head("pituitary")))
    row = live_api.services.log.prediction(page.session_state["outcome"].answer.id)

    for name, value in (
        ("Prediction", row.id),
        ("Gate score", f"{row.gate.score:.2f}"),
        ("Novelty", f"{row.gate.novelty:.2f}"),
        ("Time", f"{1000 * row.seconds:.0f} ms"),
        ("Size", f"{row.width} x {row.height} px"),
    ):
        assert f"<span>{name} <b>{value}</b></span>" in words(page)


def test_prediction_sets_stand_in_plain_words(page, live_api):
    answer = live_api.predict(head("meningioma")).json()
    upload(page, encoded(head("meningioma")))

    text = words(page)
    assert answer["prediction_sets"]["0.90"] == ["meningioma"]
    assert "**90 % set:** meningioma alone" in text
    assert "**95 % set:** any of the four" in text
    assert "Refer to a reader" not in text


def test_an_uncertain_scan_is_referred_to_a_reader_with_the_reason_before_any_class_is_named(page, live_api):
    answer = live_api.predict(faint("glioma")).json()
    upload(page, encoded(faint("glioma")))

    assert answer["refer"]
    text = words(page)
    assert "Refer to a reader" in text
    assert answer["refer_reason"] in text
    assert text.index("Refer to a reader") < text.index("Most probable, but no answer: glioma")
    assert "the model sees" not in text


def faint(label: str) -> np.ndarray:
    """A head whose spot is hardly brighter than the rest, so that the model is unsure."""
    pixels = head(label)
    pixels[pixels > 100] = 170
    return pixels


def test_a_referred_scan_without_a_heat_map_is_not_said_to_have_no_tumour(page, live_api):
    answer = live_api.predict(faint("notumor")).json()
    assert (answer["refer"], answer["label"]) == (True, "notumor")
    upload(page, encoded(faint("notumor")))

    text = words(page)
    assert "There is no heat map here" in text
    assert "too uncertain to be an answer" in text
    assert "found none" not in text


def test_a_referred_scan_has_nothing_to_agree_with_and_all_four_classes_to_choose_from(page, live_api):
    upload(page, encoded(faint("glioma")))
    assert "What does it show?" in words(page)
    assert "Is this right?" not in words(page)
    assert "Agree" not in labels(page)
    assert page.selectbox[0].options == ["Glioma", "Meningioma", "No tumour", "Pituitary tumour"]

    answer = page.session_state["outcome"].answer
    for label, recorded in (("glioma", ("agree", None)), ("meningioma", ("correct", "meningioma"))):
        page.selectbox[0].set_value(label).run()
        press(page, "Send")
        (said,) = live_api.services.log.feedback(answer.id)
        assert (said.verdict, said.label) == recorded
        assert label in page.success[0].value


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        ((), "empty"),
        (("glioma",), "glioma alone"),
        (("pituitary", "glioma"), "pituitary tumour or glioma"),
        (("pituitary", "glioma", "notumor"), "pituitary tumour, glioma or no tumour"),
        (("pituitary", "glioma", "notumor", "meningioma"), "any of the four"),
    ],
)
def test_a_prediction_set_of_any_size_can_be_read(classes, expected):
    from layout import set_line

    assert set_line("0.90", classes).startswith(f"**90 % set:** {expected}")


def test_of_a_file_with_several_slices_the_reader_chooses_another_one(page, live_api):
    series = dicom(np.stack([head(label) for label in ("glioma", "meningioma", "pituitary")]))
    before = predictions(live_api)
    upload(page, series, "IM-0001-0001")
    assert "the model sees a meningioma" in words(page)
    slice_number = page.number_input[0]
    assert (slice_number.label, slice_number.value) == ("Slice, of 3", 2)

    slice_number.set_value(3).run()
    assert predictions(live_api) == before + 1  # nothing is asked while the reader still types
    press(page, "Show this slice")
    assert "the model sees a pituitary" in words(page)
    assert page.number_input[0].value == 3
    assert predictions(live_api) == before + 2

    longer = dicom(np.stack([head(label) for label in ("glioma", "glioma", "meningioma", "pituitary", "pituitary")]))
    page.number_input[0].set_value(1).run()
    upload(page, longer, "IM-0002-0001")
    assert (page.number_input[0].label, page.number_input[0].value) == ("Slice, of 5", 3)

    upload(page, encoded(head("glioma")), "one.png")
    assert not page.number_input


@pytest.mark.parametrize("kind", ["dicom", "nifti"])
def test_a_refused_scan_is_shown_as_the_platform_read_it_and_another_slice_can_be_chosen(page, kind):
    frames = [noise(), head("glioma", height=200, width=200)]
    series = (
        dicom(np.stack(frames)) if kind == "dicom" else nifti(np.concatenate([axial(one) for one in frames], axis=2))
    )
    upload(page, series, "series")
    assert "This does not look like a brain MRI" in words(page)
    assert page.get("image")
    page.number_input[0].set_value(2).run()
    press(page, "Show this slice")
    assert "the model sees a glioma" in words(page)


def test_the_slice_that_is_shown_is_not_asked_for_again_nor_a_sample_clicked_twice(page, live_api):
    before = predictions(live_api)
    upload(page, dicom(np.stack([head(label) for label in ("glioma", "meningioma", "pituitary")])), "series")
    press(page, "Show this slice")
    assert predictions(live_api) == before + 1
    page.number_input[0].set_value(3).run()
    press(page, "Show this slice")
    press(page, "Show this slice")
    assert predictions(live_api) == before + 2
    for _ in range(2):
        page.button(key="take-1").click().run()
    assert predictions(live_api) == before + 3


def test_a_slice_that_cannot_be_read_leaves_the_choice_of_another(open_page, live_api, monkeypatch):
    app = consent(open_page("classify", live_api))
    upload(app, dicom(np.stack([head(label) for label in ("glioma", "meningioma", "pituitary")])), "series")
    app.number_input[0].set_value(3).run()
    monkeypatch.setenv("NEUROLOOP_API_URL", "http://127.0.0.1:9")
    press(app, "Show this slice")
    assert "cannot be reached" in words(app)
    assert (app.number_input[0].label, app.number_input[0].value) == ("Slice, of 3", 3)
    assert "Try again" in labels(app)

    monkeypatch.setenv("NEUROLOOP_API_URL", f"http://127.0.0.1:{live_api.port}")
    app.number_input[0].set_value(1).run()
    press(app, "Show this slice")
    assert "the model sees a glioma" in words(app)


def test_each_slice_that_is_looked_at_has_the_consent_that_is_ticked_then(page, live_api):
    upload(page, dicom(np.stack([head(label) for label in ("glioma", "meningioma", "pituitary")])), "series")
    page.checkbox(key="retrain").uncheck().run()
    first = page.session_state["outcome"].answer.id
    page.number_input[0].set_value(3).run()
    press(page, "Show this slice")
    second, log = page.session_state["outcome"].answer.id, live_api.services.log
    assert [log.prediction(one).consent for one in (first, second)] == ["training", "record"]


def test_a_second_try_has_the_consent_that_is_ticked_then(open_page, live_api, monkeypatch):
    app = consent(open_page("classify"))
    upload(app, encoded(head("glioma")))
    app.checkbox(key="retrain").uncheck().run()
    monkeypatch.setenv("NEUROLOOP_API_URL", f"http://127.0.0.1:{live_api.port}")
    press(app, "Try again")
    assert live_api.services.log.prediction(app.session_state["outcome"].answer.id).consent == "record"


def test_a_click_that_was_meant_for_the_slice_before_changes_nothing(page, live_api):
    """It may come before the field of the slice that is being read is drawn."""
    upload(page, dicom(np.stack([head(label) for label in ("glioma", "meningioma", "pituitary")])), "series")
    before = predictions(live_api)
    chosen = page.session_state["upload"]
    page.session_state["upload"] = dataclasses.replace(chosen, frame=3, choice=uuid4().hex)
    press(page, "Show this slice")
    assert "the model sees a pituitary" in words(page)
    assert predictions(live_api) == before + 1


def test_a_correction_that_no_retraining_learns_from_is_not_said_to_count(open_page, live_api):
    page = consent(open_page("classify", live_api), retrain=False)
    upload(page, encoded(head("glioma")))
    correct_to(page, "pituitary")
    assert "no retraining learns from it" in page.success[0].value
    assert "waiting" not in page.success[0].value
    press(page, "Not sure")
    assert "waiting" in page.success[0].value


@pytest.mark.parametrize(("retrain", "consented"), [(False, "record"), (True, "training")])
def test_a_scan_is_learned_from_only_where_that_was_ticked_too(open_page, live_api, retrain, consented):
    page = consent(open_page("classify", live_api), retrain=retrain)
    upload(page, encoded(head("glioma")))
    answer = page.session_state["outcome"].answer
    correct_to(page, "pituitary")

    assert live_api.services.log.prediction(answer.id).consent == consented
    copies = [key for key in live_api.stored() if "ImageLogsWithFeedback" in key and answer.id in key]
    assert len(copies) == retrain


def test_a_scan_whose_header_says_ct_is_refused_with_that_reason(page):
    upload(page, dicom(head("glioma"), Modality="CT"), "series")
    assert "modality CT, not MR" in words(page)


def test_without_a_tumour_words_stand_where_the_heat_map_would_be(page):
    upload(page, encoded(head("notumor")))

    assert "No tumour: the model sees none" in words(page)
    assert "There is no heat map here" in words(page)
    assert len(page.slider) == 0


def test_a_new_upload_never_shows_the_result_or_feedback_of_the_one_before(page):
    upload(page, encoded(head("glioma")), "first.png")
    press(page, "Agree")
    assert "Thank you, Ann" in words(page)

    upload(page, encoded(head("pituitary")), "second.png")
    text = words(page)
    assert "the model sees a pituitary tumour" in text
    assert "second.png" in text
    for left_over in ("sees a glioma", "first.png", "Thank you"):
        assert left_over not in text


def test_a_rejected_upload_does_not_leave_the_result_before_it_standing(page):
    upload(page, encoded(head("glioma")))
    upload(page, encoded(noise()), "noise.png")

    text = words(page)
    assert "This does not look like a brain MRI" in text
    assert "the model sees" not in text
    assert "Gate score" in text
    assert "What you can do" in text


def test_the_same_file_chosen_again_is_asked_again_with_nothing_left_of_its_feedback(page, live_api):
    before = predictions(live_api)
    upload(page, encoded(head("glioma")))
    press(page, "Agree")
    upload(page, encoded(head("glioma")))

    assert predictions(live_api) == before + 2
    assert "Thank you" not in words(page)


def test_moving_the_opacity_does_not_ask_the_model_again(page, live_api):
    upload(page, encoded(head("glioma")))
    before = predictions(live_api)
    page.slider[0].set_value(20).run()

    assert predictions(live_api) == before
    assert "the model sees a glioma" in words(page)


def test_removing_the_file_removes_its_result(page):
    upload(page, encoded(head("glioma")))
    page.file_uploader[0].clear().run()

    assert "the model sees" not in words(page)
    assert "Choose a scan to see its result here" in words(page)


def test_a_simulated_sample_is_sent_and_marked_as_simulated(page, live_api):
    before = predictions(live_api)
    page.button(key="take-0").click().run()

    assert not page.exception
    assert predictions(live_api) == before + 1
    assert "Sample 1" in words(page)
    answer = page.session_state["outcome"].answer
    assert answer.id in words(page)
    assert live_api.services.log.prediction(answer.id).consent == "simulated"
    assert page.file_uploader[0].value is None


def test_an_upload_that_is_no_image_is_explained_without_a_stack_trace(page, live_api):
    before = predictions(live_api)
    upload(page, b"%PDF-1.7 not an image", "report.pdf")

    problem = live_api.upload(b"%PDF-1.7 not an image").json()
    assert problem["title"] in words(page)
    assert "Traceback" not in words(page)
    assert predictions(live_api) == before


def test_agreeing_confirms_and_says_how_many_corrections_wait(page, live_api):
    waiting = live_api.client.get("/v1/monitoring").json()["corrections_waiting"]
    upload(page, encoded(head("glioma")))
    press(page, "Agree")

    assert len(page.success) == 1
    assert f"{waiting} correction" in page.success[0].value
    assert "waiting of 50 needed (more than 50 start a retraining)" in page.success[0].value


def test_a_correction_raises_the_count_and_stands_in_the_log(page, live_api):
    before = live_api.client.get("/v1/monitoring").json()["corrections_waiting"]
    upload(page, encoded(head("glioma")))
    correct_to(page, "pituitary")

    assert "Corrected to pituitary tumour" in page.success[0].value
    assert f"{before + 1} correction" in page.success[0].value
    assert live_api.client.get("/v1/monitoring").json()["corrections_waiting"] == before + 1


def test_the_class_that_was_predicted_is_not_offered_as_a_correction(page):
    upload(page, encoded(head("glioma")))

    assert page.selectbox[0].options == ["Meningioma", "No tumour", "Pituitary tumour"]


@pytest.mark.parametrize(("label", "verdict"), [("Not sure", "not_sure"), ("Not a brain MRI", "not_brain_mri")])
def test_the_other_verdicts_are_recorded_too(page, live_api, label, verdict):
    before = live_api.client.get("/v1/monitoring").json()["feedback"].get(verdict, 0)
    upload(page, encoded(head("glioma")))
    press(page, label)

    assert live_api.client.get("/v1/monitoring").json()["feedback"][verdict] == before + 1


def test_a_change_of_verdict_that_fails_is_said_to_have_failed_and_nothing_else(page, live_api):
    upload(page, encoded(head("glioma")))
    press(page, "Agree")
    assert page.success
    answer = page.session_state["outcome"].answer
    live_api.client.delete(f"/v1/predictions/{answer.id}", params={"reason": "mistake", "by": "a test"})
    press(page, "Not sure")

    for _ in range(2):
        assert not page.success
        assert "Your verdict was NOT recorded" in page.warning[0].value
        page.slider[0].set_value(20).run()


def test_a_refused_scan_can_be_contested_without_a_class_and_says_where_the_threshold_comes_from(page, live_api):
    before = live_api.client.get("/v1/monitoring").json()
    upload(page, encoded(noise()))
    assert "chosen for this test" in words(page)
    press(page, "It is a brain MRI")

    assert "You say this is a brain MRI." in page.success[0].value
    after = live_api.client.get("/v1/monitoring").json()
    assert after["contested"] == before["contested"] + 1
    assert after["corrections_waiting"] == before["corrections_waiting"]


def test_a_refused_scan_can_be_claimed_as_a_brain_mri(page, live_api):
    before = live_api.client.get("/v1/monitoring").json()["corrections_waiting"]
    upload(page, encoded(noise()))
    correct_to(page, "glioma")

    assert live_api.client.get("/v1/monitoring").json()["corrections_waiting"] == before + 1


def test_a_reader_name_with_markup_is_shown_letter_by_letter(open_page, live_api):
    page = consent(open_page("classify", live_api, name="**A** <b>"))
    upload(page, encoded(head("glioma")))
    press(page, "Agree")

    assert r"\*\*A\*\* \<b\>" in page.success[0].value


def test_an_upload_while_the_service_is_down_is_kept_and_succeeds_on_retry(open_page, live_api, monkeypatch):
    app = consent(open_page("classify"))
    upload(app, encoded(head("glioma")))
    assert "The inference service cannot be reached" in words(app)

    monkeypatch.setenv("NEUROLOOP_API_URL", f"http://127.0.0.1:{live_api.port}")
    press(app, "Try again")
    assert "the model sees a glioma" in words(app)


def test_without_a_model_the_page_says_so_and_where_to_watch_the_build(open_page, bare_api):
    app = open_page("classify", bare_api)

    assert "No model is being served yet" in words(app)
    assert "Watch the build in Airflow" in words(app)
    assert "Try again" in labels(app)
    assert re.search(r"Request \S{8}", words(app))  # by which an operator finds it in the log


def test_the_samples_are_eight_different_simulated_scans_with_two_of_each_class():
    import samples

    scans = [samples.render(*sample) for sample in samples.SAMPLES]
    assert len({scan.png for scan in scans}) == 8
    assert sorted(scan.label for scan in scans) == sorted(2 * ["glioma", "meningioma", "notumor", "pituitary"])
    assert {scanner for _, _, scanner in samples.SAMPLES} <= set(phantom.SCANNERS)
