"""How long one image takes, from bytes to heat map, as ratios to `keras.Model.predict` in the same run.

`make bench` prints a table and writes bench/results/inference.json. One core; the network is untrained, which changes
its answers and not its time.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np

from neuroloop.imaging.canonical import canonicalize
from neuroloop.imaging.decode import decode, encode_png
from neuroloop.imaging.phantom import scan
from neuroloop.model import network, training
from neuroloop.model.bundle import OnnxModel
from neuroloop.model.gate import measure

SIZE, REPEATS = 128, 60


def milliseconds(call: Callable[[], object]) -> float:
    """Median over `REPEATS` calls, after three that warm up."""
    taken = []
    for number in range(REPEATS + 3):
        started = time.perf_counter()
        call()
        if number >= 3:
            taken.append(time.perf_counter() - started)
    return 1000 * float(np.median(taken))


def main() -> None:
    """Measure, print, write."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    png = encode_png(scan("glioma", 0).pixels)
    pixels = decode(png)
    image = canonicalize(pixels, SIZE)[None]
    model = network.build(SIZE)
    exported = OnnxModel(training.export_onnx(model))
    tensor = image[..., None].astype(np.float32)
    steps = {
        "keras.Model.predict": milliseconds(lambda: model.predict(tensor, verbose=0)),
        "keras model(x)": milliseconds(lambda: model(tensor, training=False)),
        "ONNX Runtime: logits, heat map, features": milliseconds(lambda: exported.run(image)),
        "decode PNG, 224 px": milliseconds(lambda: decode(png)),
        "canonical form": milliseconds(lambda: canonicalize(pixels, SIZE)),
        "pixel measures of the gate": milliseconds(lambda: measure(image)),
    }
    peer = steps["keras.Model.predict"]
    rows = [
        {"step": step, "milliseconds": round(ms, 3), "times_faster": round(peer / ms, 1)} for step, ms in steps.items()
    ]
    print(f"{'one image, one core':42} {'ms':>8} {'x faster than keras.Model.predict':>34}")
    for row in rows:
        print(f"{row['step']:42} {row['milliseconds']:8.2f} {row['times_faster']:34.1f}")
    out = Path(__file__).parent / "results" / "inference.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"image_size": SIZE, "parameters": model.count_params(), "steps": rows}, indent=1))
    print(f"written to {out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out}")


if __name__ == "__main__":
    main()
