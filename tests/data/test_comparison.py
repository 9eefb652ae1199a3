from collections import Counter

import numpy as np
import pytest

from neuroloop.core.schemas import LABELS
from neuroloop.data.audit import audit
from neuroloop.data.comparison import LARGE, MODERATE, Comparison, Shift, compare, psi
from neuroloop.data.dataset import make_split
from neuroloop.data.statistics import capture, measure
from neuroloop.imaging.decode import decode, encode_png

from .drawn import picture, snapshot_of


def counts(values):
    return np.histogram(np.clip(values, 0, 255), bins=32, range=(0, 256))[0].tolist()


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def test_the_index_of_two_halves_of_a_known_table_is_the_textbooks():
    # Each bin holds a tenth of the reference at least, so none are joined; the half image a bin does not show in 1e6.
    old, new = [500_000, 300_000, 200_000], [300_000, 300_000, 400_000]
    expected = (0.3 - 0.5) * np.log(0.3 / 0.5) + (0.4 - 0.2) * np.log(0.4 / 0.2)
    assert psi(old, new).psi == pytest.approx(expected, abs=1e-4)


def test_a_shift_downwards_is_seen_like_one_upwards():
    def at(*bins: int) -> list[int]:
        return np.bincount(bins, minlength=32).tolist()

    narrow = at(*[10] * 200)
    up, down = psi(narrow, at(*[20] * 200)), psi(narrow, at(*[3] * 200))
    assert up.psi == pytest.approx(down.psi, rel=0.01)
    assert down.grade == "large"
    assert psi(narrow, narrow).psi == 0


def test_draws_from_one_distribution_are_stable_however_small_and_chance_bounds_them(generator):
    for size in (25, 60, 300, 2000):
        shifts = [
            psi(counts(generator.normal(100, 20, size)), counts(generator.normal(100, 20, size))) for _ in range(200)
        ]
        assert np.mean([shift.psi <= shift.chance for shift in shifts]) >= 0.96
        assert np.mean([shift.grade == "stable" for shift in shifts]) >= 0.96


def test_what_is_chance_hangs_on_both_samples(generator):
    # Of two bins: chi-square with one degree of freedom, whose 0.99 quantile is 6.635.
    large, small = psi([5000, 5000], [5000, 5000]).chance, psi([5000, 5000], [50, 50]).chance
    assert large == pytest.approx(6.635 * 2 / 10_000, abs=1e-4)
    assert small == psi([50, 50], [5000, 5000]).chance == pytest.approx(6.635 * (1 / 10_000 + 1 / 100), abs=1e-4)
    old, new = counts(generator.normal(100, 20, 3000)), counts(generator.normal(100, 20, 60))
    assert psi(old, new).grade == psi(new, old).grade == "stable"


def test_a_shift_of_the_mean_is_graded_by_its_size(generator):
    reference = counts(generator.normal(100, 20, 3000))
    grades = {moved: psi(reference, counts(generator.normal(100 + moved, 20, 3000))) for moved in (2, 8, 20)}
    assert [shift.grade for shift in grades.values()] == ["stable", "moderate", "large"]
    assert grades[2].psi < MODERATE < grades[8].psi < LARGE < grades[20].psi


def test_images_of_one_group_count_once_for_what_is_chance(generator):
    old, new = counts(generator.normal(100, 20, 1000)), counts(generator.normal(108, 20, 1000))
    assert psi(old, new).grade == "moderate"
    assert psi(old, new, samples=(40, 40)).grade == "stable"


def test_a_value_that_no_image_had_before_is_a_large_shift():
    assert psi([500, 0], [300, 200]).grade == "large"
    assert psi([500], [500]).psi == 0


def test_too_few_images_are_not_graded():
    assert psi([10, 9], [500, 500]).grade == "too few"
    assert psi((), ()).grade == "too few"


def stats_of(files, version):
    snapshot = snapshot_of(files, version)
    snapshot = snapshot.model_copy(
        update={"images": tuple(image.model_copy(update={"origin": "drawn"}) for image in snapshot.images)}
    )
    split = make_split(snapshot, audit(snapshot, lambda entry: files[entry.path]))
    return snapshot, capture(split, {e.path: measure(decode(files[e.path])) for e in split.of("train")})


