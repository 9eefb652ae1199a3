import io

import numpy as np
import pytest
from PIL import Image

from neuroloop.core.schemas import LABELS, PARTS
from neuroloop.data.audit import audit
from neuroloop.data.dataset import make_split
from neuroloop.data.statistics import BINS, Statistics, capture, grid, measure, pack_measures, plots, unpack_measures
from neuroloop.imaging.decode import decode, encode_png

from .drawn import four_classes, picture, snapshot_of


@pytest.fixture(scope="module")
def files():
    made = four_classes(20)
    made |= {f"notumor/w{n}.png": encode_png(picture(5000 + n, 96)[:80]) for n in range(10)}
    return made


@pytest.fixture(scope="module")
def split(files):
    snapshot = snapshot_of(files, simulated=True)
    return make_split(snapshot, audit(snapshot, lambda entry: files[entry.path]))


@pytest.fixture(scope="module")
def measured(files, split):
    return {entry.path: measure(decode(files[entry.path])) for entry in split.entries}


def test_counts_are_of_all_parts_and_measurements_of_the_training_images_only(files, split, measured):
    result = capture(split, measured)
    training = {entry.path for entry in split.of("train")}
    assert result == capture(split, {path: each for path, each in measured.items() if path in training})
    with pytest.raises(KeyError):
        capture(split, {})
    for label in LABELS:
        own = result.classes[label]
        assert own.images == {part: sum(e.part == part and e.label == label for e in split.entries) for part in PARTS}
        pixels = [decode(files[e.path]) for e in split.of("train") if e.label == label]
        assert own.measured == len(pixels) == sum(own.sizes.values())
        assert own.mean == pytest.approx(np.mean([p.mean() for p in pixels]), abs=0.001)
        assert own.deviation == pytest.approx(np.mean([p.std() for p in pixels]), abs=0.001)
        assert len(own.histogram) == BINS
        assert sum(own.histogram) == pytest.approx(1, abs=1e-4)
        assert own.histogram[0] == pytest.approx(np.mean([(p < 4).mean() for p in pixels]), abs=1e-5)
        assert own.mean_deciles == tuple(sorted(own.mean_deciles))
        assert len(own.deviation_deciles) == 11
    assert set(result.classes["notumor"].sizes) == {"64 x 64", "96 x 80"}


def test_statistics_are_json_and_the_same_whatever_way_the_measures_came(split, measured):
    result = capture(split, measured)
    assert Statistics.model_validate_json(result.model_dump_json()) == result
    paths = list(measured)
    some, others = ({path: measured[path] for path in own} for own in (paths[::2], paths[1::2]))
    assert result == capture(split, unpack_measures(pack_measures(others)) | unpack_measures(pack_measures(some)))
    assert unpack_measures(pack_measures({})) == {}


@pytest.fixture(scope="module")
def merged(split):
    """The split with half of the gliomas from another set than the rest."""
    gliomas = [entry.path for entry in split.entries if entry.label == "glioma"]
    other = set(gliomas[: len(gliomas) // 2])
    entries = [e.model_copy(update={"origin": "sartaj" if e.path in other else "figshare"}) for e in split.entries]
    return split.model_copy(update={"entries": tuple(entries)})


def test_images_are_counted_by_class_part_and_origin_and_only_training_images_are_measured(files, merged, measured):
    result = capture(merged, measured)
    assert set(result.classes["notumor"].origins) == {"figshare"}
    for origin, own in result.classes["glioma"].origins.items():
        mine = [e for e in merged.entries if e.label == "glioma" and e.origin == origin]
        assert own.images == {part: sum(e.part == part for e in mine) for part in PARTS}
        pixels = [decode(files[e.path]) for e in mine if e.part == "train"]
        assert own.measured == len(pixels) == sum(own.sizes.values())
        assert own.mean == pytest.approx(np.mean([p.mean() for p in pixels]), abs=0.001)
    for each in result.classes.values():
        assert sum(each.mean_counts) == sum(each.deviation_counts) == each.measured
    assert sum(own.measured for own in result.classes["glioma"].origins.values()) == result.classes["glioma"].measured


def test_origins_are_plotted_where_there_are_several(files, merged, split, measured):
    read = lambda entry: files[entry.path]  # noqa: E731
    with Image.open(io.BytesIO(plots(capture(merged, measured, shown=1), read)["origins.png"])) as image:
        assert np.asarray(image.convert("L")).std() > 10
    assert "origins.png" not in plots(capture(split, measured, shown=1), read)


def test_the_images_shown_are_training_images_of_different_groups(split, measured):
    result = capture(split, measured, shown=3)
    for entries in result.samples.values():
        assert len({entry.group for entry in entries}) == 3
        assert {entry.part for entry in entries} == {"train"}


def test_plots_are_png_images_with_something_on_them(files, split, measured):
    made = plots(capture(split, measured, shown=3), lambda e: files[e.path])
    assert set(made) == {"class_counts.png", "intensity.png", "samples.png", "sizes.png"}
    for data in made.values():
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            assert min(image.size) > 400
            assert np.asarray(image.convert("L")).std() > 10


def test_plots_of_simulated_scans_say_so(files, split, measured):
    read = lambda entry: files[entry.path]  # noqa: E731
    simulated = capture(split, measured, shown=1)
    real = simulated.model_copy(update={"simulated": False})
    for name, data in plots(simulated, read).items():
        assert data != plots(real, read)[name], name


def test_sizes_are_not_plotted_where_all_are_equal(files, split, measured):
    result = capture(split, measured, shown=1)
    equal = {label: each.model_copy(update={"sizes": {"64 x 64": 9}}) for label, each in result.classes.items()}
    assert "sizes.png" not in plots(result.model_copy(update={"classes": equal}), lambda e: files[e.path])


def test_a_grid_shows_each_image():
    rows = {"dark": [np.zeros((40, 40), np.uint8)] * 2, "light": [np.full((40, 60), 255, np.uint8)]}
    with Image.open(io.BytesIO(grid(rows, title="Preview", simulated=False))) as image:
        pixels = np.asarray(image.convert("L"))
    assert (pixels == 0).sum() > 2 * 100 * 100


def test_a_grid_without_images_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        grid({"glioma": []}, title="Preview", simulated=False)
