import io

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import f1_score, precision_score, recall_score

from neuroloop.core.schemas import LABELS
from neuroloop.model.calibration import LEVELS, Calibration, fit
from neuroloop.model.evaluation import (
    baselines,
    confusion_plot,
    coverage,
    error_grid,
    evaluate,
    reliability_plot,
    resplit_coverage,
    risk_coverage,
    risk_coverage_plot,
)


def case(n: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 4, n)
    probabilities = generator.dirichlet(np.ones(4), n) + 0.7 * np.eye(4)[labels]
    return probabilities / probabilities.sum(axis=1, keepdims=True), labels


def test_the_scores_agree_with_scikit_learn():
    probabilities, labels = case()
    predicted = probabilities.argmax(axis=1)
    scores = evaluate(probabilities, labels, np.arange(200), generator=np.random.default_rng(0))
    assert scores["accuracy"] == pytest.approx((predicted == labels).mean())
    assert scores["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    for index, label in enumerate(LABELS):
        only = {"labels": [index], "average": "macro"}
        assert scores[f"recall_{label}"] == pytest.approx(recall_score(labels, predicted, **only))
        assert scores[f"precision_{label}"] == pytest.approx(precision_score(labels, predicted, **only))


def test_the_interval_holds_the_score_and_repeats_with_the_same_generator():
    probabilities, labels = case()
    first, second = (evaluate(probabilities, labels, np.arange(200), generator=np.random.default_rng(3)) for _ in "ab")
    assert first == second
    assert first["accuracy_low"] < first["accuracy"] < first["accuracy_high"]
    assert first["macro_f1_low"] < first["macro_f1"] < first["macro_f1_high"]
    for label in LABELS:
        assert first[f"recall_{label}_low"] < first[f"recall_{label}"] < first[f"recall_{label}_high"]


def test_the_interval_of_a_recall_is_that_of_a_share_of_its_images():
    labels = np.repeat(np.arange(4), 100)
    predicted = labels.copy()
    predicted[:20] = 1
    scores = evaluate(np.eye(4)[predicted], labels, np.arange(400), bootstrap=4000, generator=np.random.default_rng(0))
    deviation = 1.96 * np.sqrt(0.8 * 0.2 / 100)
    assert scores["recall_glioma_low"] == pytest.approx(0.8 - deviation, abs=0.01)
    assert scores["recall_glioma_high"] == pytest.approx(0.8 + deviation, abs=0.01)
    assert scores["recall_notumor_low"] == pytest.approx(100 / (100 + 1.96**2))  # Wilson's, of 100 in 100
    assert scores["recall_notumor_high"] == 1


def test_even_without_an_error_no_interval_is_a_point():
    labels = np.repeat(np.arange(3), 40)
    scores = evaluate(np.eye(4)[labels], labels, np.arange(120), bootstrap=100, generator=np.random.default_rng(0))
    assert (scores["macro_f1"], scores["macro_f1_high"]) == (1, 1)
    assert scores["macro_f1_low"] == pytest.approx(40 / (40 + 1.96**2))
    assert scores["macro_f1_low"] < scores["accuracy_low"] < 1


@pytest.mark.parametrize(
    ("groups", "recall"), [(4, 0.9), (8, 0.95), (20, 0.9), (30, 0.96), (42, 0.96), (42, 0.98), (60, 0.98)]
)
def test_the_interval_of_a_small_class_holds_the_truth_as_often_as_it_says(groups, recall):
    generator, held = np.random.default_rng(0), 0
    for _ in range(300):
        labels = np.concatenate([np.zeros(groups, int), np.ones(40, int)])
        right = generator.random(len(labels)) < recall
        probabilities = np.full((len(labels), 4), 0.01)
        probabilities[np.arange(len(labels)), np.where(right, labels, 1 - labels)] = 0.97
        found = evaluate(probabilities, labels, np.arange(len(labels)), bootstrap=200, generator=generator)
        held += found["recall_glioma_low"] <= recall <= found["recall_glioma_high"]
    assert held / 300 >= 0.93
    assert found["recall_glioma_low"] < 1


@pytest.mark.parametrize("size", [48, 80, 112, 304])
def test_the_nearest_baseline_sees_the_whole_image_at_any_size(size):
    generator = np.random.default_rng(0)
    images = np.repeat(generator.integers(0, 256, (1, size, size), dtype=np.uint8), 40, axis=0)
    labels = np.arange(40) % 4
    for image, label in zip(images, labels, strict=True):  # they differ in the last rows only
        image[-size // 8 :, label * size // 4 : (label + 1) * size // 4] = 255
        image[-size // 8 :] //= 1 + generator.integers(0, 2, (size // 8, size), dtype=np.uint8)
    found = baselines(images[:20], labels[:20], images[20:], labels[20:])
    assert found["nearest_accuracy"] == 1


def test_twins_in_groups_widen_the_interval():
    probabilities, labels = case(100)
    many, classes = np.repeat(probabilities, 8, axis=0), np.repeat(labels, 8)

    def width(groups):
        scores = evaluate(many, classes, groups, generator=np.random.default_rng(0))
        return scores["accuracy_high"] - scores["accuracy_low"]

    assert width(np.repeat(np.arange(100), 8)) > 2 * width(np.arange(800))


def test_a_class_without_images_has_no_recall_and_is_no_reason_to_fail():
    probabilities, labels = case()
    few = labels < 2
    scores = evaluate(probabilities[few], labels[few], np.arange(few.sum()), generator=np.random.default_rng(0))
    assert "recall_glioma" in scores
    assert "recall_pituitary" not in scores
    assert all(np.isfinite(value) for value in scores.values())


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="no image"):
        evaluate(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, int), generator=np.random.default_rng(0))


def test_each_baseline_finds_what_it_is_meant_to_find_and_no_more():
    generator = np.random.default_rng(0)
    images = generator.integers(100, 110, (160, 64, 64), dtype=np.uint8)
    labels = np.arange(160) % 4
    images[np.arange(160), 0, :] = (labels * 60)[:, None]  # the class is betrayed by the frame alone
    scores = baselines(images[:120], labels[:120], images[120:], labels[120:])
    assert scores["border_accuracy"] > 0.95
    assert scores["majority_accuracy"] == pytest.approx(0.25)
    assert scores["majority_macro_f1"] == pytest.approx(0.1)
    assert {name.removesuffix("_accuracy") for name in scores if name.endswith("_accuracy")} == {
        "majority", "border", "thumbnail", "nearest"
    }  # fmt: skip


def test_the_nearest_baseline_recognises_a_copy():
    images = np.random.default_rng(0).integers(0, 256, (40, 64, 64), dtype=np.uint8)
    labels = np.arange(40) % 4
    assert baselines(images, labels, images[::-1], labels[::-1])["nearest_accuracy"] == 1


def known() -> Calibration:
    """Limits at 90 %: 0.6 for glioma, 0.5 for the others; refers below 0.7."""
    limits = dict.fromkeys(LABELS, 0.5) | {"glioma": 0.4}
    return Calibration(temperature=1.0, conformal={"0.90": limits}, refer_below=0.7)


def test_the_coverage_of_a_hand_worked_case_counts_a_group_once():
    probabilities = np.array([[0.7, 0.3, 0, 0], [0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0.1, 0, 0.9]])
    labels, groups = np.array([0, 0, 0, 0, 3]), np.array([0, 1, 1, 1, 2])
    found = coverage(probabilities, labels, groups, known(), generator=np.random.default_rng(0))["0.90"]
    assert found["glioma"] == pytest.approx(1 / 2)  # one of two groups
    assert found["glioma_images"] == pytest.approx(1 / 4)
    assert (found["glioma_low"], found["glioma_high"]) == (0, 1)
    assert found["pituitary"] == 1
    assert "notumor" not in found
    assert (found["size"], found["single"], found["empty"]) == (1, 1, 0)


def test_the_measured_coverage_of_many_images_is_what_was_promised_and_lies_in_its_interval():
    generator = np.random.default_rng(0)

    def draw(n):
        labels = np.arange(n) % 4
        return generator.normal(size=(n, 4)) + 4 * np.eye(4)[labels], labels

    fitted = fit(*draw(4000))
    logits, labels = draw(8000)
    found = coverage(fitted.probabilities(logits), labels, np.arange(8000), fitted, generator=generator)
    assert found.keys() == set(LEVELS)
    for level in LEVELS:
        for label in LABELS:
            assert found[level][label] == pytest.approx(float(level), abs=0.02)
            assert found[level][f"{label}_low"] < found[level][label] < found[level][f"{label}_high"]
    assert found["0.90"]["size"] < found["0.95"]["size"]


def test_over_many_divisions_the_coverage_is_within_two_points_where_one_division_is_not():
    generator = np.random.default_rng(1)
    sizes = generator.integers(1, 6, 400)
    labels, groups = np.repeat(np.arange(400) % 4, sizes), np.repeat(np.arange(400), sizes)
    logits = np.repeat(generator.normal(size=(400, 4)), sizes, axis=0) + 2.5 * np.eye(4)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    options = {"share": 0.35, "generator": generator}
    one = resplit_coverage(probabilities, labels, groups, repeats=1, **options)
    many = resplit_coverage(probabilities, labels, groups, repeats=200, **options)
    off = [max(abs(each[level][label] - float(level)) for level in LEVELS for label in LABELS) for each in (one, many)]
    assert off[0] > 0.02 > off[1]


def test_a_class_of_one_group_has_no_coverage_over_divisions():
    labels = np.array([0, 0, 0, 1, 1])
    found = resplit_coverage(
        np.eye(4)[labels], labels, np.array([0, 1, 2, 3, 3]), share=0.5, repeats=2, generator=np.random.default_rng(0)
    )
    assert found["0.90"].keys() == {"glioma"}


def test_the_risk_coverage_curve_of_a_hand_worked_case():
    confidence = np.array([0.9, 0.6, 0.8, 0.7])
    probabilities = np.column_stack([confidence, 1 - confidence, np.zeros(4), np.zeros(4)])
    curve = risk_coverage(probabilities, np.array([0, 1, 0, 1]))  # the two least certain are wrong
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert curve.accuracy == pytest.approx([1, 1, 2 / 3, 1 / 2])
    assert (curve.at(0.5), curve.at(0.51), curve.at(1.0)) == (1.0, pytest.approx(2 / 3), 0.5)
    assert curve.area == pytest.approx(1 - (1 + 1 + 2 / 3 + 1 / 2) / 4)


def test_equally_certain_images_are_answered_in_no_particular_order():
    probabilities = np.tile([0.7, 0.1, 0.1, 0.1], (6, 1))
    labels = np.array([0, 0, 0, 1, 1, 1])
    assert risk_coverage(probabilities, labels).accuracy == pytest.approx(np.full(6, 0.5))
    assert risk_coverage(probabilities, labels[::-1]).accuracy == pytest.approx(np.full(6, 0.5))


def test_answering_only_what_is_certain_is_more_accurate_for_a_model_that_knows_what_it_knows():
    probabilities, labels = case(2000)
    curve = risk_coverage(probabilities, labels)
    assert curve.at(0.5) > curve.at(0.85) > curve.at(1.0) == pytest.approx((probabilities.argmax(1) == labels).mean())


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def test_each_plot_is_a_png_and_repeats_byte_for_byte():
    probabilities, labels = case()
    images = np.random.default_rng(0).integers(0, 256, (200, 16, 16), dtype=np.uint8)
    for draw in (
        lambda: confusion_plot(labels, labels[::-1], title="test"),
        lambda: reliability_plot(probabilities, labels, title="test"),
        lambda: risk_coverage_plot(probabilities, labels, refer_below=0.4, title="test"),
        lambda: error_grid(images, probabilities, labels, title="test"),
    ):
        first = draw()
        assert Image.open(io.BytesIO(first)).format == "PNG"
        assert first == draw()


def test_the_grid_shows_the_errors_and_nothing_else():
    labels = np.zeros(12, int)
    images = np.zeros((12, 16, 16), np.uint8)
    images[3] = 255  # the only bright image is the only error
    probabilities = np.tile([0.9, 0.1, 0, 0], (12, 1))
    probabilities[3] = [0.2, 0.8, 0, 0]
    grid = pixels(error_grid(images, probabilities, labels))
    black = (grid.sum(axis=2) == 0).mean()
    without = pixels(error_grid(images, np.tile([0.9, 0.1, 0, 0], (12, 1)), labels))
    assert black < 0.02  # only letters are
    assert grid.shape == without.shape
    assert (grid != without).any()


def test_a_model_without_an_error_has_an_empty_grid():
    labels = np.arange(4)
    grid = pixels(error_grid(np.full((4, 8, 8), 90, np.uint8), np.eye(4), labels))
    assert (grid == 255).mean() > 0.9  # paper and a line of words: none of the grey images
    assert (np.abs(grid.astype(int) - 90).max(axis=2) > 3).mean() > 0.99
