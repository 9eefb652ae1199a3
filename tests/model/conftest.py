"""One tiny model, trained once by the real code on simulated scans, that all tests of this folder share."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from neuroloop.core.schemas import LABELS
from neuroloop.imaging.canonical import canonicalize
from neuroloop.imaging.phantom import scan

SIZE = 64


@dataclass(frozen=True)
class TinyScans:
    """Canonical simulated scans and where each lesion lies in the frame of the scan."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def tiny_scans(count: int, *, first: int = 0) -> TinyScans:
    """`count` scans, the classes taking turns."""
    images = [canonicalize(scan(LABELS[i % 4], first + i // 4, size=96).pixels, SIZE) for i in range(count)]
    return TinyScans(np.stack(images), np.arange(count) % 4)


@dataclass(frozen=True)
class TinyModel:
    folder: Path
    onnx: bytes
    weights: bytes
    train: TinyScans
    validation: TinyScans
    history: list[dict[str, float]]
    best_epoch: int


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    from neuroloop.imaging.augment import AugmentParams, augment_batch
    from neuroloop.model import bundle, calibration, gate, network, training

    train, validation = tiny_scans(160), tiny_scans(60, first=1000)
    model = network.build(SIZE, arch="tiny", seed=1)
    generator = np.random.default_rng(1)
    shards = [augment_batch(train.images, generator, AugmentParams(rotation_degrees=5, shift=0.05)) for _ in range(4)]
    seen = []
    result = training.train(
        model,
        [lambda images=images: (images, train.labels) for images in shards],
        (validation.images, validation.labels),
        training.TrainConfig(epochs=24, learning_rate=4e-3, mixup=0, erasing=0, seed=1),
        on_epoch=lambda epoch, metrics: seen.append((epoch, metrics)),
    )
    assert [epoch for epoch, _ in seen] == list(range(result.epochs))
    onnx = training.export_onnx(model)
    exported = bundle.OnnxModel(onnx)
    fitted = gate.fit_gate(
        lambda images: exported.run(images).features, train.images, validation.images, np.random.default_rng(0)
    )
    weights = training.save_weights(model)
    folder = bundle.write(
        tmp_path_factory.mktemp("bundle"),
        onnx=onnx,
        gate=fitted,
        statistics=b'{"simulated": true}',
        image_size=SIZE,
        temperature=calibration.fit_temperature(exported.run(validation.images).logits, validation.labels),
        data_version="tiny",
        simulated=True,
        metrics={"val_macro_f1": result.history[result.best_epoch]["val_macro_f1"]},
        weights=weights,
    )
    return TinyModel(folder, onnx, weights, train, validation, result.history, result.best_epoch)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model: TinyModel) -> Path:
    """The folder of a bundle of simulated scans at 64 px."""
    return tiny_model.folder
