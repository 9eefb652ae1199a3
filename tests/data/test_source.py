import os

import pytest

from neuroloop.adapters.folder import FolderStore
from neuroloop.bootstrap import open_source
from neuroloop.core.errors import InvalidSource
from neuroloop.core.schemas import LABELS, SourceFile
from neuroloop.data.source import (
    MINIMUM_PER_CLASS,
    ObjectSource,
    PhantomSource,
    check,
    is_test,
    label_of,
    snapshot_path,
)
from neuroloop.imaging.decode import decode


def folder_source(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    return ObjectSource(str(root), FolderStore(str(root)))


def test_class_folders_are_found_with_and_without_parts(tmp_path):
    flat = folder_source(tmp_path / "flat", "glioma/b.jpg", "glioma/a.jpg").files()
    assert [(file.path, file.label, file.part) for file in flat] == [
        ("glioma/a.jpg", "glioma", ""),
        ("glioma/b.jpg", "glioma", ""),
    ]
    parts = folder_source(tmp_path / "parts", "Testing/no_tumor/a.png", "Training/Pituitary Tumor/b.JPEG").files()
    assert [(file.label, file.part, snapshot_path(file)) for file in parts] == [
        ("notumor", "Testing", "Testing/notumor/a.png"),
        ("pituitary", "Training", "Training/pituitary/b.JPEG"),
    ]


@pytest.mark.parametrize(
    ("paths", "parts"),
    [
        (["Testing/A/glioma/1.png", "Training/A/glioma/1.png", "Training/B/glioma/1.png"], None),
        (["set/test/glioma/1.png", "set/train/glioma/1.png"], ["test", "train"]),
        (["glioma/1.png", "set/test/glioma/1.png"], ["", "set/test"]),
        (["set/train/glioma/1.png", "set/train/pituitary/1.png"], ["train", "train"]),
        (["glioma/Train/1.png", "glioma/test_2/1.png", "glioma/validation/1.png"], ["Train", "test_2", "validation"]),
    ],
)
def test_the_part_is_all_that_tells_images_apart_above_the_class_and_train_and_test_below_it(tmp_path, paths, parts):
    files = folder_source(tmp_path, *paths).files()
    expected = parts or [path.removesuffix("/glioma/1.png") for path in paths]
    assert [file.part for file in files] == expected
    assert [snapshot_path(file) for file in files] == [
        "/".join(piece for piece in (part, file.label, "1.png") if piece)
        for part, file in zip(expected, files, strict=True)
    ]


@pytest.mark.parametrize(
    ("part", "tested"),
    [("Testing", True), ("site A/TEST_2", True), ("Training", False), ("test site/train", False), ("latest", False)],
)
def test_a_part_is_tested_on_if_one_of_its_folders_says_so_and_none_says_that_one_trains_on_it(part, tested):
    assert is_test(part) == tested


def test_a_folder_below_a_class_that_is_no_part_is_refused_by_name(tmp_path):
    with pytest.raises(InvalidSource, match=r"The class of glioma/train/masks/a\.jpg .*found it in the folder 'masks'"):
        folder_source(tmp_path, "glioma/train/masks/a.jpg").files()


def test_a_linked_folder_belongs_to_a_source_as_it_does_to_an_audit(tmp_path):
    folder_source(tmp_path / "set", "glioma/a.jpg")
    folder_source(tmp_path / "elsewhere", "b.jpg")
    (tmp_path / "set" / "Meningioma").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    found = open_source(str(tmp_path / "set"), images=0, seed=0)
    assert [file.path for file in found.files()] == ["Meningioma/b.jpg", "glioma/a.jpg"]
    assert found.read(found.files()[0]) == b"x"


def test_a_source_that_cannot_be_read_is_named_without_its_password():
    with pytest.raises(InvalidSource, match=r"ftp://\*\*\*@host/set.*the scheme ftp:// is unknown"):
        open_source("ftp://ann:S3cret@host/set", images=0, seed=0)  # pragma: allowlist secret


@pytest.mark.parametrize(
    ("folder", "label"),
    [("no_tumour", "notumor"), ("No Tumor", "notumor"), ("GLIOMA-tumor", "glioma"), ("meningioma", "meningioma")],
)
def test_a_class_folder_may_be_spelt_as_public_sets_spell_it(folder, label):
    assert label_of(folder) == label


def test_files_that_are_no_images_are_passed_over_and_counted(tmp_path):
    source = folder_source(
        tmp_path,
        "glioma/a.jpg",
        "README.md",
        "SUMS",
        "glioma/x.csv",
        "__MACOSX/glioma/._a.jpg",
        ".d",
        "glioma/.b.jpg",
        ".old/c.png",
        "glioma/._a.jpg",
    )
    assert [file.path for file in source.files()] == ["glioma/a.jpg"]
    assert source.ignored == {".md files": 1, ".csv files": 1, "(no suffix) files": 1, "hidden images": 2}


def test_a_missing_folder_is_refused_with_what_was_expected(tmp_path):
    with pytest.raises(
        InvalidSource, match=r"nowhere holds no files.*does not exist or is empty; expected \[part/\]class"
    ):
        folder_source(tmp_path / "nowhere").files()


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "glioma").mkdir()
    with pytest.raises(InvalidSource, match="holds no files"):
        folder_source(tmp_path).files()


