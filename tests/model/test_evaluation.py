import io

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import f1_score, precision_score, recall_score

from neuroloop.core.schemas import LABELS
from neuroloop.model.evaluation import baselines, confusion_plot, evaluate


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


def test_the_confusion_plot_is_a_png_and_repeats_byte_for_byte():
    _, labels = case()
    first = confusion_plot(labels, labels[::-1], title="test")
    assert Image.open(io.BytesIO(first)).format == "PNG"
    assert first == confusion_plot(labels, labels[::-1], title="test")
