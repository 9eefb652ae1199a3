import numpy as np
import pytest

from neuroloop.core.schemas import LABELS
from neuroloop.model import explanation
from neuroloop.model.bundle import OnnxModel, RawOutputs
from neuroloop.model.explanation import displacement, heat_map, hit, pointing_game, randomised, rank_correlation

SIDE = 40
LESION = np.zeros((SIDE, SIDE), bool)
LESION[10:14, 20:24] = True
HEAD = np.ones((SIDE, SIDE), bool)


def peak(row: int, column: int) -> np.ndarray:
    heat = np.zeros((SIDE, SIDE), np.float32)
    heat[row, column] = 1
    return heat


@pytest.fixture(scope="module")
def shuffled(tiny_model) -> OnnxModel:
    return OnnxModel(randomised(tiny_model.onnx, np.random.default_rng(0)))


def shown_maps(network: OnnxModel, scans, named) -> list[np.ndarray]:
    return [
        heat_map(cam, label, scans.images.shape[1])
        for cam, label in zip(network.run(scans.images).cam, named, strict=True)
    ]


def cells(images: np.ndarray, *, moved: tuple[int, int]) -> np.ndarray:
    """A map of 8x8 cells for the first class, as bright as the image and moved down and right by some cells."""
    cam = np.zeros((len(images), 8, 8, 4), np.float32)
    bright = images.reshape(len(images), 8, 8, 8, 8).mean(axis=(2, 4))
    cam[..., 0] = np.roll(bright, moved, axis=(1, 2))
    return cam


@pytest.mark.parametrize("moved", [(0, 0), (1, 0), (0, -1), (1, 1)])
def test_how_far_a_map_lies_beside_what_it_speaks_of_is_measured_and_taken_back(moved):
    class Moving:
        def run(self, images):
            cam = cells(images, moved=moved)
            return RawOutputs(cam.mean(axis=(1, 2)), cam, np.zeros((len(images), 1), np.float32))

    y, x = np.mgrid[:64, :64]
    spots = [(24, 24), (24, 40), (40, 24), (40, 40), (32, 32)]
    images = np.stack([(200.0 * np.exp(-((y - row) ** 2 + (x - col) ** 2) / 60) + 20) for row, col in spots])
    offset = displacement(Moving().run, images.astype(np.uint8))
    assert offset == pytest.approx((moved[0] / 8, moved[1] / 8), abs=0.02)
    for image, (row, column) in zip(images, spots, strict=True):
        heat = heat_map(cells(image[None], moved=moved)[0], 0, 64, offset)
        found = np.unravel_index(heat.argmax(), heat.shape)
        assert np.hypot(found[0] - row, found[1] - column) <= 3


def test_a_network_that_names_no_tumour_has_no_offset():
    def run(images):
        cam = np.zeros((len(images), 8, 8, 4), np.float32)
        cam[..., LABELS.index("notumor")] = 1
        return RawOutputs(cam.mean(axis=(1, 2)), cam, np.zeros((len(images), 1), np.float32))

    assert displacement(run, np.full((2, 64, 64), 9, np.uint8)) == (0.0, 0.0)


def test_the_peak_of_a_map_may_lie_between_its_cells_and_nothing_is_below_zero():
    cam = np.zeros((8, 8, 4), np.float32)
    cam[3, 3:5, 0] = 1
    heat = heat_map(cam, 0, 64)
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert abs(row - 27.5) <= 1
    assert abs(column - 31.5) <= 1
    assert (heat.min(), heat.max()) == (0, 1)


@pytest.mark.parametrize(
    ("place", "expected"), [((11, 21), True), ((15, 21), True), ((16, 21), False), ((11, 17), False), ((30, 5), False)]
)
def test_a_hit_lies_in_the_lesion_or_beside_it_by_at_most_a_twentieth_of_the_width(place, expected):
    assert hit(peak(*place), LESION) is expected


