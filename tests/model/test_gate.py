import numpy as np
import pytest

from neuroloop.core.errors import InvalidBundle
from neuroloop.imaging import phantom
from neuroloop.imaging.canonical import canonicalize
from neuroloop.model import gate, gate_training, outliers
from neuroloop.model.bundle import Bundle
from neuroloop.model.gate import Gate, InputGate


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return Bundle.load(tiny_bundle)


def accepted(bundle: Bundle, images: np.ndarray) -> float:
    novelty = bundle.predict(images).novelty
    judged = [bundle.gate.judge(pixels, float(far)) for pixels, far in zip(images, novelty, strict=True)]
    return float(np.mean([each.accepted for each in judged]))


def test_brains_are_accepted(bundle, tiny_model):
    assert accepted(bundle, tiny_model.validation.images) >= 0.97


def test_brains_in_unfamiliar_contrasts_are_accepted(bundle, tiny_model):
    widened = outliers.widen(tiny_model.validation.images, np.random.default_rng(77))
    assert accepted(bundle, widened) >= 0.9


def test_simulated_heads_in_any_contrast_and_plane_are_mostly_accepted(bundle):
    assert accepted(bundle, outliers.render(40, 64, np.random.default_rng(78))) >= 0.8


@pytest.mark.parametrize("kind", ["uniform or gradient", "text", "photograph", "texture or micrograph"])
def test_what_is_no_brain_is_rejected(bundle, tiny_model, kind):
    images = outliers.make(kind, tiny_model.validation.images, 40, np.random.default_rng(99))
    assert accepted(bundle, images) <= 0.3  # this gate has seen 160 heads and 40 images a kind, for half a minute


def test_the_rates_of_every_kind_are_kept(bundle):
    facts = bundle.gate.facts
    assert facts.rejected.keys() == outliers.KINDS.keys()
    assert facts.measured == 10  # a quarter of the 40 that it learned of each, and so many at least
    assert np.mean(list(facts.rejected.values())) >= 0.5
    assert (facts.accepted_brains >= 0.99, facts.accepted_widened >= 0.97) == (True, True)  # as its origin says


def test_a_rejection_says_why_and_an_acceptance_needs_no_reason(bundle, tiny_model):
    photos = outliers.make("photograph", tiny_model.validation.images, 8, np.random.default_rng(5))
    rejected = min((bundle.gate.judge(photo, 0.5) for photo in photos), key=lambda judged: judged.score)
    assert rejected.reason.startswith("The image does not look like a brain MRI")
    assert rejected.score < rejected.threshold
    assert bundle.gate.judge(tiny_model.validation.images[0], 0.5).reason == ""


@pytest.mark.parametrize("theme", ["scene", "texture"])
def test_no_picture_is_both_learned_from_and_measured_with(theme):
    learned, aside = outliers._photos(theme, False), outliers._photos(theme, True)
    assert len(learned) >= 2 * len(aside) >= 4
    assert not {photo.tobytes() for photo in learned} & {photo.tobytes() for photo in aside}
    brains = np.zeros((1, 64, 64), np.uint8)
    kind = {"scene": "photograph", "texture": "texture or micrograph"}[theme]
    made = [outliers.make(kind, brains, 8, np.random.default_rng(0), aside=each) for each in (False, True)]
    assert not np.array_equal(*made)


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_a_uniform_image_is_rejected_for_its_lack_of_contrast(bundle, grey):
    pixels = canonicalize(np.full((100, 120), grey, np.uint8), 64)
    result = bundle.gate.judge(pixels, 0.5)
    assert not result.accepted
    assert "no contrast" in result.reason


def test_scans_like_those_of_the_training_are_familiar_and_what_is_far_is_left_to_a_reader(bundle, tiny_model):
    scans = tiny_model.validation.images
    assert (bundle.predict(scans).novelty <= 1).mean() >= 0.98
    facts = bundle.gate.facts
    assert 0 < facts.doubtful < 1
    assert facts.novel_widened > 0.2  # this classifier has seen one contrast
    assert facts.missed_widened < 0.2
    coarse = np.random.default_rng(0).integers(0, 2, (20, 8, 8)).repeat(8, axis=1).repeat(8, axis=2)
    far = bundle.predict((255 * coarse).astype(np.uint8))
    assert (far.novelty > 1).all()
    assert far.refer.all()


