import hashlib
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from neuroloop.core.errors import InvalidBundle
from neuroloop.core.schemas import LABELS
from neuroloop.model.bundle import Bundle, OnnxModel, write


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


def rewrite(folder: Path, **changes) -> None:
    """Change the manifest as a careless or malicious hand could."""
    manifest = json.loads((folder / "bundle.json").read_text()) | changes
    (folder / "bundle.json").write_text(json.dumps(manifest))


def test_a_written_bundle_comes_back_as_it_was(tiny_model):
    bundle = Bundle.load(tiny_model.folder)
    assert bundle.manifest.labels == LABELS
    assert bundle.manifest.simulated
    assert bundle.manifest.data_version == "tiny"
    assert bundle.image_size == 64
    assert bundle.statistics == b'{"simulated": true}'
    assert bundle.weights == tiny_model.weights
    assert bundle.sha256 == hashlib.sha256((tiny_model.folder / "bundle.json").read_bytes()).hexdigest()


def test_a_bundle_predicts_the_validation_scans_with_calibrated_probabilities(tiny_model):
    outputs = Bundle.load(tiny_model.folder).predict(tiny_model.validation.images)
    assert outputs.probabilities.sum(axis=1) == pytest.approx(np.ones(60), abs=1e-5)
    assert (outputs.probabilities.argmax(axis=1) == tiny_model.validation.labels).mean() > 0.7
    assert (outputs.probabilities.argmax(axis=1) == outputs.logits.argmax(axis=1)).all()


@pytest.mark.parametrize("name", ["model.onnx", "gate.json", "statistics.json", "weights.npz"])
def test_an_altered_file_is_refused_by_name(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(InvalidBundle, match=name):
        Bundle.load(copy)


@pytest.mark.parametrize("name", ["bundle.json", "model.onnx", "gate.json"])
def test_a_missing_file_is_refused_by_name(copy, name):
    (copy / name).unlink()
    with pytest.raises(InvalidBundle, match=name):
        Bundle.load(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": list(LABELS[::-1])}, "labels"),
        ({"canonical_version": "0"}, "canonical form"),
        ({"format": 99}, "format 99"),
        ({"temperature": 0}, "not valid"),
        ({"image_size": 96}, "another image size"),
        ({"files": {}}, "does not name"),
        ({"surprise": 1}, "not valid"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(copy, changes, message):
    rewrite(copy, **changes)
    with pytest.raises(InvalidBundle, match=message):
        Bundle.load(copy)


def test_a_manifest_that_reaches_out_of_its_folder_is_refused(copy):
    (copy.parent / "secret").write_bytes(b"x")
    files = json.loads((copy / "bundle.json").read_text())["files"]
    rewrite(copy, files=files | {"../secret": hashlib.sha256(b"x").hexdigest()})
    with pytest.raises(InvalidBundle, match="sub-folders"):
        Bundle.load(copy)


def test_a_network_that_is_none_is_refused_before_anything_is_written(tiny_model, tmp_path):
    bundle = Bundle.load(tiny_model.folder)
    kept = bundle.manifest.model_dump(include={"image_size", "temperature", "data_version", "simulated", "metrics"})
    with pytest.raises(InvalidBundle, match="cannot be loaded"):
        write(tmp_path / "new", onnx=b"no network", gate=bundle.gate, statistics=b"{}", **kept)
    assert not (tmp_path / "new").exists()


def test_images_of_another_size_or_type_are_refused(tiny_model):
    network = OnnxModel(tiny_model.onnx)
    for images in (np.zeros((1, 32, 32), np.uint8), np.zeros((1, 64, 64), np.float32), np.zeros((0, 64, 64), np.uint8)):
        with pytest.raises(ValueError, match="expected uint8"):
            network.run(images)


def test_threads_that_share_a_bundle_get_the_answers_of_one_alone(tiny_model):
    bundle = Bundle.load(tiny_model.folder)
    images = tiny_model.validation.images
    alone = bundle.predict(images).probabilities
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda i: bundle.predict(images[i : i + 1]).probabilities[0], range(len(images))))
    np.testing.assert_allclose(np.stack(together), alone, atol=1e-5)


def test_the_heat_map_peaks_where_the_class_is_favoured_and_stays_within_0_and_1(tiny_bundle):
    bundle = Bundle.load(tiny_bundle)
    cam = np.zeros((4, 4, 4), np.float32)
    cam[0, 3, 1] = 5.0
    heat = bundle.heat(cam, 1)
    assert heat.shape == (64, 64)
    assert heat.dtype == np.float32
    assert (heat.min(), heat.max()) == (0, 1)
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert row < 16
    assert column >= 48
    assert not heat[32:, :32].any()


def test_the_heat_map_of_a_marked_head_lies_on_the_mark_more_than_elsewhere(tiny_model):
    bundle = Bundle.load(tiny_model.folder)
    scans = tiny_model.validation
    gains = []
    for label in range(4):
        chosen = np.flatnonzero(scans.labels == label)
        if LABELS[label] == "notumor":
            continue
        for image, mark in zip(scans.images[chosen], scans.marks[chosen], strict=True):
            heat = bundle.heat(bundle.predict(image[None]).cam[0], label)
            gains.append(heat[mark].mean() - heat[~mark].mean())
    assert np.mean(gains) > 0.15


def test_a_map_that_speaks_for_no_place_is_all_zero(tiny_bundle):
    assert not Bundle.load(tiny_bundle).heat(np.zeros((4, 4, 4), np.float32), 0).any()


def test_loading_and_predicting_needs_no_tensorflow(tiny_bundle):
    code = (
        "import sys; from pathlib import Path; import numpy as np; from neuroloop.model.bundle import Bundle;"
        "import neuroloop.model.evaluation;"
        "Bundle.load(Path(sys.argv[1])).predict(np.zeros((1, 64, 64), np.uint8));"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('tensorflow', 'keras')))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_bundle)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
