"""The build's first half: the steps from a source to the arrays that training, calibration and evaluation read."""

import contextlib
import fcntl
import hashlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np

from neuroloop.bootstrap import Services
from neuroloop.core import keys
from neuroloop.core.errors import InvalidSource
from neuroloop.core.ports import DataSource
from neuroloop.core.schemas import LABELS, PARTS, ImageEntry, Snapshot, SourceFile, Split, SplitName
from neuroloop.data import audit_report, dataset, provenance, shortcuts, source, statistics
from neuroloop.data.audit import Audit, Looks, judge, own_split, refuse_leaks
from neuroloop.data.dataset import Arrays
from neuroloop.data.findings import Finding, findings, refuse
from neuroloop.data.packed import pack
from neuroloop.data.shortcuts import Shortcuts
from neuroloop.imaging.augment import AugmentParams, augment_batch
from neuroloop.loop import shards, splitting, versions
from neuroloop.loop.handoff import (
    BUILD,
    RETRAINING,
    SHARDS,
    Result,
    begin,
    drop_stale,
    image_reader,
    in_use,
    keep,
    kept,
    log,
    read_split,
    run_split,
    shard_key,
    tracked,
)
from neuroloop.loop.params import Params

LEAST_IMAGES = 10
"""In the training and the validation part: what `gate_training.fit_gate` takes."""


def check_source(services: Services, run_id: str, params: Params) -> Result:
    """Look at the source before anything is fetched. Raises `InvalidSource` with what was expected and found.

    Cleared in a run that was stopped by its data, it makes the run fetch every image anew.
    """
    begin(services, run_id, BUILD)
    found = services.source(params.data_url, seed=params.seed)
    _journal(_workspace(services, found), run_id).unlink(missing_ok=True)
    summary = source.check(found.files())
    if params.split == "legacy" and not any(map(source.is_test, summary["parts"])):
        raise InvalidSource(
            f"{found.url} has no test part of its own",
            why=f"the legacy split needs a part whose name starts with test; its parts: {summary['parts'] or 'none'}",
            fix="choose the grouped split",
        )
    services.pretrained(params.architecture)  # where its weights cannot be had, better now than after the audit
    about = {"source": found.url, "simulated": found.simulated, "split": params.split}
    about["ignored"] = found.ignored
    return keep(services, run_id, "check_source", {**about, **summary})


def download_data(services: Services, run_id: str, params: Params) -> Result:
    """Fetch every image, verify it, and freeze the whole as one DVC version.

    Resumable: an image that an unfinished try of this run has fetched, by its recorded hash, is not fetched again.
    """
    drop_stale(services)
    origin = services.source(params.data_url, seed=params.seed)
    workspace = _workspace(services, origin)
    with _alone_in(workspace):
        entries = _fetch(origin, origin.files(), workspace, run_id)
        expected = kept(services, run_id, "check_source")["images"]
        if len(entries) != expected:
            _journal(workspace, run_id).unlink()
            raise InvalidSource(
                f"{origin.url} changed while it was read",
                why=f"check_source saw {expected} images and download_data {len(entries)}",
                fix="trigger the run again when nothing writes to the source",
            )
        version, data_dvc = services.versions.commit(workspace)
    snapshot = Snapshot(version=version, source=origin.url, simulated=origin.simulated, images=tuple(entries))
    services.store.put(keys.data_dvc(version), data_dvc)
    services.store.put(keys.snapshot(version), snapshot.model_dump_json().encode(), content_type="application/json")
    run = tracked(services, run_id)
    # Tags, not parameters, which never change: what is wrong in a source is mended, and the run goes on.
    about = {"data_version": version, "images": str(len(entries)), "simulated": str(origin.simulated).lower()}
    services.registry.set_tags(run, about)
    services.registry.log_params(run, {"data_url": origin.url})
    services.registry.log_bytes(run, "data/data.dvc", data_dvc)
    services.registry.log_bytes(run, "data/provenance.csv", provenance.provenance_csv(entries))
    origins = Counter(entry.origin for entry in entries)
    result = {
        "version": version,
        "images": len(entries),
        "bytes": sum(entry.size for entry in entries),
        "origins": dict(origins.most_common(20)),
        "shards": shards.names(params.shards, len(entries)),
    }
    keep(services, run_id, "download_data", result)
    # Here, and not by `check_source` alone: that may be cleared on another worker, which shares no disk with this one.
    _journal(workspace, run_id).unlink(missing_ok=True)
    return result


def _workspace(services: Services, origin: DataSource) -> Path:
    return services.settings.home / "dvc" / hashlib.sha256(origin.url.encode()).hexdigest()[:12]