def test_a_map_without_heat_hits_nothing_even_where_the_lesion_is_everywhere():
    assert not hit(np.zeros((SIDE, SIDE), np.float32), HEAD)


def test_the_pointing_game_counts_what_is_shown_and_gives_the_chance_level():
    game = pointing_game(
        [peak(11, 21), peak(30, 5), None],
        [LESION] * 3,
        [HEAD] * 3,
        ["glioma", "pituitary", "pituitary"],
        tolerance=0.0,
    )
    assert (game.scans, game.shown, game.hits) == (3, pytest.approx(2 / 3), 0.5)
    assert game.per_class == {"glioma": 1.0, "pituitary": 0.0}
    assert game.chance == pytest.approx(16 / SIDE**2)


def test_a_scan_without_a_lesion_cannot_be_played_with():
    with pytest.raises(ValueError, match="has none"):
        pointing_game([None], [~HEAD], [HEAD], ["glioma"])
    with pytest.raises(ValueError, match="at least one"):
        pointing_game([], [], [], [])


def test_a_trained_network_points_at_the_marks_it_learned_from_far_beyond_chance(tiny_model):
    scans, network = tiny_model.validation, OnnxModel(tiny_model.onnx)
    marked = [number for number in range(len(scans.labels)) if scans.marks[number].any()]
    named = network.run(scans.images).logits.argmax(axis=1)
    maps = shown_maps(network, scans, named)
    none = LABELS.index("notumor")
    game = pointing_game(
        [None if named[number] == none else maps[number] for number in marked],
        [scans.marks[number] for number in marked],
        [scans.images[number] > 0 for number in marked],
        [LABELS[scans.labels[number]] for number in marked],
    )
    assert game.shown > 0.7
    assert game.hits > 2 * game.chance


def test_the_maps_are_the_same_each_time(tiny_model):
    scans = tiny_model.validation
    first, again = (shown_maps(OnnxModel(tiny_model.onnx), scans, scans.labels) for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_a_network_with_shuffled_weights_gives_other_maps(tiny_model, shuffled):
    scans = tiny_model.validation
    trained, lost = (shown_maps(network, scans, scans.labels) for network in (OnnxModel(tiny_model.onnx), shuffled))
    correlations = [rank_correlation(one, other) for one, other in zip(trained, lost, strict=True)]
    assert abs(np.mean(correlations)) < 0.5
    assert rank_correlation(trained[0], trained[0]) == pytest.approx(1)


def test_a_shuffled_network_keeps_its_form_and_the_first_one_its_weights(tiny_model):
    before = bytes(tiny_model.onnx)
    one, same, other = (randomised(tiny_model.onnx, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one == same != other
    assert tiny_model.onnx == before
    assert OnnxModel(one).size == OnnxModel(before).size


def test_a_flat_map_correlates_with_nothing():
    assert rank_correlation(np.ones((4, 4), np.float32), np.eye(4, dtype=np.float32)) == 0


def test_the_check_plays_on_simulated_scans_whose_lesion_is_known(tiny_model, shuffled):
    class Knows:
        """Says pituitary, and points at the brightest cell of the image."""

        def run(self, images):
            cells = images.reshape(len(images), 8, 8, 8, 8).mean(axis=(2, 4))
            cam = np.zeros((len(images), 8, 8, 4), np.float32)
            cam[..., 3] = cells
            return OnnxModel.run(network, images)._replace(cam=cam, logits=cam.mean(axis=(1, 2)))

    network = OnnxModel(tiny_model.onnx)
    found = explanation.check(Knows().run, shuffled.run, 64, per_class=3)
    assert found.pointing.scans == 9
    assert found.pointing.shown == 1
    assert set(found.pointing.per_class) == {"glioma", "meningioma", "pituitary"}
    assert 0 < found.pointing.chance < 0.3
    assert found == explanation.check(Knows().run, shuffled.run, 64, per_class=3)
    assert found.model_validate_json(found.model_dump_json()) == found
