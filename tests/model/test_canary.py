"""Reference images with known answers."""

import io
import zipfile

import numpy as np
import pytest

from neuroloop.core.errors import InvalidBundle
from neuroloop.model.bundle import Bundle
from neuroloop.model.canary import Canary, choose


def sure(labels: np.ndarray, by: float = 0.9) -> np.ndarray:
    """Probabilities of a model that names each label with `by`."""
    found = np.full((len(labels), 4), (1 - by) / 3, np.float32)
    found[np.arange(len(labels)), labels] = by
    return found


@pytest.fixture
def canary() -> Canary:
    labels = np.repeat(np.arange(4), 4)
    return Canary(np.zeros((16, 8, 8), np.uint8), labels, sure(labels))


def test_of_each_class_the_surest_right_ones_are_chosen():
    labels = np.array([0, 0, 0, 1, 1, 3])
    probabilities = sure(labels)
    probabilities[0] = (0.5, 0.4, 0.1, 0.0)
    probabilities[1] = (0.2, 0.8, 0.0, 0.0)  # wrong
    images = np.arange(6, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    found = choose(images, labels, probabilities, per_class=1)
    assert found is not None
    assert found.images[:, 0, 0].tolist() == [2, 3, 5]
    assert found.labels.tolist() == [0, 1, 3]
    assert choose(images, (labels + 1) % 4, sure(labels)) is None


def test_they_come_back_from_their_bytes_as_they_were(canary: Canary):
    back = Canary.from_bytes(canary.to_bytes())
    assert all((mine == yours).all() for mine, yours in zip(canary, back, strict=True))


@pytest.mark.parametrize("data", [b"", b"no archive", b"PK\x03\x04 and no more"])
def test_bytes_that_are_none_are_refused(data: bytes):
    with pytest.raises(InvalidBundle):
        Canary.from_bytes(data)


def test_canaries_that_unpack_to_more_than_any_are_refused_unread():
    vast = Canary(np.zeros((4, 4096, 4096), np.uint8), np.arange(4), sure(np.arange(4))).to_bytes()
    assert len(vast) < 100_000
    with pytest.raises(InvalidBundle, match="unpack to"):
        Canary.from_bytes(vast)


def test_a_header_that_promises_what_no_memory_holds_is_refused(canary: Canary):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**13, 8, 8)})
    buffer = io.BytesIO(canary.to_bytes())
    with zipfile.ZipFile(buffer) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in (members | {"images.npy": header.getvalue()}).items():
            archive.writestr(name, data)
    with pytest.raises(InvalidBundle):
        Canary.from_bytes(buffer.getvalue())


def test_arrays_that_do_not_fit_together_are_refused(canary: Canary):
    for changed in (
        canary._replace(labels=canary.labels[:3]),
        canary._replace(labels=canary.labels + 1),
        canary._replace(images=canary.images.astype(np.float32)),
        canary._replace(probabilities=canary.probabilities[:, :3]),
    ):
        with pytest.raises(InvalidBundle):
            Canary.from_bytes(changed.to_bytes())


def test_the_same_answers_pass_and_swapped_or_shifted_ones_do_not(canary: Canary):
    canary.verify(canary.probabilities + 1e-4)
    with pytest.raises(InvalidBundle, match="is called"):
        canary.verify(canary.probabilities[:, [1, 0, 2, 3]])
    with pytest.raises(InvalidBundle, match="differ by up to"):
        canary.verify(sure(canary.labels, 0.8))


def test_another_model_may_err_but_must_know_every_class(canary: Canary):
    other = sure(canary.labels, 0.6)
    other[[0, 5]] = (0.1, 0.1, 0.7, 0.1)  # one wrong of a class is no swap
    assert canary.unknown_to(other) == []
    assert canary.unknown_to(other[:, [1, 0, 2, 3]]) == ["glioma", "meningioma"]


def test_a_model_of_other_data_may_not_know_classes_but_one_that_exchanges_them_is_found(canary: Canary):
    said = canary.probabilities
    assert canary.exchanged_by(said) == []
    assert canary.exchanged_by(said[:, [1, 0, 2, 3]]) == ["glioma", "meningioma"]
    assert canary.exchanged_by(said[:, [1, 2, 0, 3]]) == ["glioma", "meningioma", "notumor"]
    few = Canary(canary.images[:2], np.array([0, 1]), said[:2])
    assert few.exchanged_by(sure(np.array([1, 0]), 0.9)) == []  # one of each is chance
    blind = said.copy()
    blind[canary.labels == 0] = np.roll(blind[canary.labels == 0], 2, axis=1)  # all gliomas are called notumor
    assert canary.unknown_to(blind) == ["glioma"]
    assert canary.exchanged_by(blind) == []


def test_a_real_networks_bundle_carries_them_and_answers_them_at_its_load(tiny_model, tmp_path):
    from neuroloop.model.bundle import write

    plain = Bundle.load(tiny_model.folder)
    scans = tiny_model.validation
    chosen = choose(scans.images, scans.labels, plain.predict(scans.images).probabilities)
    assert chosen is not None
    manifest = plain.manifest
    write(
        tmp_path / "with",
        onnx=plain.onnx,
        gate=plain.fitted_gate,
        statistics=b"{}",
        image_size=manifest.image_size,
        architecture="tiny",
        calibration=manifest.calibration,
        data_version="x",
        simulated=True,
        metrics={},
        canary=chosen,
    )
    loaded = Bundle.load(tmp_path / "with").canary
    assert loaded is not None
    assert (loaded.images == chosen.images).all()
