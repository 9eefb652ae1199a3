import numpy as np
import pytest

from neuroloop.imaging.canonical import canonicalize
from neuroloop.imaging.phantom import scan
from neuroloop.model import stress
from neuroloop.model.bundle import Bundle
from neuroloop.model.stress import LEVELS, SEVERITIES, STRESSORS, suite


@pytest.fixture(scope="module")
def heads() -> np.ndarray:
    """Eight canonical simulated heads, 64 px."""
    return np.stack([canonicalize(scan("notumor", index, size=96).pixels, 64) for index in range(8)])


def change(before: np.ndarray, after: np.ndarray) -> float:
    return float(np.abs(after.astype(float) - before).mean())


@pytest.mark.parametrize("name", STRESSORS)
def test_a_stressor_changes_every_image_more_when_strong_and_never_the_shape(heads, name):
    mild, strong = (STRESSORS[name](heads, severity, np.random.default_rng(0)) for severity in SEVERITIES[name])
    assert mild.dtype == np.uint8
    assert mild.shape == heads.shape
    assert all((after != before).any() for before, after in zip(heads, mild, strict=True))
    assert 0.5 < change(heads, mild) < change(heads, strong)


@pytest.mark.parametrize("name", STRESSORS)
def test_the_same_generator_gives_the_same_images_and_the_originals_stay_as_they_are(heads, name):
    kept = heads.copy()
    first, second = (STRESSORS[name](heads, SEVERITIES[name][1], np.random.default_rng(5)) for _ in "ab")
    assert (first == second).all()
    assert (heads == kept).all()


@pytest.mark.parametrize("name", ["noise", "blur", "bias", "contrast", "jpeg"])
def test_what_lies_around_the_head_stays_black(heads, name):
    outside = np.zeros((8, 64, 64), bool)
    outside[:, :2, :2] = outside[:, -2:, -2:] = True
    assert (heads[outside] == 0).all()
    assert (STRESSORS[name](heads, SEVERITIES[name][1], np.random.default_rng(0))[outside] == 0).all()


def test_the_noise_is_as_strong_as_it_says():
    grey = np.full((4, 64, 64), 128, np.uint8)
    noisy = stress.noise(grey, 0.05, np.random.default_rng(0)).astype(float)
    assert noisy.std() == pytest.approx(0.05 * 255, rel=0.05)
    dark = np.ones((4, 64, 64), np.uint8)  # Rician noise has no zero mean in the dark
    assert stress.noise(dark, 0.05, np.random.default_rng(0)).mean() == pytest.approx(
        0.05 * 255 * np.sqrt(np.pi / 2), rel=0.05
    )


def test_the_field_is_smooth_and_stays_within_its_bounds():
    grey = np.full((6, 64, 64), 100, np.uint8)
    field = stress.bias(grey, 0.2, np.random.default_rng(0)) / 100
    assert field.min(axis=(1, 2)) == pytest.approx(np.full(6, 0.8), abs=0.01)
    assert field.max(axis=(1, 2)) == pytest.approx(np.full(6, 1.2), abs=0.01)
    assert np.abs(np.diff(field, axis=1)).max() < 0.04


