"""What the work on images costs as they become more, and what a second worker gains.

`make bench-scale` prints a table and writes bench/results/scale.json. It runs the very steps that Airflow maps over
shards, `audit_shard` and `prepare_shard`, in worker processes that are each bound to one core and share nothing but the
object store, and between them the joining of looks, groups and split, which is one task. The larger sets are made from
the smallest by transforming every image (see bench/data.py); with NEUROLOOP_REAL_DATA the images are real ones.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from report import save

from data import enlarged, original
from neuroloop.adapters.folder import FolderStore
from neuroloop.bootstrap import Services
from neuroloop.core import keys
from neuroloop.core.schemas import ImageEntry, Snapshot
from neuroloop.core.settings import Settings
from neuroloop.data.audit import judge, refuse_leaks
from neuroloop.loop import handoff, preparation, shards
from neuroloop.loop.folder_audit import list_folder
from neuroloop.loop.params import Params

VERSION, SIZE = "bench", 128
SHARDS = 8


def services_of(home: Path) -> Services:
    """The platform's parts on a folder; MLflow and the database are not asked."""
    return Services(Settings(home=home))


def stored(folder: Path, home: Path) -> int:
    """Put the images of a folder where `dvc push` would, with their snapshot; how many there are."""
    services, source = services_of(home), FolderStore(str(folder))
    entries = []
    for image in list_folder(source, str(folder)).images:
        content = source.get(image.key)
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        services.store.put(keys.image(md5), content)
        about = {"path": image.path, "label": image.label, "part": image.part, "sha256": image.sha256}
        entries.append(ImageEntry(**about, md5=md5, size=len(content)))
    snapshot = Snapshot(version=VERSION, source=str(folder), simulated=False, images=tuple(entries))
    services.store.put(keys.snapshot(VERSION), snapshot.model_dump_json().encode())
    return len(entries)


def work(home: Path, run: str, step: str, mine: list[str]) -> None:
    """One worker: its shards, one after the other. Prints its peak memory in MB."""
    services = services_of(home)
    for shard in mine:
        if step == "audit_shard":
            shards.audit_shard(services, run, shard)
        else:
            shards.prepare_shard(services, run, Params.of(services, {"image_size": SIZE, "minutes": 1}), shard)
    print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1000)


def shared_out(home: Path, run: str, step: str, workers: int) -> tuple[float, float]:
    """Seconds until `workers` processes, a core each, have done all shards, and the largest peak memory of one."""
    named, began = shards.names(SHARDS, 0), time.perf_counter()
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--work", str(core), str(home), run, step, *named[number::workers]],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number, core in enumerate(sorted(os.sched_getaffinity(0))[:workers])
    ]
    peaks = [float(process.communicate()[0].split()[-1]) for process in processes]
    return time.perf_counter() - began, max(peaks)


def joined(home: Path, run: str) -> float:
    """Seconds of what one task does between the two: join the looks, find groups, freeze the split."""
    services, began = services_of(home), time.perf_counter()
    snapshot = Snapshot.model_validate_json(services.store.get(keys.snapshot(VERSION)))
    looks = shards.looks_of(services, run, snapshot)
    split = preparation.write_splits(services, snapshot, judge(snapshot, looks))
    refuse_leaks(looks, split)
    return time.perf_counter() - began


def measured(folder: Path, home: Path) -> dict[str, float]:
    """One row of the table."""
    row: dict[str, float] = {"images": stored(folder, home)}
    services = services_of(home)
    for workers in (1, 2):
        run = f"workers-{workers}"
        handoff.keep(services, run, "check_source", {"split": "grouped"})
        handoff.keep(services, run, "download_data", {"version": VERSION, "shards": shards.names(SHARDS, 0)})
        row[f"audit_shard, {workers}, s"], peak = shared_out(home, run, "audit_shard", workers)
        row[f"join, {workers}, s"] = joined(home, run)
        row[f"prepare_shard, {workers}, s"], other = shared_out(home, run, "prepare_shard", workers)
        row[f"worker's peak, {workers}, MB"] = max(peak, other)
        handoff.drop_shards(services, run)
    for step in ("audit_shard", "prepare_shard"):
        row[f"{step}, gain"] = row[f"{step}, 1, s"] / row[f"{step}, 2, s"]
    return row


def main() -> None:
    """Measure, print, write."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--times", type=int, nargs="+", default=[1, 4, 10], help="sizes, as multiples of the first")
    options.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.work:
        core, home, run, step, *mine = chosen.work
        os.sched_setaffinity(0, {int(core)})
        work(Path(home), run, step, mine)
        return
    rows = []
    print(f"{'images':>8} {'audit_shard, s':>22} {'one task, s':>12} {'prepare_shard, s':>22} {'peak, MB':>9}")
    for times in chosen.times:
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder)
            row = measured(enlarged(original(base), times, base / "images"), base / "home")
        rows.append(row)
        both = " ".join(
            f"{row[f'{step}, 1, s']:7.1f} {row[f'{step}, 2, s']:7.1f} {row[f'{step}, gain']:5.2f}x" + between
            for step, between in (("audit_shard", f" {row['join, 2, s']:12.1f}"), ("prepare_shard", ""))
        )
        peak = max(row[f"worker's peak, {n}, MB"] for n in (1, 2))
        print(f"{row['images']:8.0f} {both} {peak:9.0f}", flush=True)
    report: dict[str, object] = {"rows": rows, "shards": SHARDS, "real": bool(os.environ.get("NEUROLOOP_REAL_DATA"))}
    if len(rows) > 1:
        counts = np.log([row["images"] for row in rows])
        for name in ("audit_shard, 1, s", "join, 2, s", "prepare_shard, 1, s"):
            exponent = float(np.polyfit(counts, np.log([row[name] for row in rows]), 1)[0])
            report[f"exponent of {name}"] = exponent
            print(f"{name.split(',')[0]}: time grows with the {exponent:.2f}th power of the images")
    save("scale", report)


if __name__ == "__main__":
    main()