def test_a_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "set.zip").write_bytes(b"x")
    with pytest.raises(InvalidSource, match=r"set\.zip cannot be read"):
        folder_source(tmp_path / "set.zip").files()


def test_a_source_of_other_files_only_is_refused_with_what_was_found(tmp_path):
    with pytest.raises(InvalidSource, match=r"expected \.jpg, .* found only 1 \.csv files, 2 \.txt files"):
        folder_source(tmp_path, "glioma/a.txt", "glioma/b.txt", "c.csv").files()


@pytest.mark.parametrize(
    ("path", "found"), [("astrocytoma/a.jpg", "the folder 'astrocytoma'"), ("a.jpg", "no folder at all")]
)
def test_an_image_outside_the_class_folders_is_refused_by_name(tmp_path, path, found):
    with pytest.raises(InvalidSource, match=f"The class of {path} .*expected .*glioma, .*found it in {found}"):
        folder_source(tmp_path, "glioma/a.jpg", path).files()


def test_two_spellings_of_a_class_with_the_same_file_name_are_refused(tmp_path):
    with pytest.raises(InvalidSource, match=r"notumor/a\.jpg are both notumor/a\.jpg"):
        folder_source(tmp_path, "no_tumor/a.jpg", "notumor/a.jpg").files()


def test_a_file_that_goes_away_while_the_source_is_read_is_named(tmp_path):
    source = folder_source(tmp_path, "glioma/a.jpg")
    (file,) = source.files()
    assert source.read(file) == b"x"
    (tmp_path / "glioma/a.jpg").unlink()
    with pytest.raises(InvalidSource, match=r"glioma/a\.jpg is no longer in"):
        source.read(file)


def test_check_counts_classes_and_parts():
    files = [SourceFile(path=f"{n}", label=label, part="Training") for label in LABELS for n in range(10)]
    assert check(files) == {"images": 40, "classes": dict.fromkeys(LABELS, 10), "parts": {"Training": 40}}


@pytest.mark.parametrize("kept", [0, MINIMUM_PER_CLASS - 1])
def test_a_class_that_is_missing_or_too_small_is_refused_with_the_counts(kept):
    files = [SourceFile(path=f"{n}", label=label) for label in LABELS for n in range(kept if label == "glioma" else 10)]
    with pytest.raises(
        InvalidSource, match=f"too few images of glioma.*expected at least 10.*found {kept} glioma, 10 men"
    ):
        check(files)


def test_simulated_files_are_balanced_sorted_and_pass_the_check():
    source = PhantomSource(42, seed=3)
    files = source.files()
    assert source.simulated
    assert check(files)["classes"] == {"glioma": 11, "meningioma": 11, "notumor": 10, "pituitary": 10}
    assert [file.path for file in files] == sorted(file.path for file in files)
    assert files[0].path == "glioma/sim-000000.png"


def test_a_simulated_scan_is_the_same_for_the_same_seed_and_another_for_another():
    file = PhantomSource(40, seed=0).files()[12]
    first = PhantomSource(40, seed=0).read(file)
    assert first == PhantomSource(80, seed=0).read(file)
    assert first != PhantomSource(40, seed=1).read(file)
    assert decode(first).shape == (224, 224)


@pytest.mark.parametrize("path", ["glioma/other.png", "glioma/sim-12.png", "notumor/sim-000001.png"])
def test_a_path_that_is_no_simulated_scan_is_refused(path):
    with pytest.raises(InvalidSource, match="is no simulated scan"):
        PhantomSource(40, seed=0).read(SourceFile(path=path, label="glioma"))


def test_impossible_simulations_are_refused():
    with pytest.raises(InvalidSource, match="39 simulated scans are too few"):
        PhantomSource(39, seed=0)
    with pytest.raises(InvalidSource, match="no simulated scanner 'Z'"):
        PhantomSource(40, seed=0, scanner="Z")


def test_a_file_name_that_is_no_text_is_refused_by_name(tmp_path):
    with pytest.raises(InvalidSource, match=r"Sch\\udce4del\.png.*UTF-8"):
        folder_source(tmp_path, "glioma/a.png", os.fsdecode(b"glioma/Sch\xe4del.png")).files()
