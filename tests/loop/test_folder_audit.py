"""`neuroloop audit FOLDER`: any folder, nothing else of the platform."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.drawn import ct, four_classes, picture
from neuroloop import cli
from neuroloop.adapters.folder import FolderStore
from neuroloop.core.errors import InvalidSource, NeuroLoopError
from neuroloop.data.audit import audit, judge, look
from neuroloop.data.shortcuts import TRAITS
from neuroloop.data.source import ObjectSource, snapshot_path
from neuroloop.imaging.decode import encode_png
from neuroloop.loop.folder_audit import Folder, FolderImage, _splits, audit_folder, list_folder


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return folder


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess:
    code = (
        "import sys; from neuroloop.cli import main; sys.argv = ['neuroloop', *sys.argv[1:]]; code = 0\n"
        "try: main()\nexcept SystemExit as end: code = end.code or 0\n"
        "print('LOADED', *sorted({name.split('.')[0] for name in sys.modules}))\nsys.exit(code)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)} | environ,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def leaky(tmp_path_factory) -> Path:
    """Two parts, three classes with names of their own, a leak, a conflict, a CT, a broken file, and odd names."""
    classes = {"glioma": "cat", "meningioma": "no_tumor", "notumor": "Ünicode & more", "pituitary": "dog"}
    files = {}
    for path, data in four_classes(12).items():
        label, name = path.split("/")
        files[f"Training/{classes[label]}/{name}"] = data
    files["Testing/cat/mirror.png"] = encode_png(np.ascontiguousarray(picture(0)[:, ::-1]))
    files["Testing/cat/copy #1?.png"] = files["Training/cat/001.png"]
    files["Testing/cat/own.png"] = encode_png(picture(70_000))
    files["Testing/dog/own.png"] = encode_png(picture(70_001))
    files["Testing/notumor/own.png"] = encode_png(picture(70_002))
    files["Training/dog/conflict.png"] = encode_png(np.rot90(picture(3)))
    files["Training/dog/ct.jpg"] = encode_png(ct())
    files["Training/dog/broken.jpg"] = b"no image"
    files["Training/dog/.hidden.png"] = b"no image"
    files["__MACOSX/Training/dog/._1.png"] = b"no image"
    files["README.md"] = b"text"
    return write(tmp_path_factory.mktemp("a folder # with odd name"), files)


def test_the_command_writes_both_reports_and_needs_nothing_else_of_the_platform(leaky, tmp_path):
    files = ("--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html"))
    done = run("audit", str(leaky), *files, NEUROLOOP_NO_SUCH_SETTING="a setting that is wrong matters not")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "a.json").read_bytes())
    assert report["images"] == 56
    assert report["classes"] == {"cat": 15, "dog": 16, "notumor": 13, "Ünicode & more": 12}
    assert report["unreadable"] == ["Training/dog/broken.jpg"]
    assert report["wrong_modality"] == ["Training/dog/ct.jpg"]
    assert report["label_conflicts"] == [["Training/cat/003.png", "Training/dog/conflict.png"]]
    assert (report["identical_across_parts"], report["twins_across_parts"]) == (1, 2)
    assert set(report["shortcuts"]) == set(TRAITS)
    assert all(0 <= score <= 1 for scores in report["shortcuts"].values() for score in scores.values())
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")

    *printed, loaded = done.stdout.splitlines()
    assert any("56 of 56 images looked at" in line for line in printed)
    assert any(line.startswith("error    40.0% of Testing (2 of 5 images)") for line in printed)
    assert f"written to {tmp_path / 'a.html'}" in printed
    assert "sklearn" in loaded.split()
    assert not {"tensorflow", "keras", "mlflow", "airflow", "psycopg2", "google"} & set(loaded.split())


def test_what_cannot_be_audited_is_one_clear_line_and_exit_code_1(tmp_path):
    done = run("audit", str(tmp_path / "missing"))
    assert done.returncode == 1
    assert done.stderr == (
        f"neuroloop: {tmp_path / 'missing'} is no folder. name the folder that holds part/class/images.\n"
    )


def test_the_command_refuses_a_folder_without_images_or_classes_and_a_file_it_cannot_write(leaky, tmp_path):
    write(tmp_path / "none", {"README.md": b"text"})
    write(tmp_path / "loose", {"1.png": encode_png(picture(1))})
    with pytest.raises(InvalidSource, match=r"holds no images. expected \.jpg.*found 1 md"):
        cli.audit(tmp_path / "none", None, None)
    with pytest.raises(InvalidSource, match="1 images lie in no class folder"):
        cli.audit(tmp_path / "loose", None, None)
    with pytest.raises(NeuroLoopError, match=r"missing/a\.json cannot be written"):
        cli.audit(leaky, tmp_path / "missing" / "a.json", None)


def test_a_source_without_parts_is_measured_on_a_split_by_groups_only(tmp_path):
    store = FolderStore(str(write(tmp_path, four_classes(10))))
    report = json.loads(audit_folder(store, "here").json_report)
    assert report["parts"] == []
    assert report["shortcuts"]["majority"]["source"] is None
    assert report["shortcuts"]["majority"]["grouped"] == pytest.approx(0.25, abs=0.1)


def test_classes_too_small_to_split_are_left_out_of_the_split_by_groups_which_is_said(tmp_path):
    files = four_classes(10) | {"unsorted/1.png": encode_png(picture(905))}
    audited = audit_folder(FolderStore(str(write(tmp_path / "stray", files))), "stray")
    report = json.loads(audited.json_report)
    assert set(report["shortcuts"]) == set(TRAITS)
    assert sum(report["shortcuts_images"]["grouped"]) == 40
    assert report["shortcuts_left_out"] == ["unsorted"]
    assert "too few groups of images: unsorted." in audited.html_report.decode()

    audited = audit_folder(FolderStore(str(write(tmp_path / "few", four_classes(2)))), "few")
    report = json.loads(audited.json_report)
    assert report["shortcuts"] == report["shortcuts_images"] == {}
    assert report["shortcuts_left_out"] == ["glioma", "meningioma", "notumor", "pituitary"]
    assert "too few groups of images: glioma, meningioma" in audited.html_report.decode()

    one = {path: data for path, data in four_classes(8).items() if path.startswith("glioma")}
    report = json.loads(audit_folder(FolderStore(str(write(tmp_path / "one", one))), "one").json_report)
    assert (report["groups"], report["shortcuts"], report["shortcuts_left_out"]) == (8, {}, [])


def test_the_splits_of_a_folder_share_no_image_and_the_one_by_groups_no_group(tmp_path):
    files = {f"Training/{path}": data for path, data in four_classes(12).items()}
    for n, path in enumerate(four_classes(5)):
        files[f"Testing/{path}"] = encode_png(picture(50_000 + n))
    for path, data in list(files.items()):  # each with a twin
        files[path.replace(".png", " again.png")] = data
    store = FolderStore(str(write(tmp_path, files)))
    folder = list_folder(store, "here")
    looks = look(folder.images, lambda image: store.get(image.key))
    result = judge(folder, looks)
    splits, left_out = _splits(looks, result)
    assert splits.keys() == {"source", "grouped"}
    assert left_out == []
    for train, test in splits.values():
        assert len({*train, *test}) == len(train) + len(test) == len(files)
    train, test = ({result.groups[looks.images[index].path] for index in some} for some in splits["grouped"])
    assert not train & test
    assert len(test) == pytest.approx(68 / 5, abs=2)


def test_a_folder_in_which_nothing_can_be_read_is_audited_and_says_so(tmp_path):
    store = FolderStore(str(write(tmp_path, {"glioma/1.png": b"broken", "glioma/2.png": b"broken"})))
    report = json.loads(audit_folder(store, "here").json_report)
    assert report["unreadable"] == ["glioma/1.png", "glioma/2.png"]
    assert report["findings"][0]["name"] == "broken_class"


def test_deeper_folders_links_and_other_spellings_hide_no_leak(tmp_path):
    files = {}
    for path, data in four_classes(4).items():
        label, name = path.split("/")
        files[f"set/train/site A/{label}/patient 1/{name}"] = data
        files[f"elsewhere/{label.upper()}/{name}"] = data
    files |= {"set/train/Cat/1.png": encode_png(picture(901)), "elsewhere/cat/1.png": encode_png(picture(901))}
    root = write(tmp_path, files)
    (root / "set" / "test").symlink_to(root / "elsewhere", target_is_directory=True)
    (root / "set" / "test" / "loop").symlink_to(root / "set", target_is_directory=True)
    assert len(FolderStore(str(root / "set")).list("")) == 17
    store = FolderStore(str(root / "set"), follow_links=True)
    report = json.loads(audit_folder(store, "here").json_report)
    assert report["classes"] == {"cat": 2, "glioma": 8, "meningioma": 8, "notumor": 8, "pituitary": 8}
    assert [(part["name"], part["images"]) for part in report["parts"]] == [
        ("test", 17),
        ("train", 1),
        ("train/site A", 16),
    ]
    assert report["twins_across_parts"] == 17  # one trains on "train" and "train/site A"
    assert report["label_conflicts"] == []


@pytest.mark.parametrize(
    "layout", ["{part}/site A/{label}", "set/{part}/{label}", "{label}/{part}", "A/{part}/B/{label}"]
)
def test_a_build_sees_the_same_parts_and_the_same_leak_as_the_command(tmp_path, layout):
    files = {}
    for path, data in four_classes(4).items():
        label, name = path.split("/")
        files |= {f"{layout.format(part=part, label=label)}/{part}{name}": data for part in ("Training", "Testing")}
    store = FolderStore(str(write(tmp_path, files)))
    source = ObjectSource("here", store)
    listed = {snapshot_path(file): file for file in source.files()}
    images = [
        FolderImage(path=path, key=file.path, label=file.label, part=file.part,
                    sha256=hashlib.sha256(files[file.path]).hexdigest(), size=1)
        for path, file in listed.items()
    ]  # fmt: skip
    built = audit(Folder(version="", images=tuple(images), ignored={}), lambda image: store.get(image.key))
    command = audit_folder(store, "here").audit
    assert built.source_parts == command.source_parts
    assert built.leak_rate == 1
    assert [part.name.partition("/")[0] for part in built.held_out] == ["Testing"]


def test_a_class_of_any_name_is_the_folder_above_its_parts(tmp_path):
    files = {}
    for path, data in four_classes(4).items():
        label, name = path.split("/")
        for part in ("train", "test"):
            files[f"{label.replace('o', 'x')}/{part}/{name}"] = data
    report = json.loads(audit_folder(FolderStore(str(write(tmp_path, files))), "here").json_report)
    assert set(report["classes"]) == {"glixma", "meningixma", "nxtumxr", "pituitary"}
    assert (report["twins_across_parts"], report["leak_rate"]) == (16, 1)


def test_names_that_any_data_set_uses_are_classes_of_ours_among_ours_only(tmp_path):
    drawn = list(four_classes(4).values())
    others = {f"train/{label}/{n}.png": drawn[4 * order + n] for order, label in enumerate(("NORMAL", "Healthy", "Ill"))
              for n in range(4)}  # fmt: skip
    others["train/Healthy/same.png"] = drawn[0]
    report = json.loads(audit_folder(FolderStore(str(write(tmp_path / "lungs", others))), "here").json_report)
    assert report["classes"] == {"Healthy": 5, "Ill": 4, "NORMAL": 4}
    assert report["label_conflicts"] == [["train/Healthy/same.png", "train/NORMAL/0.png"]]
    ours = {path.replace("notumor", "normal"): data for path, data in four_classes(4).items()}
    ours["unsorted/stray.png"] = encode_png(picture(905))
    report = json.loads(audit_folder(FolderStore(str(write(tmp_path / "brains", ours))), "here").json_report)
    assert report["classes"] == {"glioma": 4, "meningioma": 4, "notumor": 4, "pituitary": 4, "unsorted": 1}


def test_images_in_no_part_beside_a_test_part_leak_too(tmp_path):
    files = {}
    for path, data in four_classes(4).items():
        files[path] = files[f"test/{path}"] = data
    report = json.loads(audit_folder(FolderStore(str(write(tmp_path, files))), "here").json_report)
    assert [(part["name"], part["held_out"]) for part in report["parts"]] == [("", False), ("test", True)]
    assert report["identical_across_parts"] == report["twins_across_parts"] == 16


def test_what_is_not_looked_at_is_said_and_what_is_not_there_is_unreadable(tmp_path):
    root = write(tmp_path, four_classes(4) | {"cover.jpg": b"x", "glioma/a.dcm": b"x", "glioma/b.DCM": b"x", "n": b"x"})
    write(tmp_path, {".old/glioma/1.png": b"x", "glioma/.2.png": b"x"})
    (root / "glioma" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "glioma" / "itself.png").symlink_to(root / "glioma" / "itself.png")
    os.mkfifo(root / "glioma" / "pipe.png")
    audited = audit_folder(FolderStore(str(root)), "here")
    report = json.loads(audited.json_report)
    assert report["ignored"] == {
        "(no suffix) files": 1,
        ".dcm files": 2,
        "hidden images": 2,
        "images in no class folder": 1,
    }
    assert report["unreadable"] == ["glioma/gone.png", "glioma/itself.png", "glioma/pipe.png"]
    assert "6 files were not looked at" in audited.html_report.decode()


def test_a_pattern_too_fine_for_a_thumbnail_is_blank_and_leaks_nowhere(tmp_path):
    fine = encode_png((np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8))
    root = write(tmp_path, four_classes(4) | {f"glioma/fine {n}.png": fine for n in range(3)})
    report = json.loads(audit_folder(FolderStore(str(root)), "here").json_report)
    assert report["blank"] == [f"glioma/fine {n}.png" for n in range(3)]


def test_a_name_that_is_no_text_can_be_read_and_reported(tmp_path):
    folder = write(tmp_path, four_classes(6))
    odd = os.fsencode(folder / "glioma") + b"/\xff.png"
    Path(os.fsdecode(odd)).write_bytes(encode_png(picture(1)))
    report = audit_folder(FolderStore(str(folder)), "here")
    assert b"glioma/\\\\xff.png" in report.json_report
    assert report.audit.identical == 1


def test_the_version_of_a_folder_changes_with_any_byte_and_not_with_time(tmp_path):
    store = FolderStore(str(write(tmp_path, four_classes(2))))
    before = list_folder(store, "x").version
    assert list_folder(store, "x").version == before
    write(tmp_path, {"glioma/000.png": encode_png(picture(5))})
    assert list_folder(store, "x").version != before


def test_a_store_out_of_reach_is_said_so(tmp_path):
    with pytest.raises(InvalidSource, match="holds no images"):
        list_folder(FolderStore(str(tmp_path / "none")), "none")


@pytest.mark.skipif(
    not os.environ.get("NEUROLOOP_REAL_DATA"), reason="NEUROLOOP_REAL_DATA names no folder of real images"
)
def test_the_public_set_shows_its_leak_its_conflicts_and_its_shortcuts():
    real = os.environ["NEUROLOOP_REAL_DATA"]
    report = json.loads(audit_folder(FolderStore(real), real).json_report)
    assert (report["images"], report["identical_across_parts"], report["twins_across_parts"]) == (7019, 216, 992)
    assert len(report["label_conflicts"]) == 4
    assert report["leak_rate"] == pytest.approx(0.757, abs=0.001)
    # Without a look at a lesion; a split by groups takes away what was memory, not what betrays the source.
    assert report["shortcuts"]["border"]["source"] > 0.85
    assert report["shortcuts"]["nearest"]["source"] > 0.95
    assert report["shortcuts"]["nearest"]["grouped"] < 0.88