def _journal(workspace: Path, run_id: str) -> Path:
    return workspace / "fetched" / f"{keys.safe_run_id(run_id)}.txt"


@contextlib.contextmanager
def _alone_in(workspace: Path) -> Iterator[None]:
    """Wait until no other run, of Airflow or the command line, fetches into `workspace` or versions it."""
    workspace.mkdir(parents=True, exist_ok=True)
    with (workspace / "run.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another run that downloads the same source into %s", workspace)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(origin: DataSource, files: list[SourceFile], workspace: Path, run_id: str) -> list[ImageEntry]:
    """Bring `files` to `workspace/data`, remove what is not of them, and describe each from what is on disk."""
    journal = _journal(workspace, run_id)
    journal.parent.mkdir(parents=True, exist_ok=True)
    lines = journal.read_text().splitlines() if journal.exists() else []
    # A power cut may leave half a line; its image is fetched again.
    done = {path: sha256 for sha256, _, path in (line.partition(" ") for line in lines)}
    wanted = {source.snapshot_path(file): file for file in files}
    if len(wanted) != len(files):
        raise InvalidSource("Two files of one class have the same name", fix="rename them in the source")
    root = workspace / "data"
    for old in root.rglob("*"):
        if old.is_file() and old.relative_to(root).as_posix() not in wanted:
            old.unlink()

    def one(path: str) -> ImageEntry:
        target, file = root / path, wanted[path]
        data = target.read_bytes() if path in done and target.exists() else b""
        if hashlib.sha256(data).hexdigest() != done.get(path):
            data = origin.read(file)
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = target.with_name(f".{target.name}.part")
            fresh.write_bytes(data)
            # A link into DVC's cache must not be written through.
            target.unlink(missing_ok=True)
            fresh.rename(target)
        sha256 = hashlib.sha256(data).hexdigest()
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        published = provenance.recover_source(file.path, file.label, data)
        return ImageEntry(
            path=path,
            label=file.label,
            part=file.part,
            md5=md5,
            sha256=sha256,
            size=len(data),
            source_path=file.path,
            licence=provenance.licence_of(published, origin.licence),
            origin=published,
        )

    entries = []
    with ThreadPoolExecutor(4) as pool, journal.open("a", buffering=1) as record:  # a kill loses no whole line
        for number, entry in enumerate(pool.map(one, sorted(wanted)), 1):
            entries.append(entry)
            if done.get(entry.path) != entry.sha256:
                record.write(f"{entry.sha256} {entry.path}\n")
            if number % 500 == 0 or number == len(wanted):
                log.info("%d of %d images", number, len(wanted))
    return entries


def audit_data(services: Services, run_id: str) -> Result:
    """Quarantine what cannot be used, group twins, and freeze a split in which no group stands in two parts."""
    version = kept(services, run_id, "download_data")["version"]
    snapshot = Snapshot.model_validate_json(services.store.get(keys.snapshot(version)))
    looks = shards.looks_of(services, run_id, snapshot)
    report = judge(snapshot, looks)
    stops = services.settings.audit_stops
    # Written before anything may stop the run: people need the pictures.
    refuse(_write_audit(services, run_id, snapshot, report), stops)
    split = write_splits(services, snapshot, report)
    refuse_few(run_split(services, run_id))
    refuse_leaks(looks, split)
    measured = _shortcuts(looks, report, split)
    report = report.model_copy(update={"quarantined": split.quarantined})  # what lies between two parts is, too
    found = _write_audit(services, run_id, snapshot, report, measured)
    refuse(found, stops)
    run, own = tracked(services, run_id), run_split(services, run_id)
    services.registry.log_bytes(run, "data/split.json", own.model_dump_json(indent=1).encode())
    counts = {part: len(own.of(part)) for part in PARTS}
    services.registry.log_params(run, {"split": own.name})
    services.registry.set_tags(run, {f"images_{part}": str(n) for part, n in counts.items()})
    result = {**report.summary(), "quarantined": len(own.quarantined), "parts": counts}
    return keep(services, run_id, "audit_data", result)


def refuse_few(split: Split) -> None:
    """Raise `InvalidSource` where a part is too small for the gate to learn from, or to set its threshold on.

    Of a group in training it is shown one image.
    """
    counts = {"train": len({entry.group for entry in split.of("train")}), "validation": len(split.of("validation"))}
    for part, count in counts.items():
        if count < LEAST_IMAGES:
            raise InvalidSource(
                f"The {part} part has only {count} unlike images",
                why=f"the input gate needs {LEAST_IMAGES} at least, and what is found on so few means nothing",
                fix="add images; some 30 of each class, all unlike, are enough",
            )