@pytest.fixture(scope="module")
def versions():
    """45 pictures a class, of which the next version has some fewer, some new, one corrected, and brighter gliomas."""
    first = {
        f"{label}/{number:03d}.png": encode_png(picture(1000 * order + number, 40))
        for order, label in enumerate(LABELS)
        for number in range(45)
    }
    second = {path: data for path, data in first.items() if not path.startswith("glioma")}
    second |= {f"glioma/b{n}.png": encode_png(picture(n, 40) // 2 + 128) for n in range(45)}
    second["notumor/corrected.png"] = second.pop("pituitary/000.png")
    second["notumor/renamed.png"] = second.pop("notumor/001.png")
    second["meningioma/large.png"] = encode_png(picture(77_000, 64))
    return stats_of(first, "v1"), stats_of(second, "v2")


def test_what_came_and_went_is_counted_by_content_class_and_origin(versions):
    (before, earlier), (after, later) = versions
    result = compare(before, after, earlier, later)
    assert (result.previous, result.version) == ("v1", "v2")
    assert result.unchanged == 3 * 45 - 1
    assert result.classes["glioma"].added == result.classes["glioma"].removed == {"drawn": 45}
    assert result.classes["meningioma"].added == {"drawn": 1}
    assert result.classes["notumor"].added == result.classes["notumor"].removed == {}
    assert result.classes["notumor"].relabelled == {"pituitary": 1}
    assert result.relabelled == (("notumor/corrected.png", "pituitary", "notumor"),)


def test_of_the_same_bytes_that_stand_there_several_times_each_is_counted(versions):
    (before, earlier), _ = versions
    image = before.images[0]
    copies = {
        "glioma/one.png": "glioma", "glioma/two.png": "glioma", "glioma/both.png": "glioma",
        "meningioma/both.png": "meningioma",
    }  # fmt: skip
    entries = {path: image.model_copy(update={"path": path, "label": label}) for path, label in copies.items()}
    then = before.model_copy(update={"images": tuple(entries.values())})
    fewer = then.model_copy(update={"images": (entries["glioma/one.png"], entries["glioma/both.png"])})
    result = compare(then, fewer, earlier, earlier)
    assert (result.unchanged, result.relabelled) == (2, ())
    assert {label: change.removed for label, change in result.classes.items() if change.removed} == {
        "glioma": {"drawn": 1},
        "meningioma": {"drawn": 1},
    }
    back = compare(fewer, then, earlier, earlier)
    assert back.classes["glioma"].added == back.classes["meningioma"].added == {"drawn": 1}
    turned = then.model_copy(update={"images": (*list(entries.values())[:3], entries["glioma/one.png"])})
    assert [change[1:] for change in compare(then, turned, earlier, earlier).relabelled] == [("meningioma", "glioma")]


def test_only_the_class_whose_greys_changed_is_reported_as_shifted(versions):
    (before, earlier), (after, later) = versions
    result = compare(before, after, earlier, later)
    assert result.grade == "large"
    assert result.psi_max == result.classes["glioma"].shifts["grey_level"].psi > LARGE
    assert {name.split()[0] for name in result.summary()["shifted"]} == {"glioma"}
    assert Comparison.model_validate_json(result.model_dump_json()) == result


@pytest.mark.parametrize("left", [100, 18])
def test_a_class_that_nearly_vanishes_is_a_large_shift_though_the_rest_is_as_before(versions, left):
    (before, earlier), _ = versions

    def with_glioma(images: int):
        classes = {
            label: statistics.model_copy(
                update={"images": {"train": images if label == "glioma" else 1000}, "groups": {"train": 30}}
            )
            for label, statistics in earlier.classes.items()
        }
        return earlier.model_copy(update={"classes": classes})

    result = compare(before, before, with_glioma(1000), with_glioma(left))
    assert (result.grade, result.mix.grade) == ("large", "large")
    assert result.psi_max == result.mix.psi > LARGE
    assert result.summary()["shifted"] == {"class mix": result.mix.psi}
    assert compare(before, before, with_glioma(1000), with_glioma(960)).grade == "stable"


def test_a_class_from_elsewhere_is_a_shift_of_its_origin(versions):
    (before, earlier), _ = versions
    glioma = earlier.classes["glioma"]
    (drawn,) = glioma.origins.values()
    moved = glioma.model_copy(update={"origins": {"another": drawn}})
    later = earlier.model_copy(update={"classes": earlier.classes | {"glioma": moved}})
    result = compare(before, before, earlier, later)
    assert set(result.summary()["shifted"]) == {"glioma origin"}


@pytest.mark.parametrize("images", [1_000, 100_000])
@pytest.mark.parametrize(("share", "grade"), [(0.03, "stable"), (0.08, "moderate"), (0.3, "large")])
def test_a_new_source_counts_by_its_share_however_many_images_there_are(versions, images, share, grade):
    (before, earlier), _ = versions
    glioma = earlier.classes["glioma"].model_copy(update={"groups": {"train": images}, "measured": images})
    (drawn,) = glioma.origins.values()

    def of(**origins: int):
        made = {name: drawn.model_copy(update={"images": {"train": count}}) for name, count in origins.items()}
        return earlier.model_copy(
            update={"classes": earlier.classes | {"glioma": glioma.model_copy(update={"origins": made})}}
        )

    result = compare(before, before, of(drawn=images), of(drawn=images, new=round(images * share / (1 - share))))
    assert result.classes["glioma"].shifts["origin"].grade == grade


def test_the_largest_index_leaves_out_what_is_chance(versions):
    (before, earlier), _ = versions
    result = compare(before, before, earlier, earlier)
    chance, real = Shift(psi=0.9, chance=1.2, grade="stable"), Shift(psi=0.3, chance=0.2, grade="large")
    glioma = result.classes["glioma"]

    def psi_max(**shifts: Shift) -> float:
        changed = glioma.model_copy(update={"shifts": glioma.shifts | shifts})
        return result.model_copy(update={"classes": result.classes | {"glioma": changed}}).psi_max

    assert psi_max(size=chance) == 0
    assert psi_max(size=chance, origin=real) == 0.3


def with_glioma(earlier, of_class, sizes=None, origins=None):
    """Statistics whose gliomas are unlike images of these sizes and origins, by their number."""
    (drawn,) = of_class.origins.values()
    count = sum((sizes or origins).values())
    changed: dict = {"groups": {"train": count}, "measured": count}
    if sizes:
        changed["sizes"] = dict(sizes)
    if origins:
        changed["origins"] = {name: drawn.model_copy(update={"images": {"train": n}}) for name, n in origins.items()}
    return earlier.model_copy(update={"classes": earlier.classes | {"glioma": of_class.model_copy(update=changed)}})


@pytest.mark.parametrize("images", [60, 300, 1000])
@pytest.mark.parametrize("name", ["size", "origin"])
def test_two_draws_of_many_sizes_or_sources_are_stable_and_chance_bounds_them(versions, generator, name, images):
    (before, earlier), _ = versions

    def drawn(kind: int) -> Counter[str]:
        """A third each: widths near 225; one size and any others; frames and sources of 12, 40 and 90 kinds."""
        if name == "origin":
            return Counter(f"source {n}" for n in generator.integers((12, 40, 90)[kind], size=images))
        sides = generator.integers(180, 640, (images, 2))
        if kind == 0:
            sides = np.clip(generator.normal(225, 25, (images, 1)), 180, 300).astype(int).repeat(2, axis=1)
        elif kind == 1:
            sides[generator.random(images) < 0.6] = 512
        return Counter(f"{width} x {height}" for width, height in sides)

    shifts = []
    for number in range(99):
        old, new = (with_glioma(earlier, earlier.classes["glioma"], **{f"{name}s": drawn(number % 3)}) for _ in "ab")
        shifts.append(compare(before, before, old, new).classes["glioma"].shifts[name])
    assert np.mean([shift.psi <= shift.chance for shift in shifts]) >= 0.96
    assert np.mean([shift.grade == "stable" for shift in shifts]) >= 0.96


def test_frames_of_another_area_are_a_shift_of_size_and_others_of_the_same_area_are_none(versions):
    (before, earlier), _ = versions
    glioma = earlier.classes["glioma"]

    def grade(*sizes: str) -> str:
        old, new = (with_glioma(earlier, glioma, sizes={size: 200}) for size in sizes)
        return compare(before, before, old, new).classes["glioma"].shifts["size"].grade

    assert grade("512 x 512", "256 x 256") == grade("512 x 512", "630 x 630") == "large"
    assert grade("512 x 512", "512 x 514") == "stable"
    assert grade("20000 x 20000", "1 x 1") == "large"  # beyond the histogram too


@pytest.mark.parametrize("name", ["a", "z"])
def test_a_source_that_takes_the_place_of_another_is_a_shift_whatever_its_name(versions, name):
    (before, earlier), _ = versions
    old, new = (
        with_glioma(earlier, earlier.classes["glioma"], origins={"kept": 500, other: 400}) for other in ("m", name)
    )
    assert compare(before, before, old, new).classes["glioma"].shifts["origin"].grade == "large"


def test_many_new_sources_of_a_few_images_each_are_a_shift_as_one_of_all_of_them_is(versions):
    (before, earlier), _ = versions
    glioma = earlier.classes["glioma"]
    old = with_glioma(earlier, glioma, origins={"one": 500})
    many = with_glioma(earlier, glioma, origins={"one": 300} | {f"rare {n}": 4 for n in range(50)})
    assert compare(before, before, old, many).classes["glioma"].shifts["origin"].grade == "large"


def test_a_version_compared_with_itself_has_not_changed(versions):
    (before, earlier), _ = versions
    result = compare(before, before, earlier, earlier)
    assert (result.unchanged, result.psi_max, result.grade) == (180, 0.0, "stable")
    assert result.summary()["shifted"] == {}
