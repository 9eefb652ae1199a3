import numpy as np
import pytest

from neuroloop.data import similarity
from neuroloop.data.similarity import SAME, SIMILAR, across, connect, relation, thumbnail, twins

from .drawn import picture


def every_way(image):
    """The eight symmetries of a square image."""
    return [np.rot90(each, quarter) for each in (image, image[:, ::-1]) for quarter in range(4)]


def compared_with_every_other(thumbnails):
    """The best correlation over the symmetries of all pairs, the long way."""
    images = thumbnails.reshape(-1, 32, 32)
    turned = [np.stack([every_way(image)[way] for image in images]).reshape(len(images), -1) for way in range(8)]
    return np.max([each @ thumbnails.T for each in turned], axis=0)


def crowd(count, seed=0):
    """Thumbnails in families: blends of a few pictures, flipped and turned at random."""
    generator = np.random.default_rng(seed)
    pictures = np.stack([picture(number, 32).astype(float) for number in range(max(count // 12, 2))])
    found = []
    for _ in range(count):
        one, other = pictures[generator.integers(len(pictures), size=2)]
        mixed = one + generator.choice([0.0, 0.05, 0.3, 0.5]) * other + generator.normal(0, 2, one.shape)
        found.append(thumbnail(np.clip(every_way(mixed)[generator.integers(8)], 0, 255).astype(np.uint8)))
    return np.stack(found)


def test_a_thumbnail_has_zero_mean_and_unit_norm_and_a_uniform_image_has_none():
    values = thumbnail(picture(1, 200))
    assert values.shape == (1024,)
    assert values.dtype == np.float32
    assert abs(values.mean()) < 1e-6
    assert np.linalg.norm(values) == pytest.approx(1, abs=1e-5)
    assert not thumbnail(np.full((40, 50), 7, np.uint8)).any()


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("flip", [False, True])
def test_a_twin_is_found_however_it_is_flipped_or_turned(turn, flip):
    turned = np.rot90(picture(1), turn)
    turned = np.ascontiguousarray(turned[:, ::-1] if flip else turned)
    a = np.stack([thumbnail(picture(5)), thumbnail(picture(1))])
    b = np.stack([thumbnail(picture(n)) for n in (7, 8)] + [thumbnail(turned)])
    assert twins(a, b) == [(1, 2)]


def test_unlike_images_are_no_twins():
    thumbnails = np.stack([thumbnail(picture(n)) for n in range(20)])
    assert twins(thumbnails, thumbnails) == [(n, n) for n in range(20)]


def test_a_signature_is_the_same_for_all_flips_and_turns_and_never_further_apart_than_the_images():
    thumbnails = crowd(150)
    axes = similarity._Axes.of(similarity._pieces(thumbnails))
    signatures = axes.signatures(similarity._pieces(thumbnails))
    for image, signature in zip(thumbnails[:20], signatures, strict=False):
        ways = np.stack([way.ravel() for way in every_way(image.reshape(32, 32))])
        np.testing.assert_allclose(axes.signatures(similarity._pieces(ways)), np.tile(signature, (8, 1)), atol=1e-5)
    apart = ((signatures[:, None] - signatures[None]) ** 2).sum(axis=2)
    assert (apart <= 2 - 2 * compared_with_every_other(thumbnails) + 1e-4).all()


def test_groups_and_twins_are_those_of_comparing_every_image_with_every_other():
    thumbnails = crowd(800)
    kinds = np.random.default_rng(1).integers(3, size=len(thumbnails)).tolist()
    roots, same, scores = connect(thumbnails, kinds)

    correlation = compared_with_every_other(thumbnails)
    names = np.arange(len(thumbnails))
    for i, j in np.argwhere(np.triu(correlation >= SIMILAR, 1)):
        names[names == names[j]] = names[i]
    lowest = {name: int(np.flatnonzero(names == name)[0]) for name in set(names.tolist())}
    assert roots.tolist() == [lowest[name] for name in names.tolist()]
    assert 30 < len(lowest) < 600
    differ = np.array(kinds)[:, None] != np.array(kinds)[None]
    assert same == [tuple(pair) for pair in np.argwhere(np.triu((correlation >= SAME) & differ, 1)).tolist()]
    np.testing.assert_allclose(scores, [correlation[i, j] for i, j in same], atol=1e-5)
    assert across(thumbnails, kinds) == [
        tuple(pair) for pair in np.argwhere(np.triu((correlation >= SIMILAR) & differ, 1)).tolist()
    ]


def test_nothing_and_one_image_can_be_grouped():
    none = np.zeros((0, 1024), np.float32)
    assert connect(none, [])[1] == []
    assert twins(none, none) == []
    assert across(none, []) == []
    assert connect(thumbnail(picture(1))[None], ["a"])[0].tolist() == [0]


def test_images_that_are_all_the_same_are_one_group():
    thumbnails = np.tile(thumbnail(picture(3)), (1500, 1))
    roots, same, _ = connect(thumbnails, ["a"] * 1500)
    assert set(roots.tolist()) == {0}
    assert same == []


def test_of_thousands_of_copies_each_is_told_of_a_twin_in_the_other_part_and_class_but_not_of_all():
    copies = thumbnail(picture(3)) + np.random.default_rng(0).normal(0, 5e-4, (4000, 1024)).astype(np.float32)
    copies -= copies.mean(axis=1, keepdims=True)
    copies /= np.linalg.norm(copies, axis=1, keepdims=True)
    numbers = np.arange(4000)
    parts, labels = numbers % 2, np.select([numbers < 20, numbers < 23], [1, 2], 0)
    roots, same, scores = connect(copies, labels.tolist(), parts.tolist())
    assert set(roots.tolist()) == {0}
    assert scores.min() >= SAME
    pairs = np.array(same)
    for kind in (parts, labels):
        apart = pairs[kind[pairs[:, 0]] != kind[pairs[:, 1]]]
        assert set(apart.ravel().tolist()) == set(range(4000))
    assert len(pairs) < 100 * 4000  # of 4 million


def test_of_two_twins_in_another_part_both_are_told_with_their_correlations():
    image = picture(3).astype(float)
    close, closer = (np.clip(image + weight * picture(4), 0, 255).astype(np.uint8) for weight in (0.08, 0.02))
    thumbnails = np.stack([thumbnail(each) for each in (close, picture(3), closer)])
    _, same, scores = connect(thumbnails, ["train", "test", "train"])
    assert same == [(0, 1), (1, 2)]
    assert SAME <= scores[0] < scores[1]


@pytest.mark.parametrize("quarter", range(4))
@pytest.mark.parametrize("mirrored", [False, True])
def test_the_relation_of_twins_tells_how_one_becomes_the_other(quarter, mirrored):
    image = picture(2)
    twin = image[:, ::-1] if mirrored else image
    correlation, *way = relation(thumbnail(np.rot90(twin, quarter)), thumbnail(image))
    assert correlation == pytest.approx(1, abs=1e-5)
    assert way == [quarter, mirrored]


def test_a_picture_that_mirrors_itself_counts_as_the_same_and_not_as_mirrored():
    image = picture(4)
    image[:, 32:] = image[:, 31::-1]
    assert relation(thumbnail(image), thumbnail(image))[1:] == (0, False)
