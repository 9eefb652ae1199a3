import numpy as np
import pytest

from neuroloop.imaging import anatomy, phantom


@pytest.mark.parametrize("name", anatomy.BODY_PARTS)
def test_a_body_part_is_drawn_anew_each_time_and_the_same_for_the_same_generator(name):
    draw = anatomy.BODY_PARTS[name]
    generator = np.random.default_rng(3)
    first, second = draw(generator), draw(generator)
    assert first.dtype == np.uint8
    assert first.shape == (128, 128)
    assert first.std() > 10
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, draw(np.random.default_rng(3)))


def test_a_head_ct_has_a_ring_of_bone_brighter_than_the_brain_within():
    head = phantom.scan("notumor", 1, size=128).pixels
    made = anatomy.head_ct(head, np.random.default_rng(0)).astype(float)
    middle, brightest = made[48:80, 48:80].mean(), np.percentile(made, 99)
    assert brightest > middle + 60
    inside = np.argwhere(made > 0.9 * brightest)
    assert np.hypot(*(inside - 63.5).T).min() > 15  # nothing of the ring lies in the middle


def test_a_ct_of_the_simulated_head_has_bone_brighter_than_all_else_and_repeats_with_its_generator():
    generator = np.random.default_rng(3)
    heads = np.stack([phantom.ct_head(generator, size=96) for _ in range(8)]).astype(float)
    for head in heads:
        inside = head[head > 20]
        assert np.percentile(head, 99.5) > 1.25 * np.median(inside)
    np.testing.assert_array_equal(heads[0], phantom.ct_head(np.random.default_rng(3), size=96))


def test_varied_heads_come_with_and_without_a_skull_and_in_bright_and_dark_contrasts():
    generator = np.random.default_rng(5)
    heads = np.stack([phantom.varied_head(generator, size=96) for _ in range(24)])
    assert heads.dtype == np.uint8
    filled = (heads > 25).mean(axis=(1, 2))
    assert filled.min() < 0.3 < 0.45 < filled.max()
    middles = heads[:, 38:58, 38:58].mean(axis=(1, 2))
    assert middles.min() < 80 < 150 < middles.max()
    np.testing.assert_array_equal(heads[0], phantom.varied_head(np.random.default_rng(5), size=96))
