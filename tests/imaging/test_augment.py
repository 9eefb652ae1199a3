import numpy as np
import pytest

from neuroloop.imaging.augment import AugmentParams, augment, augment_batch

STILL = AugmentParams(rotation_degrees=0, shift=0, shear_degrees=0, zoom=0, flip=False)


def images(n=8, size=64):
    ramp = np.linspace(0, 255, size)
    wave = np.sin(np.arange(size) / 5)[:, None] * 40
    return np.stack([np.clip(ramp + wave + 5 * i, 0, 255).astype(np.uint8) for i in range(n)])


def test_without_ranges_the_image_stays_as_it_is():
    image = images(1)[0]
    assert np.array_equal(augment(image, np.random.default_rng(0), STILL), image)


def test_the_same_generator_state_gives_the_same_copies_and_another_gives_others():
    batch = images()
    first = augment_batch(batch, np.random.default_rng(5))
    assert np.array_equal(first, augment_batch(batch, np.random.default_rng(5)))
    assert not np.array_equal(first, augment_batch(batch, np.random.default_rng(6)))


def test_a_batch_is_its_images_augmented_in_order():
    batch, generator = images(), np.random.default_rng(2)
    one_by_one = np.stack([augment(image, generator) for image in batch])
    assert np.array_equal(augment_batch(batch, np.random.default_rng(2)), one_by_one)


def test_the_input_is_left_alone_and_the_type_kept():
    batch = images()
    before = batch.copy()
    out = augment_batch(batch, np.random.default_rng(0))
    assert np.array_equal(batch, before)
    assert out.dtype == np.uint8
    assert out.shape == batch.shape


def test_flips_come_with_even_odds_and_mirror_exactly():
    image, generator = images(1)[0], np.random.default_rng(0)
    only_flip = AugmentParams(rotation_degrees=0, shift=0, shear_degrees=0, zoom=0, flip=True)
    flipped = 0
    for _ in range(400):
        out = augment(image, generator, only_flip)
        mirrored = np.array_equal(out, image[:, ::-1])
        assert mirrored or np.array_equal(out, image)
        flipped += mirrored
    assert 150 < flipped < 250


def test_what_comes_from_outside_is_the_nearest_edge_not_black():
    white = np.full((64, 64), 255, dtype=np.uint8)
    wild = AugmentParams(rotation_degrees=45, shift=0.4, shear_degrees=30, zoom=0.4)
    assert augment_batch(np.stack([white] * 20), np.random.default_rng(0), wild).min() == 255


@pytest.mark.parametrize(
    ("params", "furthest"),
    [
        (AugmentParams(rotation_degrees=0, shift=0.1, shear_degrees=0, zoom=0, flip=False), 0.1),
        (AugmentParams(rotation_degrees=10, shift=0, shear_degrees=0, zoom=0, flip=False), 0.0),
    ],
)
def test_the_centre_moves_by_the_shift_and_by_nothing_else(params, furthest):
    size = 101
    spot = np.zeros((size, size), dtype=np.uint8)
    spot[48:53, 48:53] = 255
    generator, moves = np.random.default_rng(0), []
    for _ in range(60):
        ys, xs = np.nonzero(augment(spot, generator, params) > 100)
        moves.append(max(abs(ys.mean() - 50), abs(xs.mean() - 50)))
    assert max(moves) <= furthest * size + 0.6
    assert max(moves) >= furthest * size * 0.7


def test_rotation_and_zoom_stay_within_their_ranges():
    size = 101
    bar = np.zeros((size, size), dtype=np.uint8)
    bar[20:81, 49:52] = 255
    params = AugmentParams(rotation_degrees=10, shift=0, shear_degrees=0, zoom=0.1, flip=False)
    generator, angles, lengths = np.random.default_rng(0), [], []
    for _ in range(80):
        ys, xs = np.nonzero(augment(bar, generator, params) > 100)
        angles.append(abs(np.degrees(np.arctan(np.polyfit(ys, xs, 1)[0]))))
        lengths.append(ys.max() - ys.min() + 1)
    assert 6 < max(angles) < 12.5
    assert 52 <= min(lengths) < 58
    assert 64 < max(lengths) <= 69


def drawn(count=200, size=101, **ranges):
    """The maps of copies, read from pictures of the coordinates: the source of x and y as (count, 2, 2), and the shift.

    `ranges` names the parameters that are not still.
    """
    params = AugmentParams(**(vars(STILL) | ranges))
    across = np.tile(2 * np.arange(size, dtype=np.uint8), (size, 1))
    x, y = (
        augment_batch(np.ascontiguousarray([picture] * count), np.random.default_rng(0), params).astype(float) / 2
        for picture in (across, across.T)
    )
    middle, far = size // 2, 30
    matrix = np.empty((count, 2, 2))
    for row, source in enumerate((x, y)):
        matrix[:, row, 0] = source[:, middle, middle + far] - source[:, middle, middle - far]
        matrix[:, row, 1] = source[:, middle + far, middle] - source[:, middle - far, middle]
    centre = np.stack([x[:, middle, middle], y[:, middle, middle]], axis=1)
    return matrix / (2 * far), (middle - centre) / size


def assert_fills(values, low, high, slack=0.02):
    """All of the range, evenly on both sides of its middle, and no more."""
    assert low - slack <= values.min() <= low + 0.1 * (high - low)
    assert high - 0.1 * (high - low) <= values.max() <= high + slack
    assert 0.35 < (values > np.median([low, high])).mean() < 0.65


def test_rotation_goes_both_ways():
    matrix, shift = drawn(rotation_degrees=10)
    assert_fills(np.degrees(np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0])), -10, 10, slack=0.7)
    np.testing.assert_allclose(np.linalg.det(matrix), 1, atol=0.03)
    assert np.abs(shift).max() < 0.01


def test_shear_slants_both_ways_and_changes_nothing_else():
    matrix, shift = drawn(shear_degrees=15)
    assert_fills(matrix[:, 0, 1], -np.tan(np.radians(15)), np.tan(np.radians(15)))
    assert np.abs(matrix[:, 1, 0]).max() < 0.02
    np.testing.assert_allclose(matrix[:, [0, 1], [0, 1]], 1, atol=0.02)
    assert np.abs(shift).max() < 0.01


def test_zoom_goes_in_and_out_on_each_axis_on_its_own():
    matrix, shift = drawn(zoom=0.2)
    scales = 1 / matrix[:, [0, 1], [0, 1]]
    for axis in range(2):
        assert_fills(scales[:, axis], 0.8, 1.2)
    assert abs(np.corrcoef(scales.T)[0, 1]) < 0.3
    assert np.abs(matrix[:, [0, 1], [1, 0]]).max() < 0.02
    assert np.abs(shift).max() < 0.01


def test_shifts_go_both_ways_on_each_axis_on_its_own():
    matrix, shift = drawn(shift=0.1)
    for axis in range(2):
        assert_fills(shift[:, axis], -0.1, 0.1, slack=0.01)
    assert abs(np.corrcoef(shift.T)[0, 1]) < 0.3
    np.testing.assert_allclose(matrix, np.tile(np.eye(2), (len(matrix), 1, 1)), atol=0.02)