def test_a_blur_is_as_wide_as_it_says_at_any_image_size():
    square = np.full((160, 160), 200, np.uint8)  # a head of 190 mm and no air around it
    square[::2] = 150
    for size in (64, 128):
        head_pixels = int((canonicalize(square, size).max(axis=1) > 0).sum())
        line = np.full((1, size, size), 1, np.uint8)
        line[0, :, size // 2] = 255
        row = stress.blur(line, 12.0, np.random.default_rng(0))[0, size // 2].astype(float) - 1
        deviation = np.sqrt((row * (np.arange(size) - size // 2) ** 2).sum() / row.sum())
        assert 190 / head_pixels * deviation * np.sqrt(8 * np.log(2)) == pytest.approx(12, rel=0.05)


def test_turned_and_scaled_marks_are_where_they_should_be():
    image = np.zeros((30, 101, 101), np.uint8)
    image[:, 48:53, 80:85] = 255  # 32 pixels right of the centre

    def distance_and_angle(moved):
        rows, columns = np.nonzero(moved > 127)
        y, x = rows.mean() - 50, columns.mean() - 50
        return np.hypot(x, y), np.degrees(np.arctan2(y, x))

    turned = [distance_and_angle(each) for each in stress.rotation(image, 20, np.random.default_rng(0))]
    assert {round(angle / 5) * 5 for _, angle in turned} == {-20, 20}
    assert [distance for distance, _ in turned] == pytest.approx([32] * 30, abs=0.7)
    scaled = [distance_and_angle(each)[0] for each in stress.scale(image, 0.2, np.random.default_rng(0))]
    assert {round(distance * 5 / 32) / 5 for distance in scaled} == {0.8, 1.2}


def test_the_suite_finds_what_a_model_depends_on():
    """A rule that looks for the dark hole of a ring is lost in a blur, and indifferent to a turn."""
    generator = np.random.default_rng(0)
    labels = np.arange(80) % 4
    images = np.full((80, 64, 64), 120, np.uint8)
    for number, label in enumerate(labels):
        spots = generator.permutation(np.arange(8, 56, 4))[: 2 * label]
        images[number, 31, spots] = 0  # 0, 2, 4 or 6 dark points

    def predict(some):
        dark = (some[:, 4:-4, 4:-4] < 60).sum(axis=(1, 2))
        return np.eye(4)[np.clip((dark + 1) // 2, 0, 3)]

    result = suite(predict, images, labels, np.random.default_rng(0))
    assert result["clean"] == {"accuracy": 1.0, "macro_f1": 1.0, "images": 80.0}
    assert result["blur"]["drop"] > 0.5
    assert result["bias"]["drop"] == 0
    for name in STRESSORS:
        scores = result[name]
        assert scores["drop"] == pytest.approx(1 - scores["strong_macro_f1"])
        assert scores["accuracy_drop"] == pytest.approx(1 - scores["strong_accuracy"])
        assert {f"{level}_accuracy" for level in LEVELS} <= scores.keys()


def test_a_trained_model_loses_little_to_mild_stress_and_the_same_each_time(tiny_model):
    bundle = Bundle.load(tiny_model.folder)
    data = tiny_model.validation

    def predict(images):
        return bundle.predict(images).probabilities

    first, second = (suite(predict, data.images, data.labels, np.random.default_rng(1)) for _ in "ab")
    assert first == second
    assert first["clean"]["accuracy"] > 0.7
    assert np.mean([first[name]["mild_accuracy"] for name in STRESSORS]) > 0.6


def test_a_large_set_is_cut_to_unlike_images_with_each_class_in_its_share():
    labels = np.repeat([0, 1, 2], [400, 200, 200])
    groups = np.arange(800)
    groups[400:500] = 9999  # half of class 1 is one group
    seen = []

    def predict(images):
        seen.append(images)
        return np.eye(4)[images[:, 0, 0] % 4]

    images = np.zeros((800, 4, 4), np.uint8)
    images[:, 0, 0], images[:, 0, 1], images[:, 0, 2] = labels, np.arange(800) % 256, np.arange(800) // 256
    result = suite(predict, images, labels, np.random.default_rng(0), groups=groups, most=200)
    assert result["clean"]["images"] == 200
    chosen = seen[0][:, 0, 1].astype(int) + 256 * seen[0][:, 0, 2].astype(int)
    assert np.bincount(labels[chosen]).tolist() == [100, 50, 50]
    assert (groups[chosen] == 9999).sum() <= 1


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="no image"):
        suite(lambda images: images, np.zeros((0, 8, 8), np.uint8), np.zeros(0, int), np.random.default_rng(0))
