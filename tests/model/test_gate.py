import numpy as np
import pytest

from neuroloop.imaging.canonical import canonicalize
from neuroloop.model import gate, outliers
from neuroloop.model.bundle import Bundle
from neuroloop.model.gate import Gate


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return Bundle.load(tiny_bundle)


def accepted(bundle: Bundle, images: np.ndarray) -> float:
    features = bundle.predict(images).features
    return float(np.mean([bundle.gate.judge(f, pixels).accepted for f, pixels in zip(features, images, strict=True)]))


def test_brains_are_accepted(bundle, tiny_model):
    assert accepted(bundle, tiny_model.validation.images) >= 0.97


def test_brains_in_unfamiliar_contrasts_are_mostly_accepted(bundle, tiny_model):
    widened = outliers.widen(tiny_model.validation.images, np.random.default_rng(77))
    assert accepted(bundle, widened) >= 0.85


@pytest.mark.parametrize("kind", ["uniform or gradient", "noise", "text", "photograph"])
def test_what_is_no_brain_is_rejected(bundle, tiny_model, kind):
    images = outliers.make(kind, tiny_model.validation.images, 40, np.random.default_rng(99))
    assert accepted(bundle, images) <= 0.1  # this gate has seen 40 heads and 60 images a kind


def test_kinds_the_gate_has_never_seen_are_mostly_rejected_and_the_rates_are_kept(bundle):
    unseen = bundle.gate.rejected_unseen
    assert bundle.gate.rejected.keys() == outliers.KINDS.keys()
    assert unseen.keys() == outliers.KINDS.keys() | outliers.HELD_OUT_KINDS.keys()
    assert min(unseen["photograph"], unseen["text"], unseen["noise"]) >= 0.8
    assert np.mean([unseen[kind] for kind in outliers.KINDS]) >= 0.75
    assert np.mean([unseen[kind] for kind in outliers.HELD_OUT_KINDS]) >= 0.5  # far below what is wanted


def test_a_rejection_says_why_and_an_acceptance_needs_no_reason(bundle, tiny_model):
    photo = outliers.make("photograph", tiny_model.validation.images, 1, np.random.default_rng(5))
    rejected = bundle.gate.judge(bundle.predict(photo).features[0], photo[0])
    assert rejected.reason.startswith("The image does not look like a brain MRI")
    assert rejected.score < rejected.threshold
    brain = tiny_model.validation.images[:1]
    assert bundle.gate.judge(bundle.predict(brain).features[0], brain[0]).reason == ""


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_a_uniform_image_is_rejected_for_its_lack_of_contrast(bundle, grey):
    pixels = canonicalize(np.full((100, 120), grey, np.uint8), 64)
    result = bundle.gate.judge(bundle.predict(pixels[None]).features[0], pixels)
    assert not result.accepted
    assert "no contrast" in result.reason


def test_a_gate_survives_json_unchanged(bundle, tiny_model):
    again = Gate.model_validate_json(bundle.gate.model_dump_json())
    images = tiny_model.validation.images[:5]
    features = bundle.predict(images).features
    np.testing.assert_array_equal(again.scores(features, images), bundle.gate.scores(features, images))
    assert "validation brains" in again.threshold_origin


def test_features_of_another_network_are_refused(bundle):
    with pytest.raises(ValueError, match="features"):
        bundle.gate.scores(np.zeros((1, 7), np.float32), np.zeros((1, 64, 64), np.uint8))


@pytest.mark.parametrize("kind", [*outliers.KINDS, *outliers.HELD_OUT_KINDS])
def test_made_images_are_canonical_and_repeat_with_the_seed(tiny_model, kind):
    first, second = (outliers.make(kind, tiny_model.train.images, 3, np.random.default_rng(1)) for _ in "ab")
    assert first.shape == (3, 64, 64)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, second)


def test_the_measures_are_finite_for_any_image_and_one_for_each_name():
    generator = np.random.default_rng(0)
    images = np.stack([np.zeros((64, 64)), np.full((64, 64), 255), generator.integers(0, 256, (64, 64))])
    measures = gate.measure(images.astype(np.uint8))
    assert measures.shape == (3, len(gate._MEASURES))
    assert np.isfinite(measures).all()


def test_too_few_brains_are_refused(tiny_model):
    few = tiny_model.train.images[:5]
    with pytest.raises(ValueError, match="at least 10"):
        gate.fit_gate(lambda images: np.zeros((len(images), 4), np.float32), few, few, np.random.default_rng(0))
