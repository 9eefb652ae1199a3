"""How fast images are augmented and learned from, and what the result is worth on real scans.

`make bench-training` prints the rates as ratios to Keras's `ImageDataGenerator` and to the four-conv network of known
systems, in one run. With `--scores` it also trains the compact network on the real images that
`NEUROLOOP_REAL_DATA` names, once per seed, on the grouped split, and with `--split legacy` on the split that the set
comes with (there the leaked images are told apart). JSON goes to bench/results/training.json.
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
from report import FOLDER, save

from neuroloop.adapters.folder import FolderStore
from neuroloop.core.schemas import LABELS, PARTS, ImageEntry, Part, Snapshot, Split
from neuroloop.data import dataset, source
from neuroloop.data.audit import audit
from neuroloop.data.dataset import Arrays
from neuroloop.imaging.augment import AugmentParams, augment_batch
from neuroloop.imaging.canonical import canonicalize
from neuroloop.imaging.phantom import scan
from neuroloop.loop.handoff import SHARDS
from neuroloop.model import calibration, evaluation, network, training
from neuroloop.model.bundle import OnnxModel
from neuroloop.model.export import export_onnx

BATCH = 64


def images_per_second(call: Callable[[], int], seconds: float = 4.0) -> float:
    """Images a second of repeated `call`s, each of which returns how many images it made; one call warms up."""
    call()
    made, began = 0, time.perf_counter()
    while (took := time.perf_counter() - began) < seconds:
        made += call()
    return made / took


def input_pipelines(size: int) -> dict[str, float]:
    """Augmented images a second, in one process, with the same ranges: ours and Keras's `ImageDataGenerator`."""
    images = np.stack([canonicalize(scan(LABELS[i % 4], i).pixels, size) for i in range(BATCH)])
    params, generator = AugmentParams(), np.random.default_rng(0)
    keras_generator = tf.keras.preprocessing.image.ImageDataGenerator(
        rotation_range=params.rotation_degrees,
        width_shift_range=params.shift,
        height_shift_range=params.shift,
        shear_range=params.shear_degrees,
        zoom_range=params.zoom,
        horizontal_flip=params.flip,
        fill_mode="nearest",
    )
    flow = keras_generator.flow(images[..., None].astype(np.float32), batch_size=BATCH, seed=0)
    ours = images_per_second(lambda: len(augment_batch(images, generator, params)))
    theirs = images_per_second(lambda: len(next(flow)))
    return {"ours": ours, "ImageDataGenerator": theirs}


def training_rates() -> dict[str, float]:
    """Images a second of a training step: the compact network at 128 px, the four-conv one of known systems at 224."""
    rates = {}
    for arch, size in (("compact", 128), ("conv224", 224)):
        images = np.random.default_rng(0).integers(0, 256, (BATCH * 4, size, size), dtype=np.uint8)
        labels = np.arange(len(images)) % len(LABELS)
        seen: list[float] = []
        config = training.TrainConfig(epochs=3)
        training.train(
            network.build(size, arch=arch),
            [lambda images=images, labels=labels: (images, labels)],
            (images[:BATCH], labels[:BATCH]),
            config,
            on_epoch=lambda _, metrics, seen=seen: seen.append(metrics["images_per_second"]),
        )
        rates[arch] = max(seen)
    return rates


def snapshot_of(folder: Path) -> tuple[Snapshot, dict[str, bytes]]:
    """The images of `part/class/file` in `folder`, and their bytes by path."""
    origin = source.ObjectSource(folder.as_uri(), FolderStore(str(folder)))
    entries, data = [], {}
    for file in origin.files():
        content = origin.read(file)
        path = source.snapshot_path(file)
        data[path] = content
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        sha256 = hashlib.sha256(content).hexdigest()
        entries.append(
            ImageEntry(path=path, label=file.label, part=file.part, md5=md5, sha256=sha256, size=len(content))
        )
    version = hashlib.sha256("".join(entry.sha256 for entry in entries).encode()).hexdigest()
    return Snapshot(version=version, source=origin.url, simulated=False, images=tuple(entries)), data


