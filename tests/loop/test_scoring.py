import dataclasses
import json

import numpy as np
import pytest

from neuroloop.core.schemas import LABELS, Split
from neuroloop.data.dataset import Arrays
from neuroloop.imaging.canonical import canonicalize
from neuroloop.loop.scoring import metrics_of, plots_of, scores_of, scores_on
from neuroloop.model.bundle import Bundle
from neuroloop.model.stress import STRESSORS
from serving.running import SIZE, head, write_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    """A model that looks for the bright quarter of a head."""
    return Bundle.load(write_bundle(tmp_path_factory.mktemp("bundle")))


def part(name: str, heads: int, wrong: int = 0) -> Arrays:
    """`heads` of each class, in pairs of twins; the first `wrong` images carry the label of the next class."""
    generator = np.random.default_rng(len(name))
    images, labels = [], []
    for index in range(heads):
        for number, label in enumerate(LABELS):
            image = canonicalize(head(label), SIZE).astype(int)
            images.append(np.clip(image + generator.integers(-3, 4, image.shape), 0, 255))
            labels.append((number + (4 * index + number < wrong)) % 4)
    count = len(labels)
    groups = np.arange(count) // 8 * 4 + np.arange(count) % 4
    return Arrays(np.array(images, np.uint8), np.array(labels), groups, tuple(f"{name}/{i}" for i in range(count)))


def evaluated(bundle: Bundle, *, name="grouped", leaked=()) -> tuple[dict, Split, Arrays]:
    split = Split(version="v1", simulated=True, name=name, entries=(), leaked=leaked)
    train, calibration, test = part("train", 6), part("calibration", 6), part("test", 10, wrong=4)
    probabilities = bundle.predict(test.images).probabilities
    return scores_of(bundle, probabilities, split, train, calibration, test), split, test


def test_everything_that_is_measured_is_small_json_and_repeats(bundle):
    result, _, _ = evaluated(bundle)
    assert result == evaluated(bundle)[0]
    assert len(json.dumps(result)) < 6000  # with the champion's scores it goes from task to task
    assert "leaked" not in result


def test_the_scores_are_those_of_the_images_with_their_twins(bundle):
    result, _, test = evaluated(bundle)
    assert result["test"]["accuracy"] == pytest.approx(36 / 40)
    assert result["test"] == scores_on(bundle, test)
    assert result["test"]["accuracy_low"] < 0.85  # the four errors lie in four of twenty groups
    answered = bundle.gate.accepts(test.images) & ~bundle.predict(test.images).refer
    assert result["risk_coverage"]["answered"] == pytest.approx(answered.mean())
    assert result["risk_coverage"].keys() >= {"accuracy_at_85", "accuracy_at_90", "answered_accuracy"}
    assert result["stress"].keys() == {"clean", *STRESSORS}
    for level in ("0.90", "0.95"):
        assert {name.removesuffix("_resplit") for name in result["coverage"][level] if "resplit" in name} == set(LABELS)


def test_what_the_gate_refuses_of_the_test_part_is_told_and_not_counted_as_answered(bundle):
    split, test = Split(version="v1", simulated=True, entries=()), part("test", 10)
    assert bundle.gate.accepts(test.images).all()
    noise = np.random.default_rng(0).integers(0, 256, test.images[:8].shape).astype(np.uint8)
    refused = dataclasses.replace(test, images=np.concatenate([noise, test.images[8:]]))
    probabilities = bundle.predict(refused.images).probabilities
    result = scores_of(bundle, probabilities, split, part("train", 6), part("calibration", 6), refused)
    share = result["gate"]["test_refused"]
    assert share["share"] == pytest.approx(8 / 40)
    assert share["share_low"] < 8 / 40 < share["share_high"]
    assert result["risk_coverage"]["answered"] <= 32 / 40
    assert metrics_of(result)["grouped_test_refused_share"] == share["share"]


def test_every_metric_carries_the_name_of_its_split_and_part(bundle):
    metrics = metrics_of(evaluated(bundle)[0] | {"feedback": {"accuracy": 0.5}})
    assert {name.split("_")[0] for name in metrics} == {"grouped"}
    assert {name.split("_")[1] for name in metrics} == {"test", "feedback", "explanation"}
    assert metrics["grouped_feedback_accuracy"] == 0.5
    assert metrics["grouped_test_accuracy"] == pytest.approx(36 / 40)
    assert metrics.keys() >= {
        "grouped_test_macro_f1",
        "grouped_test_recall_glioma_low",
        "grouped_test_baseline_border_accuracy",
        "grouped_test_coverage_90_notumor",
        "grouped_test_coverage_95_notumor_low",
        "grouped_test_selective_accuracy_at_85",
        "grouped_test_stress_noise_drop",
        "grouped_test_stress_clean_accuracy",
    }
    assert all(np.isfinite(value) for value in metrics.values())


def test_a_legacy_run_tells_leaked_and_other_images_apart_beside_the_headline(bundle):
    leaked = tuple(f"test/{index}" for index in range(8, 38))  # 30 of 40, none of the wrong ones
    result, split, test = evaluated(bundle, name="legacy", leaked=leaked)
    assert result["leaked"]["notice"] == "legacy, 75.0 % leaked"
    assert result["leaked"]["images"] == 30
    metrics = metrics_of(result)
    assert metrics["legacy_test_leaked_accuracy"] == 1
    assert metrics["legacy_test_unleaked_accuracy"] == pytest.approx(6 / 10)
    assert metrics["legacy_test_leaked_share"] == pytest.approx(0.75)
    assert {"legacy_test_leaked_macro_f1", "legacy_test_unleaked_macro_f1"} <= metrics.keys()
    assert metrics["legacy_test_accuracy"] == pytest.approx(36 / 40)
    plots = plots_of(bundle, bundle.predict(test.images).probabilities, split, test)
    grouped = split.model_copy(update={"name": "grouped"})
    again = plots_of(bundle, bundle.predict(test.images).probabilities, grouped, test)
    assert all(plots[name] != again[name] for name in plots)  # each plot says on which split it was made


def test_the_plots_are_images_under_the_names_of_what_they_show(bundle):
    _, split, test = evaluated(bundle)
    plots = plots_of(bundle, bundle.predict(test.images).probabilities, split, test)
    assert plots.keys() == {"confusion.png", "reliability.png", "risk_coverage.png", "errors.png"}
    assert all(png.startswith(b"\x89PNG") for png in plots.values())
