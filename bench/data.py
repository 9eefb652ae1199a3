"""How long the audit of a data set takes and how much memory, how that grows, and whether it finds what it should.

`make bench-data` prints a table and writes bench/results/data.json. The larger sets are made from the smallest by
transforming every image: flips and quarter turns, small crops, other intensities, other JPEG qualities. With
NEUROLOOP_REAL_DATA the images are real ones; without, they are simulated, fewer, and the table says so.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from report import save

from neuroloop.adapters.folder import FolderStore
from neuroloop.core.schemas import LABELS
from neuroloop.data import audit_report, findings, shortcuts, similarity
from neuroloop.data.audit import judge, look, own_split
from neuroloop.imaging.decode import decode, encode_png
from neuroloop.imaging.phantom import scan
from neuroloop.loop.folder_audit import audit_folder, list_folder

TIMES = (1, 4, 10)
"""Sizes of the sets, as multiples of the original one."""
SIMULATED = 1200
KNOWN = {"identical_across_parts": 216, "twins_across_parts": 992, "label_conflicts": 4}
"""What is known of the public set: see `neuroloop.data.audit_report.DEFINITIONS`."""


def transformed(pixels: np.ndarray, generator: np.random.Generator) -> bytes:
    """One more picture of the same scan, as JPEG."""
    height, width = pixels.shape
    top, left, bottom, right = generator.integers(0, 1 + max(height, width) // 20, size=4)
    cut = pixels[top : height - bottom, left : width - right].astype(np.float32)
    gamma, gain = generator.uniform(0.85, 1.2), generator.uniform(0.85, 1.1)
    seen = np.clip(255 * gain * (cut / 255) ** gamma, 0, 255).astype(np.uint8)
    turned = np.rot90(seen[:, ::-1] if generator.random() < 0.5 else seen, int(generator.integers(4)))
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(turned)).save(out, "JPEG", quality=int(generator.integers(70, 96)))
    return out.getvalue()


def original(folder: Path) -> Path:
    """The real images, or simulated ones in `folder`."""
    real = os.environ.get("NEUROLOOP_REAL_DATA")
    if real:
        return Path(real)
    for number in range(SIMULATED):
        label = LABELS[number % len(LABELS)]
        file = folder / "simulated" / ("Testing" if number % 5 == 0 else "Training") / label / f"{number:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_png(scan(label, number // len(LABELS)).pixels))
    return folder / "simulated"


def enlarged(source: Path, times: int, folder: Path) -> Path:
    """`source` and `times - 1` transformed copies of each of its images."""
    store = FolderStore(str(source))
    images = list_folder(store, str(source)).images

    def one(entry: tuple[int, str]) -> None:
        number, key = entry
        data = store.get(key)
        target = folder / key
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        pixels, generator = decode(data), np.random.default_rng(number)
        for copy in range(1, times):
            target.with_name(f"{target.stem}-{copy}.jpg").write_bytes(transformed(pixels, generator))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, enumerate(image.key for image in images)))
    return folder


def timed(folder: Path) -> dict[str, float]:
    """Audit a folder in this process: seconds in all and of each step, images, groups, peak memory in MB."""
    started = time.perf_counter()
    store = FolderStore(str(folder))
    listed = list_folder(store, str(folder))
    steps = {"list and hash": time.perf_counter() - started}

    def lap(name: str) -> None:
        steps[name] = time.perf_counter() - started - sum(steps.values())

    looks = look(listed.images, lambda image: store.get(image.key))
    lap("decode and measure")
    audit = judge(listed, looks)
    lap("groups and twins")
    own = own_split(audit, looks)
    labels = [image.label for image in looks.images]
    splits = {"source": own} if own else {}
    measured = shortcuts.measure(looks.traits, looks.thumbnails, labels, splits, generator=np.random.default_rng(0))
    lap("shortcuts, one split")
    found = findings.findings(audit, measured)
    audit_report.to_json(audit_report.document(audit, found, measured))
    audit_report.to_html(
        audit, found, measured, source="bench", images=listed.images, read=lambda image: store.get(image.key)
    )
    lap("reports")
    return {
        "images": len(listed.images),
        "groups": audit.components,
        "seconds": time.perf_counter() - started,
        **{f"{name}, s": seconds for name, seconds in steps.items()},
        "processor, s": time.process_time(),
        # Not getrusage: its peak outlives exec and would be that of the parent, where it was larger.
        "peak MB": int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1000,
    }


def _exponent(rows: list[dict[str, float]], name: str) -> float:
    return float(np.polyfit(np.log([row["images"] for row in rows]), np.log([row[name] for row in rows]), 1)[0])


def recall(source: Path) -> dict[str, object]:
    """What the audit finds on the original set, and whether its groups are those of comparing all pairs."""
    store = FolderStore(str(source))
    report = json.loads(audit_folder(store, str(source)).json_report)
    images = list_folder(store, str(source)).images
    looks = look(images, lambda image: store.get(image.key))
    kinds = [(image.label, image.part) for image in looks.images]
    started = time.perf_counter()
    roots, same, _ = similarity.connect(looks.thumbnails, kinds)
    quick = time.perf_counter() - started
    started = time.perf_counter()
    exact_roots, exact_same = _all_pairs(looks.thumbnails, kinds)
    slow = time.perf_counter() - started
    found: dict[str, object] = {
        "groups": report["groups"],
        "groups_of_all_readable": report["groups_of_all_readable"],
        "same_groups_as_all_pairs": bool((roots == exact_roots).all()),
        "twins_of_all_pairs_found": f"{len(set(same) & exact_same)} of {len(exact_same)}",
        "twins_that_are_none": len(set(same) - exact_same),
        "groups and twins, s": round(quick, 2),
        "all pairs, s": round(slow, 2),
        "wrong_modality": len(report["wrong_modality"]),
        "shortcuts": report["shortcuts"],
    }
    for name in KNOWN:
        found[name] = len(report[name]) if isinstance(report[name], list) else report[name]
    if os.environ.get("NEUROLOOP_REAL_DATA"):
        found["known"] = KNOWN
    return found


def _all_pairs(thumbnails: np.ndarray, kinds: list[tuple[str, str]]) -> tuple[np.ndarray, set[tuple[int, int]]]:
    """Roots and twins by comparing every image with every other in all eight ways."""
    images, roots = thumbnails.reshape(-1, similarity.SIDE, similarity.SIDE), np.arange(len(thumbnails))
    codes = np.array([sorted(set(kinds)).index(kind) for kind in kinds])
    same: set[tuple[int, int]] = set()
    for start in range(0, len(images), 512):
        block = images[start : start + 512]
        best = np.full((len(block), len(images)), -np.inf, np.float32)
        for way in _ways(block):
            np.maximum(best, way.reshape(len(block), -1) @ thumbnails.T, out=best)
        i, j = np.nonzero(best >= similarity.SIMILAR)
        roots = similarity._merge(roots, start + i, j)
        twin = (best[i, j] >= similarity.SAME) & (codes[start + i] != codes[j]) & (start + i < j)
        same.update(zip((start + i[twin]).tolist(), j[twin].tolist(), strict=True))
    return roots, same


def _ways(block: np.ndarray) -> Iterator[np.ndarray]:
    for quarter in range(4):
        turned = np.rot90(block, quarter, (1, 2))
        yield turned
        yield turned[:, :, ::-1]


def main() -> None:
    """Measure, print, write."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--time", type=Path, help=argparse.SUPPRESS)  # a set of its own process, for its peak memory
    alone: Path | None = arguments.parse_args().time
    if alone:
        print(json.dumps(timed(alone)))
        return
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as temporary:
        source = original(Path(temporary))
        for times in TIMES:
            folder = enlarged(source, times, Path(temporary) / f"times-{times}")
            done = subprocess.run(
                [sys.executable, __file__, "--time", str(folder)], check=True, stdout=subprocess.PIPE, text=True
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(rows[-1]), file=sys.stderr)
        found = recall(source)
    exponent = _exponent(rows, "seconds")
    for row in rows:
        row["growing, s"] = sum(
            row[f"{name}, s"] for name in ("list and hash", "decode and measure", "groups and twins")
        )
    growing = _exponent(rows, "growing, s")
    simulated = "NEUROLOOP_REAL_DATA" not in os.environ
    print(f"audit of {'SIMULATED' if simulated else 'real'} images and transformed copies of them")
    print("".join(f"{name:>22}" for name in rows[0]))
    for row in rows:
        print("".join(f"{value:22,.1f}" for value in row.values()))
    processor = _exponent(rows, "processor, s")
    print(
        f"seconds grow with images to the power of {exponent:.2f}, without what is sampled {growing:.2f}; "
        f"processor seconds, which other work on the machine does not change, {processor:.2f}"
    )
    for name, value in found.items():
        print(f"{name:32} {value}")
    exponents = {"seconds": exponent, "without what is sampled": growing, "processor seconds": processor}
    result = {"simulated": simulated, "sets": rows, "exponents": exponents, "original": found}
    save("data", result)


if __name__ == "__main__":
    main()
