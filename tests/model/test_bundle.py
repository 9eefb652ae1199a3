import hashlib
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from neuroloop.core.errors import InvalidBundle
from neuroloop.core.schemas import LABELS
from neuroloop.model import export, gate_training, network
from neuroloop.model.bundle import Bundle, Manifest, OnnxModel, with_card, write
from neuroloop.model.calibration import Calibration
from neuroloop.model.card import as_markdown
from neuroloop.model.onnx_session import open_session

CALIBRATION = Calibration(temperature=1.0, conformal={"0.90": dict.fromkeys(LABELS, 0.5)}, refer_below=0.6)
MEGABYTE = 1_000_000


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
    assert (bundle.manifest.architecture, bundle.manifest.split) == ("tiny", "grouped")
    assert bundle.onnx == tiny_model.onnx
    assert bundle.card is None
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
        ({"calibration": {"temperature": 0, "conformal": {}, "refer_below": 0.5}}, "calibration.temperature"),
        ({"calibration": {"temperature": 1, "conformal": {"0.90": {}}, "refer_below": 0.5}}, "not valid"),
        ({"architecture": "made-up"}, "not valid"),
        ({"map_offset": [0.1]}, "map_offset"),
        ({"split": "made-up"}, "not valid"),
        ({"image_size": 96}, "another image size"),
        ({"files": {}}, "does not name"),
        ({"surprise": 1}, "not valid"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(copy, changes, message):
    rewrite(copy, **changes)
    with pytest.raises(InvalidBundle, match=message):
        Bundle.load(copy)


def test_a_manifest_other_than_the_registered_one_is_refused(copy):
    sha256 = Bundle.load(copy).sha256
    assert Bundle.load(copy, sha256=sha256).sha256 == sha256
    rewrite(copy, map_offset=[0.4, 0.4])
    Bundle.load(copy)
    with pytest.raises(InvalidBundle, match=r"bundle\.json is damaged.*registered"):
        Bundle.load(copy, sha256=sha256)


def test_a_bundle_of_the_first_format_is_refused_with_what_to_do(copy):
    manifest = json.loads((copy / "bundle.json").read_text())
    calibration = manifest.pop("calibration")
    old = manifest | {"format": 1, "temperature": calibration["temperature"]}
    (copy / "bundle.json").write_text(json.dumps(old))
    with pytest.raises(InvalidBundle, match=r"format 1.*build the model again"):
        Bundle.load(copy)


@pytest.mark.parametrize("text", ["", "[]", "not json", '{"format": 4}', '"format"'])
def test_what_is_no_manifest_is_refused(copy, text):
    (copy / "bundle.json").write_text(text)
    with pytest.raises(InvalidBundle, match="not valid"):
        Bundle.load(copy)


@pytest.mark.parametrize("name", ["../secret", "model.pkl", "run.py"])
def test_a_file_that_no_bundle_holds_is_refused(copy, name):
    (copy / name).write_bytes(b"x")
    files = json.loads((copy / "bundle.json").read_text())["files"]
    rewrite(copy, files=files | {name: hashlib.sha256(b"x").hexdigest()})
    with pytest.raises(InvalidBundle, match="a bundle holds only"):
        Bundle.load(copy)


def test_a_network_that_is_none_is_refused_before_anything_is_written(tiny_model, tmp_path):
    bundle = Bundle.load(tiny_model.folder)
    manifest = bundle.manifest
    with pytest.raises(InvalidBundle, match="cannot be loaded"):
        write(
            tmp_path / "new",
            onnx=b"no network",
            gate=bundle.fitted_gate,
            statistics=b"{}",
            image_size=manifest.image_size,
            architecture="tiny",
            calibration=manifest.calibration,
            data_version="x",
            simulated=True,
            metrics={},
        )
    assert not (tmp_path / "new").exists()


def test_a_network_that_would_read_another_file_is_refused(tmp_path, monkeypatch):
    """ONNX may keep weights in files of their own; of bytes, those of the process's own folder would be read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "env").write_bytes(b"a password")
    weights = onnx.TensorProto(name="w", data_type=onnx.TensorProto.UINT8, dims=[10])
    weights.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "env"), ("offset", "0"), ("length", "10")):
        weights.external_data.add(key=key, value=value)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Cast", ["w"], ["told"], to=onnx.TensorProto.FLOAT)],
        "reads",
        [],
        [onnx.helper.make_tensor_value_info("told", onnx.TensorProto.FLOAT, [10])],
        [weights],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    told = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {})
    assert bytes(told[0].astype(np.uint8)) == b"a password"  # it would be
    with pytest.raises(InvalidBundle, match="cannot be loaded"):
        open_session(model.SerializeToString(), "the network", threads=1)


def test_prediction_sets_and_referrals_are_those_of_the_calibration(tiny_model):
    bundle = Bundle.load(tiny_model.folder)
    calibration = bundle.manifest.calibration
    outputs = bundle.predict(tiny_model.validation.images)
    assert outputs.sets.keys() == calibration.conformal.keys() == {"0.90", "0.95"}
    for level, found in outputs.sets.items():
        np.testing.assert_array_equal(found, calibration.prediction_sets(outputs.probabilities, level))
        assert found.shape == outputs.probabilities.shape
    unsure = outputs.probabilities.max(axis=1) < calibration.refer_below
    np.testing.assert_array_equal(outputs.refer, unsure | (outputs.novelty > 1))
    assert (outputs.sets["0.95"] >= outputs.sets["0.90"]).all()  # a higher level never drops a class


def test_a_card_is_added_without_touching_what_the_model_answers(tiny_model, copy, card):
    before = Bundle.load(copy)
    assert with_card(copy, card) == copy
    bundle = Bundle.load(copy)
    assert bundle.card == card
    assert (copy / "card.md").read_text() == as_markdown(card)
    assert bundle.sha256 != before.sha256
    same = ("files",)
    assert bundle.manifest.model_dump(exclude=set(same)) == before.manifest.model_dump(exclude=set(same))
    images = tiny_model.validation.images[:8]
    np.testing.assert_array_equal(bundle.predict(images).logits, before.predict(images).logits)


def test_a_card_can_be_replaced_and_the_same_card_gives_the_same_bundle(copy, card):
    first = Bundle.load(with_card(copy, card)).sha256
    other = Bundle.load(with_card(copy, card.model_copy(update={"test_openings": 9}))).sha256
    assert first != other
    assert Bundle.load(with_card(copy, card)).sha256 == first


@pytest.mark.parametrize("name", ["card.md", "card.json"])
def test_an_altered_card_is_refused(copy, card, name):
    with_card(copy, card)
    (copy / name).write_text((copy / name).read_text().replace("0.9", "1.0"))
    with pytest.raises(InvalidBundle, match=name):
        Bundle.load(copy)


def test_a_damaged_bundle_gets_no_card(copy, card):
    (copy / "gate.json").write_bytes((copy / "gate.json").read_bytes() + b" ")
    with pytest.raises(InvalidBundle, match=r"gate\.json"):
        with_card(copy, card)
    assert not (copy / "card.md").exists()


def test_the_bundle_of_the_compact_network_with_all_its_files_takes_at_most_10_megabytes(tmp_path, card):
    model = network.build(128, seed=0)

    def some(count: int) -> np.ndarray:
        return np.random.default_rng(0).integers(0, 256, (count, 128, 128)).astype(np.uint8)

    features = model.output["features"].shape[1]

    def answers(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        generator = np.random.default_rng(0)
        found = (generator.normal(size=(len(images), columns)) for columns in (4, features))
        return tuple(each.astype(np.float32) for each in found)

    part = some(10), np.arange(10) % 4
    gate = gate_training.fit_gate(
        answers,
        part,
        part,
        np.random.default_rng(0),
        steps=1,
        per_kind=1,
    )
    folder = write(
        tmp_path,
        onnx=export.export_onnx(model),
        gate=gate,
        statistics=b"x" * 100_000,
        image_size=128,
        architecture="compact",
        calibration=CALIBRATION,
        data_version="d1",
        simulated=False,
        metrics={},
        weights=export.save_weights(model),
    )
    with_card(folder, card)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 10 * MEGABYTE


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
    assert not (heat[32:, :32] > 0.05).any()
    moved = Manifest.model_validate(bundle.manifest.model_dump() | {"map_offset": (-0.25, 0.0)})
    bundle.manifest = moved  # a map that lies a cell above what it speaks of
    assert np.unravel_index(bundle.heat(cam, 1).argmax(), heat.shape)[0] == pytest.approx(row + 16, abs=2)


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
        "import neuroloop.model.evaluation, neuroloop.model.card;"
        "Bundle.load(Path(sys.argv[1])).predict(np.zeros((1, 64, 64), np.uint8));"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('tensorflow', 'keras')))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_bundle)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