def _shortcuts(looks: Looks[ImageEntry], report: Audit, split: Split) -> Shortcuts:
    """What can be told without a lesion, on the source's split and on ours; of ours, the test part stays closed.

    The source's own parts are taken whole: what is scored there are rules, to describe the source, and no model.
    """
    own = own_split(report, looks)
    train = looks.indices({entry.path for entry in split.of("train")})
    held_out = looks.indices({entry.path for entry in split.of("validation", "calibration")})
    return shortcuts.measure(
        looks.traits,
        looks.thumbnails,
        [entry.label for entry in looks.images],
        {**({"source": own} if own else {}), "grouped": (train, held_out)},
        generator=np.random.default_rng(0),
    )


def _write_audit(
    services: Services, run_id: str, snapshot: Snapshot, report: Audit, measured: Shortcuts | None = None
) -> tuple[Finding, ...]:
    """The audit's report in the store and in MLflow, for people and programs, and its figures as metrics."""
    ignored = kept(services, run_id, "check_source").get("ignored", {})
    found = findings(report, measured, ignored)
    document = audit_report.document(report, found, measured, source=snapshot.source, ignored=ignored)
    data = audit_report.to_json(document)
    page = audit_report.to_html(
        report,
        found,
        measured,
        source=snapshot.source,
        images=snapshot.images,
        read=image_reader(services),
        note="Simulated scans" if snapshot.simulated else "",
    )
    services.store.put(keys.audit(report.version), data, content_type="application/json")
    services.store.put(keys.audit_page(report.version), page, content_type="text/html; charset=utf-8")
    services.store.put(keys.LATEST_AUDIT, report.version.encode(), content_type="text/plain")
    run = tracked(services, run_id)
    services.registry.log_bytes(run, "data/audit.json", data)
    services.registry.log_bytes(run, "data/audit.html", page)
    figures = {"data_leak_rate": report.leak_rate}
    figures |= {f"data_{name}": value for name, value in report.summary().items() if isinstance(value, int)}
    for name, scores in document["shortcuts"].items():
        where = {"legacy_test": scores["source"], "grouped_held_out": scores["grouped"]}
        figures |= {f"{part}_shortcut_{name}_accuracy": score for part, score in where.items() if score is not None}
    services.registry.log_metrics(run, figures)
    return found


def write_splits(services: Services, snapshot: Snapshot, report: Audit) -> Split:
    """The grouped split of a snapshot, frozen; and the legacy one, where the source has a test part of its own."""
    split = splitting.freeze(services.store, snapshot, report)
    services.store.put(keys.split(split.version), split.model_dump_json().encode(), content_type="application/json")
    if any(source.is_test(entry.part) for entry in snapshot.images):
        try:
            legacy = dataset.source_split(snapshot, report)
        except InvalidSource as error:  # as in a source that tests on some classes only; the build needs it not
            log.info("no legacy split: %s", error)
        else:
            key, data = keys.legacy_split(split.version), legacy.model_dump_json().encode()
            services.store.put(key, data, content_type="application/json")
    return split


def capture_statistics(services: Services, run_id: str) -> Result:
    """What the training images look like, the reference for drift, and what changed since the previous data version.

    Raises `InvalidSource` where something changed by more than the settings allow; the version is then not accepted,
    and the next one is compared with the same previous version again.
    """
    split = run_split(services, run_id)
    snapshot = Snapshot.model_validate_json(services.store.get(keys.snapshot(split.version)))
    captured = statistics.capture(split, shards.measures_of(services, run_id, split))
    data = captured.model_dump_json(indent=1).encode()
    services.store.put(keys.run(run_id, "statistics.json"), data, content_type="application/json")
    run = tracked(services, run_id)
    services.registry.log_bytes(run, "statistics/statistics.json", data)
    for name, png in statistics.plots(captured, image_reader(services)).items():
        services.registry.log_bytes(run, f"statistics/{name}", png)
    result: Result = {
        "classes": {
            label: {"images": sum(figures.images.values()), "mean": figures.mean, "deviation": figures.deviation}
            for label, figures in captured.classes.items()
        }
    }
    if split.name == "grouped":  # the legacy split's training part is another one: versions could not be compared
        services.store.put(keys.statistics(split.version), data, content_type="application/json")
        result["changes"] = _check_changes(services, run, snapshot, captured)
        versions.accept(services.store, snapshot, run_id)
    return keep(services, run_id, "capture_statistics", result)