def scores(
    split: Split, parts: dict[Part, Arrays], *, minutes: float | None, epochs: int | None, seed: int
) -> dict[str, Any]:
    """Train on one split with one seed and score its test part, as the build does."""
    size = parts["train"].images.shape[1]
    shards = list(
        dataset.augmented_epochs(
            parts["train"], epochs=SHARDS, generator=np.random.default_rng(seed), params=AugmentParams()
        )
    )
    model = network.build(size, seed=seed)

    def progress(epoch: int, metrics: dict[str, float]) -> None:
        if epoch % 5 == 0:
            print(f"  seed {seed} epoch {epoch}: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()), flush=True)

    result = training.train(
        model,
        [lambda shard=shard: shard for shard in shards],
        (parts["validation"].images, parts["validation"].labels),
        training.TrainConfig(minutes=minutes, epochs=epochs, seed=seed),
        on_epoch=progress,
    )
    exported = OnnxModel(export_onnx(model), threads=2)
    held_out = parts["calibration"]
    calibrated = calibration.fit(exported.run(held_out.images).logits, held_out.labels, held_out.groups)
    test = parts["test"]
    probabilities = calibrated.probabilities(exported.run(test.images).logits)
    found: dict[str, Any] = {
        "seed": seed,
        "epochs": result.epochs,
        "seconds": result.seconds,
        "test": evaluation.evaluate(probabilities, test.labels, test.groups, generator=np.random.default_rng(0)),
        "coverage": evaluation.coverage(
            probabilities, test.labels, test.groups, calibrated, generator=np.random.default_rng(0)
        ),
        "accuracy_at_85": evaluation.risk_coverage(probabilities, test.labels).at(0.85),
    }
    if split.name == "legacy":
        hit = probabilities.argmax(axis=1) == test.labels
        leaked = np.isin(test.paths, list(split.leaked))
        found["leaked_accuracy"], found["unleaked_accuracy"] = float(hit[leaked].mean()), float(hit[~leaked].mean())
    return found


def main() -> None:
    """Measure, print, write."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--scores", action="store_true", help="train on the real images; takes seeds x minutes")
    options.add_argument("--split", choices=("grouped", "legacy"), default="grouped")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--division", type=int, default=0, help="another one of the groups; the platform's is 0")
    options.add_argument("--minutes", type=float, default=25.0)
    options.add_argument("--epochs", type=int, help="instead of minutes: the same result however busy the machine is")
    options.add_argument("--size", type=int, default=128)
    chosen = options.parse_args()
    out = FOLDER / "training.json"
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}

    if not chosen.scores:
        result["input_pipeline"] = {}
        print(f"{'augmented images a second, one process':42} {'ours':>8} {'Keras':>8} {'ratio':>7}")
        for size in (128, 224):
            rates = input_pipelines(size)
            ratio = rates["ours"] / rates["ImageDataGenerator"]
            result["input_pipeline"][str(size)] = {**rates, "ratio": ratio}
            print(f"{f'{size} px':42} {rates['ours']:8.0f} {rates['ImageDataGenerator']:8.0f} {ratio:7.1f}")
        rates = training_rates()
        result["training"] = {**rates, "ratio": rates["compact"] / rates["conv224"]}
        print(f"{'images a second in training':42} {rates['compact']:8.0f} {rates['conv224']:8.0f} "
              f"{result['training']['ratio']:7.1f}   (compact at 128 px, four-conv at 224 px)")  # fmt: skip
        save("training", result)
    else:
        folder = os.environ.get("NEUROLOOP_REAL_DATA")
        if not folder:
            raise SystemExit("--scores needs real images: set NEUROLOOP_REAL_DATA to a folder of part/class/images")
        snapshot, data = snapshot_of(Path(folder))
        report_ = audit(snapshot, lambda entry: data[entry.path])
        split = (
            dataset.source_split(snapshot, report_, seed=chosen.division)
            if chosen.split == "legacy"
            else dataset.make_split(snapshot, report_, seed=chosen.division)
        )
        parts: dict[Part, Arrays] = {
            part: dataset.canonical_arrays(split.of(part), lambda entry: data[entry.path], chosen.size)
            for part in PARTS
        }
        train, test_part = parts["train"], parts["test"]
        rules = evaluation.baselines(train.images, train.labels, test_part.images, test_part.labels)
        name = chosen.split + (f", division {chosen.division}" if chosen.division else "")
        result.setdefault("baselines", {})[name] = rules
        print(", ".join(f"{rule} {value:.3f}" for rule, value in rules.items()), flush=True)
        runs = result.setdefault("scores", {})[name] = []
        for seed in chosen.seeds:
            minutes = None if chosen.epochs else chosen.minutes
            found = scores(split, parts, minutes=minutes, epochs=chosen.epochs, seed=seed)
            runs.append(found)
            test = found["test"]
            recalls = ", ".join(f"{label} {test[f'recall_{label}']:.3f}" for label in LABELS)
            print(f"{name}, seed {seed}: macro-F1 {test['macro_f1']:.4f} ({test['macro_f1_low']:.4f} to "
                  f"{test['macro_f1_high']:.4f}), accuracy {test['accuracy']:.4f}, ECE {test['ece']:.4f}; recall "
                  f"{recalls}; at 85 % coverage {found['accuracy_at_85']:.4f}; "
                  f"{found['epochs']} epochs in {found['seconds']:.0f} s", flush=True)  # fmt: skip
            if "leaked_accuracy" in found:
                print(f"  leaked images {found['leaked_accuracy']:.4f}, others {found['unleaked_accuracy']:.4f}",
                      flush=True)  # fmt: skip
            save("training", result)


if __name__ == "__main__":
    main()
