"""Whether heat maps point at the lesion, on simulated scans whose lesion is known.

`python bench/explanation.py --bundle FOLDER` looks at a model trained on simulated scans; `--minutes M` trains the
compact network on 1,200 of them first. Prints the share of scans whose hottest pixel lies in the lesion, dilated by 5 %
of the width, with the chance level and the check against shuffled weights; JSON in bench/results/explanation.json.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
from report import save

from neuroloop.core.schemas import LABELS
from neuroloop.imaging.augment import AugmentParams, augment_batch
from neuroloop.imaging.canonical import canonicalize
from neuroloop.imaging.phantom import scan
from neuroloop.model import explanation
from neuroloop.model.bundle import Bundle, OnnxModel

PER_CLASS, SHARDS, TARGET = 300, 12, 0.80


def trained(minutes: float, size: int, seed: int) -> bytes:
    """The ONNX file of the compact network after `minutes` on simulated scans."""
    from neuroloop.model import export, network, training

    print(f"rendering {4 * PER_CLASS} simulated scans", flush=True)
    images = np.stack(
        [canonicalize(scan(label, index, seed=seed).pixels, size) for index in range(PER_CLASS) for label in LABELS]
    )
    labels = np.arange(len(images)) % len(LABELS)
    held_out = np.arange(len(images)) >= 0.9 * len(images)
    generator = np.random.default_rng(seed)
    own, classes = images[~held_out], labels[~held_out]
    shards = [augment_batch(own, generator, AugmentParams()) for _ in range(SHARDS)]
    model = network.build(size, seed=seed)
    training.train(
        model,
        [lambda augmented=augmented: (augmented, classes) for augmented in shards],
        (images[held_out], labels[held_out]),
        training.TrainConfig(minutes=minutes, seed=seed),
        on_epoch=lambda epoch, figures: print(f"epoch {epoch}: macro-F1 {figures['val_macro_f1']:.3f}", flush=True),
    )
    return export.export_onnx(model)


def main() -> None:
    """Train or load, check, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="folder of a bundle trained on simulated scans")
    parser.add_argument("--minutes", type=float, default=3.0, help="of training, where no bundle is given")
    parser.add_argument("--size", type=int, default=128, help="canonical image, where no bundle is given")
    parser.add_argument("--scans", type=int, default=100, help="of each tumour class to look at")
    parser.add_argument("--scanner", default="A", help="A, as in training, or B, which the model has not met")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.bundle:
        bundle = Bundle.load(given.bundle)
        onnx, offset = bundle.onnx, bundle.manifest.map_offset
        network = OnnxModel(onnx, threads=2)
    else:
        onnx = trained(given.minutes, given.size, given.seed)
        network = OnnxModel(onnx, threads=2)
        seen = [scan(label, index, seed=given.seed).pixels for label in LABELS for index in range(8)]
        offset = explanation.displacement(network.run, np.stack([canonicalize(one, network.size) for one in seen]))
    shuffled = OnnxModel(explanation.randomised(onnx, np.random.default_rng(given.seed)), threads=2)
    found = explanation.check(
        network.run, shuffled.run, network.size, offset=offset, per_class=given.scans, scanner=given.scanner
    )
    pointing = found.pointing
    print(
        f"the map lies {offset[0]:+.3f} of the width below and {offset[1]:+.3f} right of what it speaks of: taken back"
    )
    print(f"{pointing.scans} scans of scanner {given.scanner}, {pointing.shown:.1%} called a tumour")
    print(f"hottest pixel in the lesion: {pointing.hits:.1%} (target {TARGET:.0%}, chance {pointing.chance:.1%})")
    for label, share in pointing.per_class.items():
        print(f"  {label:12} {share:.1%}")
    print(f"rank correlation with the maps of shuffled weights: {found.randomised_correlation:.2f}")
    result = found.model_dump() | {
        "map_offset": offset,
        "scanner": given.scanner,
        "target": TARGET,
        "reached": pointing.hits >= TARGET,
    }
    save("explanation", result | {"minutes": None if given.bundle else given.minutes})


if __name__ == "__main__":
    main()
