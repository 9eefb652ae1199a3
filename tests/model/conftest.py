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
_Y, _X = np.mgrid[:SIZE, :SIZE]


@dataclass(frozen=True)
class TinyScans:
    """Canonical simulated heads with marks that a tiny model learns in seconds, and where the marks lie."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    marks: NDArray[np.bool_]


def tiny_scans(heads: int, *, first: int = 0) -> TinyScans:
    """Four images of each simulated healthy head: with a dark ring, a bright disc above, one in the middle, and bare.

    The simulated lesions themselves take more images and minutes than a unit test has.
    """
    generator = np.random.default_rng(first)
    images, marks = [], []
    for index in range(first, first + heads):
        head = canonicalize(scan("notumor", index, size=96).pixels, SIZE)
        for label in LABELS:
            image, mark = head.copy(), np.zeros(head.shape, bool)
            if label != "notumor":
                row, column = {"glioma": (32, 16), "meningioma": (14, 32), "pituitary": (38, 32)}[label]
                distance = np.hypot(_Y - row - generator.uniform(-3, 3), _X - column - generator.uniform(-3, 3))
                mark = distance < 8
                image[mark] = 255
                if label == "glioma":
                    image[distance < 5] = 10
            images.append(image)
            marks.append(mark)
    return TinyScans(np.stack(images), np.arange(4 * heads) % 4, np.stack(marks))


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
    from neuroloop.model import bundle, calibration, export, gate_training, network, training

    train, validation = tiny_scans(40), tiny_scans(15, first=1000)
    model = network.build(SIZE, arch="tiny", seed=1)
    generator = np.random.default_rng(1)
    shards = [augment_batch(train.images, generator, AugmentParams(shift=0.05, flip=False)) for _ in range(4)]
    seen = []
    result = training.train(
        model,
        [lambda images=images: (images, train.labels) for images in shards],
        (validation.images, validation.labels),
        training.TrainConfig(epochs=20, learning_rate=4e-3, mixup=0, erasing=0, seed=1),
        on_epoch=lambda epoch, metrics: seen.append((epoch, metrics)),
    )
    assert [epoch for epoch, _ in seen] == list(range(result.epochs))
    onnx = export.export_onnx(model)
    exported = bundle.OnnxModel(onnx)
    fitted = gate_training.fit_gate(
        exported.answers,
        (train.images, train.labels),
        (validation.images, validation.labels),
        np.random.default_rng(0),
        steps=400,
        per_kind=40,
    )
    weights = export.save_weights(model)
    folder = bundle.write(
        tmp_path_factory.mktemp("bundle"),
        onnx=onnx,
        gate=fitted,
        statistics=b'{"simulated": true}',
        image_size=SIZE,
        architecture="tiny",
        calibration=calibration.fit(exported.run(validation.images).logits, validation.labels),
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


@pytest.fixture(scope="session")
def card():
    """A model card with every section filled."""
    from model.cards import FACTS
    from neuroloop.model.card import compose

    return compose(**FACTS)