def _check_changes(
    services: Services, run: str, snapshot: Snapshot, captured: statistics.Statistics
) -> dict[str, object] | None:
    """What changed since the previous data version, in MLflow and in brief. Raises `InvalidSource` beyond the limit."""
    comparison = versions.compare_with_previous(services.store, snapshot, captured)
    if comparison is None:
        return None
    services.registry.log_bytes(run, "statistics/comparison.json", comparison.model_dump_json(indent=1).encode())
    services.registry.log_metrics(run, {"data_psi_max": comparison.psi_max})
    services.registry.set_tags(run, {"previous_data_version": comparison.previous, "data_shift": comparison.grade})
    limit = services.settings.statistics_stop_psi
    if limit and comparison.psi_max > limit:
        raise InvalidSource(
            f"The data changed too much since version {comparison.previous}",
            why=f"the largest population stability index is {comparison.psi_max:.2f}, at most {limit:g} is allowed; "
            f"{comparison.summary()}",
            fix="look at statistics/comparison.json in MLflow; if the change is wanted, set "
            f"NEUROLOOP_STATISTICS_STOP_PSI above {comparison.psi_max:.2f} or to 0, and clear the task",
        )
    return comparison.summary()


def augment_input_data(services: Services, run_id: str, params: Params) -> Result:
    """Join what `prepare_shard` made of the training part, for the steps that want it whole, and show samples of it.

    Blocks beyond its own are those of an attempt on a larger one, before the source was mended: they are removed.
    """
    split = run_split(services, run_id)
    arrays = shards.training_part(services, run_id, split)
    blocks = len(dataset.blocks(split.of("train")))
    wanted = {shard_key(run_id, epoch, block) for epoch in range(SHARDS) for block in range(blocks)}
    for key in services.store.list(keys.run(run_id, "shards") + "/"):
        if key not in wanted:
            services.store.delete(key)
    result = _keep_training_part(services, run_id, arrays, params.seed, simulated=split.simulated, experiment=BUILD)
    return keep(services, run_id, "augment_input_data", {"epochs": SHARDS, "blocks": blocks, **result})


def write_shards(services: Services, run_id: str, arrays: Arrays, seed: int, *, simulated: bool) -> None:
    """The training part of a retraining, corrections included, and `SHARDS` augmented epochs of it."""
    generator = np.random.default_rng(seed)
    in_use(services, run_id)
    for epoch, (images, labels) in enumerate(
        dataset.augmented_epochs(arrays, epochs=SHARDS, generator=generator, params=AugmentParams())
    ):
        services.store.put(shard_key(run_id, epoch), pack(images=images, labels=labels))
    _keep_training_part(services, run_id, arrays, seed, simulated=simulated, experiment=RETRAINING)


def _keep_training_part(
    services: Services, run_id: str, arrays: Arrays, seed: int, *, simulated: bool, experiment: str
) -> Result:
    settings = AugmentParams()
    services.store.put(keys.run(run_id, "train.npz"), arrays.to_bytes())
    run = tracked(services, run_id, experiment)
    services.registry.log_params(run, {f"augment_{name}": value for name, value in asdict(settings).items()})
    services.registry.log_bytes(run, "augmentation/preview.png", _preview(arrays, settings, seed, simulated))
    return {"images": len(arrays.images), **asdict(settings)}


def _preview(arrays: Arrays, settings: AugmentParams, seed: int, simulated: bool) -> bytes:
    """One row a class: a canonical training image, then five augmented copies of it."""
    generator, rows = np.random.default_rng(seed), {}
    for number, label in enumerate(LABELS):
        image = arrays.images[arrays.labels == number][:1]
        rows[label] = [*image, *augment_batch(np.repeat(image, 5, axis=0), generator, settings)]
    return statistics.grid(rows, title="Training images and augmented copies", simulated=simulated)


def transform_testing_data(services: Services, run_id: str, params: Params) -> Result:
    """Write the held-out parts in canonical form, not augmented."""
    split = run_split(services, run_id)
    result = write_held_out(services, run_id, split.version, params.image_size, split.name)
    return keep(services, run_id, "transform_testing_data", result)


def write_held_out(services: Services, run_id: str, version: str, size: int, name: SplitName = "grouped") -> Result:
    """Canonical arrays of validation, calibration and test under the run's keys."""
    split = read_split(services, version, name)
    counts: dict[str, int] = {}
    for part in PARTS:
        if part != "train":
            arrays = dataset.canonical_arrays(split.of(part), image_reader(services), size)
            services.store.put(keys.run(run_id, f"{part}.npz"), arrays.to_bytes())
            counts[part] = len(arrays.images)
    return keep(services, run_id, "held_out", {"version": version, "split": name, "image_size": size, **counts})
