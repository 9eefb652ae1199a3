"""How long one image takes, from bytes to heat map, as ratios to `keras.Model.predict` in the same run.

`make bench-inference` prints a table and writes bench/results/inference.json. One core. Also whether the exported
network answers as the Keras one does, on 200 images, and how large the bundle is. Without `--bundle FOLDER` the network
is untrained, which changes its answers and not its time. The 200 images are simulated scans, or real ones where
`NEUROLOOP_REAL_DATA` names a folder of them.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
from numpy.typing import NDArray
from report import save

from neuroloop.core.schemas import LABELS
from neuroloop.imaging.canonical import canonicalize, head_box, place
from neuroloop.imaging.decode import decode, encode_png
from neuroloop.imaging.phantom import scan
from neuroloop.model import calibration, export, gate_training, network
from neuroloop.model.bundle import Bundle, OnnxModel, write
from neuroloop.model.calibration import softmax

IMAGES, ROUNDS, REPEATS, SIZE = 200, 6, 20, 128
TARGETS = {"milliseconds": 3.0, "times_faster": 20.0, "difference": 1e-4, "megabytes": 10.0}


def milliseconds(*calls: Callable[[], object]) -> list[tuple[float, float]]:
    """Median and tenth percentile of each call: `ROUNDS` times in turn, so that a busy spell of the machine hits all.

    Each turn is `REPEATS` calls after three that warm up, for a server's caches hold its own network, not a rival's.
    The tenth percentile is what a quiet core takes where other work disturbs the median.
    """
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, times in zip(calls, taken, strict=True):
            for number in range(REPEATS + 3):
                started = time.perf_counter()
                call()
                if number >= 3:
                    times.append(time.perf_counter() - started)
    return [(1000 * float(np.median(times)), 1000 * float(np.quantile(times, 0.1))) for times in taken]


def pixels_of(count: int) -> tuple[str, list[NDArray[np.uint8]]]:
    """`count` scans, all classes in turn, and what they are."""
    real = os.environ.get("NEUROLOOP_REAL_DATA")
    if real:
        files = sorted(path for path in Path(real).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        chosen = files[:: max(1, len(files) // count)][:count]
        return "real scans", [decode(path.read_bytes()) for path in chosen]
    return "simulated scans", [scan(LABELS[number % 4], number // 4).pixels for number in range(count)]


def untrained_bundle(images: NDArray[np.uint8], folder: Path) -> Path:
    """A whole bundle around an untrained network, its gate and calibration fitted on `images`."""
    model = network.build(SIZE)
    onnx = export.export_onnx(model)
    exported = OnnxModel(onnx)
    labels = np.arange(len(images)) % len(LABELS)
    fitted = gate_training.fit_gate(
        exported.answers,
        (images, labels),
        (images[::4], labels[::4]),
        np.random.default_rng(0),
        steps=10,
        per_kind=30,
    )
    return write(
        folder,
        onnx=onnx,
        gate=fitted,
        statistics=b"{}",
        image_size=SIZE,
        architecture="compact",
        calibration=calibration.fit(exported.run(images).logits, labels),
        data_version="none",
        simulated=True,
        metrics={},
        weights=export.save_weights(model),
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="folder of a bundle; default: one around an untrained network")
    given = parser.parse_args().bundle
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    kind, pixels = pixels_of(IMAGES)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given or untrained_bundle(np.stack([canonicalize(one, SIZE) for one in pixels]), Path(temporary))
        bundle = Bundle.load(folder)
        files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    size = bundle.image_size
    images = np.stack([canonicalize(one, size) for one in pixels])

    # The same weights on both sides: the bundle's own, which it keeps in half precision, or an untrained network's.
    model = network.build(size, arch=bundle.manifest.architecture)
    assert bundle.weights is not None
    export.load_weights(model, bundle.weights)
    exported = OnnxModel(export.export_onnx(model))
    tensors = images[..., None].astype(np.float32)
    expected, found = model.predict(tensors, verbose=0), exported.run(images)
    temperature = bundle.manifest.calibration.temperature
    largest = float(np.abs(expected["logits"]).max())
    difference = {
        "probabilities": float(
            np.abs(softmax(found.logits, temperature) - softmax(expected["logits"], temperature)).max()
        ),
        "logits": float(np.abs(found.logits - expected["logits"]).max()),
        "cam, of the largest logit": float(np.abs(found.cam - expected["cam"]).max()) / largest,
        "same class": float((found.logits.argmax(axis=1) == expected["logits"].argmax(axis=1)).mean()),
    }

    one, tensor, png = images[:1], tensors[:1], encode_png(pixels[0])
    outputs = bundle.predict(one)

    def explained() -> object:
        return bundle.heat(bundle.predict(one).cam[0], 0)

    def everything() -> object:
        grey = decode(png)
        canonical = canonicalize(grey, size)
        said = bundle.predict(canonical[None])
        bundle.gate.judge(canonical, float(said.novelty[0]))
        return place(bundle.heat(said.cam[0], int(said.logits[0].argmax())), head_box(grey), grey.shape)

    names = (
        "keras.Model.predict",
        "keras model(x)",
        "network: logits, map, features",
        "network and heat map",
        "decode PNG",
        "canonical form",
        "gate",
        "all: bytes to heat map",
    )
    times = milliseconds(
        lambda: model.predict(tensor, verbose=0),
        lambda: model(tensor, training=False),
        lambda: exported.run(one),
        explained,
        lambda: decode(png),
        lambda: canonicalize(pixels[0], size),
        lambda: bundle.gate.judge(one[0], float(outputs.novelty[0])),
        everything,
    )
    taken = dict(zip(names, times, strict=True))
    (peer, quiet_peer), (network_ms, quiet_ms) = taken["keras.Model.predict"], taken["network and heat map"]
    rows = [
        {
            "step": step,
            "milliseconds": round(ms, 3),
            "times_faster": round(peer / ms, 1),
            "milliseconds_p10": round(quiet, 3),
            "times_faster_p10": round(quiet_peer / quiet, 1),
        }
        for step, (ms, quiet) in taken.items()
    ]
    megabytes = sum(files.values()) / 1e6
    reached = {
        "milliseconds": network_ms <= TARGETS["milliseconds"],
        # Like for like: both give logits, map and features, in one pass.
        "times_faster": peer / taken["network: logits, map, features"][0] >= TARGETS["times_faster"],
        "difference": max(difference["probabilities"], difference["logits"]) <= TARGETS["difference"],
        "megabytes": megabytes <= TARGETS["megabytes"],
    }

    print(f"{'one image, one core':32} {'median ms':>10} {'x faster':>9} {'10th pct. ms':>13} {'x faster':>9}")
    for row in rows:
        figures = [row[name] for name in ("milliseconds", "times_faster", "milliseconds_p10", "times_faster_p10")]
        print(f"{row['step']:32} {figures[0]:10.2f} {figures[1]:9.1f} {figures[2]:13.2f} {figures[3]:9.1f}")
    print("x faster: than keras.Model.predict in this run")
    print(f"\nagainst Keras on {IMAGES} {kind}, largest difference:")
    for what, value in difference.items():
        print(f"{what:32} {value:8.2g}")
    print(f"\nbundle: {megabytes:.2f} MB ({', '.join(f'{file} {count / 1e6:.2f}' for file, count in files.items())})")
    print("targets: " + ", ".join(f"{what} {'reached' if ok else 'MISSED'}" for what, ok in reached.items()))
    result = {
        "architecture": bundle.manifest.architecture,
        "image_size": size,
        "parameters": model.count_params(),
        "trained": given is not None,
        "steps": rows,
        "network_and_heat_map_ms": round(network_ms, 3),
        "times_faster_than_keras_predict": round(peer / network_ms, 1),
        "network_and_heat_map_ms_p10": round(quiet_ms, 3),
        "times_faster_than_keras_predict_p10": round(quiet_peer / quiet_ms, 1),
        "images_compared": len(images),
        "images": kind,
        "largest_difference": difference,
        "bundle_bytes": files,
        "bundle_megabytes": round(megabytes, 3),
        "targets": TARGETS,
        "reached": reached,
    }
    save("inference", result)


if __name__ == "__main__":
    main()
