import numpy as np
import pytest

from neuroloop.data import shortcuts
from neuroloop.data.shortcuts import Shortcuts, describe, measure


def traits_of(frames, sizes=None):
    histograms = [np.bincount(frame.ravel() >> 3, minlength=32) for frame in frames]
    return describe(np.stack(frames), histograms, sizes or [(1000, 224, 224)] * len(frames))


def framed(label, generator):
    """Noise whose class stands in nothing but its edge."""
    image = generator.integers(60, 200, (128, 128)).astype(np.uint8)
    image[:8] = 40 * label
    return image


def thumbnails_of(frames):
    rows = np.stack(frames).reshape(len(frames), 32, 4, 32, 4).mean(axis=(2, 4)).reshape(len(frames), -1)
    rows -= rows.mean(axis=1, keepdims=True)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def noise(count, generator):
    """Traits and thumbnails that say nothing."""
    traits = {
        name: generator.normal(size=(count, 4)).astype(np.float32)
        for name in shortcuts.TRAITS.keys() - {"majority", "nearest"}
    }
    return dict(sorted(traits.items())), generator.normal(size=(count, 1024)).astype(np.float32)


@pytest.fixture(scope="module")
def betrayed():
    """200 images in two classes that differ at the edge, and in the size of every file."""
    generator = np.random.default_rng(0)
    labels = generator.integers(2, size=200)
    frames = [framed(label, generator) for label in labels]
    sizes = [(5000 + 3000 * int(label), 224, 224) for label in labels]
    return frames, sizes, [("a", "b")[label] for label in labels]


def test_traits_have_their_columns_and_say_what_they_are_called():
    white = np.zeros((128, 128), np.uint8)
    white[32:64, 16:] = 255
    traits = traits_of([white], [(1234, 300, 400)])
    assert {name: columns.shape for name, columns in traits.items()} == {
        "file_size": (1, 1),
        "image_size": (1, 2),
        "border": (1, 16),
        "margins": (1, 4),
        "histogram": (1, 32),
        "thumbnail": (1, 64),
    }
    assert set(traits) | {"majority", "nearest"} == set(shortcuts.TRAITS)
    assert traits["file_size"].tolist() == [[1234]]
    assert traits["image_size"].tolist() == [[300, 400]]
    assert traits["margins"].tolist() == [[32, 64, 16, 0]]
    assert traits["histogram"][0, 31] == pytest.approx(32 * 112 / 128**2)
    assert traits["thumbnail"].reshape(8, 8)[2].tolist() == [0] + [255] * 7


@pytest.mark.parametrize("row", [slice(8), slice(-8, None)])
@pytest.mark.parametrize("column", [slice(8), slice(-8, None)])
def test_each_corner_stands_in_the_border_by_its_own_mean_and_deviation(row, column):
    images = np.zeros((2, 128, 128), np.uint8)
    images[1, row, column] = 200
    black, marked = traits_of(list(images))["border"]
    assert not black.any()
    corners = marked[8:].reshape(4, 2)  # after those of the four edges
    assert sorted(corners[:, 0].tolist()) == [0, 0, 0, 200]
    assert not corners[:, 1].any()
    assert np.count_nonzero(marked[:8:2]) == 2  # the two edges that meet there


def test_a_trait_that_betrays_the_class_is_found_and_one_that_does_not_is_not(betrayed):
    frames, sizes, labels = betrayed
    split = np.arange(150), np.arange(150, 200)
    measured = measure(
        traits_of(frames, sizes),
        thumbnails_of(frames),
        labels,
        {"grouped": split},
        generator=np.random.default_rng(0),
    )
    assert measured.grouped["border"] == measured.grouped["file_size"] == 1
    assert measured.grouped["image_size"] == measured.grouped["majority"] < 0.7
    assert measured.source == {}
    assert measured.images == {"grouped": (150, 50)}
    assert {"border", "file_size"} <= set(measured.tempting())
    assert not {"image_size", "majority"} & set(measured.tempting())


def test_a_split_with_nothing_to_test_on_and_a_single_class_are_left_out(betrayed):
    frames, sizes, labels = betrayed
    traits, thumbnails = traits_of(frames, sizes), thumbnails_of(frames)
    nothing = {"source": (np.arange(200), np.arange(0)), "grouped": (np.arange(100), np.arange(100, 200))}
    measured = measure(traits, thumbnails, labels, nothing, generator=np.random.default_rng(0))
    assert measured.source == {}
    assert set(measured.grouped) == set(shortcuts.TRAITS)
    alone = measure(traits, thumbnails, ["a"] * 200, nothing, generator=np.random.default_rng(0))
    assert alone.source == alone.grouped == {}
    assert alone.tempting() == []


def test_large_sets_are_sampled_and_say_so(betrayed):
    frames, sizes, labels = betrayed
    measured = measure(
        traits_of(frames, sizes),
        thumbnails_of(frames),
        labels,
        {"grouped": (np.arange(150), np.arange(150, 200))},
        generator=np.random.default_rng(0),
        most=(80, 60),
    )
    assert measured.sampled
    assert measured.images == {"grouped": (80, 50)}


def test_the_most_telling_shortcut_comes_first_on_whichever_split():
    measured = Shortcuts(
        source={"majority": 0.3, "border": 0.5, "histogram": 0.35, "nearest": 0.99},
        grouped={"majority": 0.3, "border": 0.9, "histogram": 0.35, "nearest": 0.4},
        images={"source": (800, 200), "grouped": (800, 200)},
        sampled=False,
    )
    assert measured.tempting() == ["nearest", "border"]
    assert measured.telling() == {"nearest": "source", "border": "grouped"}


def test_what_chance_makes_of_few_images_is_no_shortcut_and_the_same_on_many_is():
    def tempting(tested: int) -> list[str]:
        scores = {"majority": 0.25, "border": 0.375}
        return Shortcuts(source={}, grouped=scores, images={"grouped": (4 * tested, tested)}, sampled=False).tempting()

    assert tempting(16) == tempting(80) == []
    assert tempting(96) == tempting(4000) == ["border"]


def test_noise_is_seldom_a_shortcut_however_small_the_set():
    generator, alarms = np.random.default_rng(0), 0
    for _ in range(8):
        labels = generator.choice(list("abcd"), 60).tolist()
        split = np.arange(45), np.arange(45, 60)
        alarms += bool(measure(*noise(60, generator), labels, {"grouped": split}, generator=generator).tempting())
    assert alarms == 0


def test_a_guess_is_no_shortcut_where_the_classes_are_mixed_otherwise_in_the_part_tested_on():
    generator = np.random.default_rng(0)
    labels = ["a"] * 160 + ["b"] * 140 + ["a"] * 20 + ["b"] * 180
    split = np.arange(300), np.arange(300, 500)
    measured = measure(*noise(500, generator), labels, {"source": split}, generator=generator)
    assert measured.source["majority"] == 0.9
    assert measured.source["border"] > 0.25  # far above the 0.1 that the class most trained on would give
    assert measured.tempting() == []


def test_the_nearest_image_gives_its_class():
    thumbnails = np.eye(1024, dtype=np.float32)[[0, 1, 2, 0, 1, 2, 2]]
    thumbnails[4] = 0.8 * thumbnails[1] + 0.6 * thumbnails[0]
    generator, split = np.random.default_rng(0), (np.arange(3), np.arange(3, 7))
    measured = measure(noise(7, generator)[0], thumbnails, list("abcabca"), {"grouped": split}, generator=generator)
    assert measured.grouped["nearest"] == 0.75  # all but the last, which is a picture of c under a