def test_a_gate_survives_its_files_unchanged(bundle, tiny_model):
    facts, network = bundle.fitted_gate
    again = InputGate(Gate.model_validate_json(facts.model_dump_json()), network)
    images = tiny_model.validation.images[:5]
    np.testing.assert_array_equal(again.scores(images), bundle.gate.scores(images))
    features = bundle.predict(images).features
    np.testing.assert_array_equal(again.facts.novelty(features), bundle.gate.facts.novelty(features))
    assert "validation brains" in again.facts.threshold_origin
    assert "validation brains" in again.facts.far_origin


def test_a_kept_network_gets_the_threshold_and_the_features_of_another_classifier(bundle, tiny_model):
    kept = gate_training.fit_gate(
        lambda images: (np.zeros((len(images), 4)), images.reshape(len(images), -1)[:, ::256].astype(np.float32)),
        (tiny_model.train.images, tiny_model.train.labels),
        (tiny_model.validation.images, tiny_model.validation.labels),
        np.random.default_rng(1),
        onnx=bundle.fitted_gate.onnx,
        per_kind=10,
    )
    assert kept.onnx == bundle.fitted_gate.onnx
    assert len(kept.facts.centre) == len(kept.facts.doubt) == 16
    assert kept.facts.offset == pytest.approx(bundle.gate.facts.offset, abs=3)


def test_features_of_another_network_are_refused(bundle):
    with pytest.raises(ValueError, match="features"):
        bundle.gate.facts.novelty(np.zeros((1, 7), np.float32))


def test_a_network_that_is_no_gate_is_refused(bundle, tiny_model):
    for file, words in ((b"no network", "cannot be loaded"), (tiny_model.onnx, "other inputs or outputs")):
        with pytest.raises(InvalidBundle, match=words):
            InputGate(bundle.gate.facts, file)


def test_a_gate_sees_images_of_any_size_at_its_own():
    generator = np.random.default_rng(0)
    large = generator.integers(0, 256, (2, 128, 128)).astype(np.uint8)
    expected = np.rint(large.reshape(2, 64, 2, 64, 2).mean(axis=(2, 4)) + 1e-6)
    assert np.abs(gate.shrink(large) - expected).max() == 0
    assert gate.shrink(large[:, :96, :96]).shape == gate.shrink(large[:, :64, :64]).shape == (2, 64, 64)


def test_varied_images_keep_their_size_and_range_and_repeat_with_the_seed(tiny_model):
    first, second = (gate_training.vary(tiny_model.train.images[:20], np.random.default_rng(3)) for _ in "ab")
    np.testing.assert_array_equal(first, second)
    assert first.shape == (20, 64, 64)
    assert (first.dtype, first.min() >= 0, first.max() <= 255) == (np.float32, True, True)
    assert np.abs(first - tiny_model.train.images[:20]).mean() > 5


@pytest.mark.parametrize("kind", outliers.KINDS)
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


def test_a_gate_learns_longer_beside_a_longer_training_and_shortly_beside_a_trial():
    assert gate_training.steps_for(30) == 12_000
    assert gate_training.steps_for(2) == 1500
    assert gate_training.steps_for(1440, epochs=1) == 200
    assert gate_training.steps_for(8, epochs=14) == 1400


def test_a_kind_that_is_hard_to_tell_is_shown_more_often_and_none_is_left_out():
    generator = np.random.default_rng(0)
    easy, hard = np.zeros((5, 8, 8), np.uint8), np.ones((5, 8, 8), np.uint8)
    side = gate_training._Side([easy, hard])
    for _ in range(60):
        drawn = side.draw(32, generator)
        side.learn(np.where(drawn[:, 0, 0] == 1, 1.5, 0.05).astype(np.float32))
    share = np.mean([side.draw(32, generator)[:, 0, 0].mean() for _ in range(20)])
    assert 0.65 < share < 0.8


def test_functional_mri_of_a_brain_is_coarse_and_loses_signal_only_near_the_outline():
    brain = phantom.scan("notumor", 1, size=128).pixels / 255
    mask = brain > 0.02
    made = np.stack([outliers._echo_planar(brain, mask, np.random.default_rng(seed)) for seed in range(8)])
    assert np.abs(np.diff(made, axis=2)).mean() < 0.8 * np.abs(np.diff(brain, axis=1)).mean()
    assert made.max() <= brain.max()
    middle = made[:, 56:72, 56:72].mean(axis=(1, 2))
    assert (middle > 0.8 * brain[56:72, 56:72].mean()).all()


def test_too_few_brains_are_refused(tiny_model):
    few = tiny_model.train.images[:5], tiny_model.train.labels[:5]
    with pytest.raises(ValueError, match="at least 10"):
        gate_training.fit_gate(
            lambda images: (np.zeros((len(images), 4), np.float32),) * 2, few, few, np.random.default_rng(0), steps=1
        )
