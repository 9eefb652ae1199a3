"""The build, step by step: one function per task of `data_and_model_build`.

Each step reads what earlier ones left under `runs/<run>/` in the store, computes, stores, and returns a small JSON
result, which is also kept as `runs/<run>/<step>.json`. A step may be repeated: its keys come from the run's id.
"""

import hashlib
import io
import json
import logging
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, ValidationError, model_validator

from neuroloop.bootstrap import Services
from neuroloop.core import keys
from neuroloop.core.errors import AlreadyExists, InvalidSetting, InvalidSource, NeuroLoopError, NotFound, OutdatedBundle
from neuroloop.core.ports import DataSource
from neuroloop.core.schemas import (
    LABELS,
    PARTS,
    RESEARCH_NOTICE,
    ArchitectureName,
    ImageEntry,
    Opening,
    Part,
    Promotion,
    Record,
    Snapshot,
    SourceFile,
    Split,
    SplitEntry,
    SplitName,
)
from neuroloop.data import audit_report, dataset, provenance, shortcuts, source, statistics
from neuroloop.data.audit import Audit, Looks, judge, look, own_split, refuse_leaks
from neuroloop.data.dataset import Arrays
from neuroloop.data.findings import Finding, findings, refuse
from neuroloop.data.shortcuts import Shortcuts
from neuroloop.imaging.augment import AugmentParams, augment_batch
from neuroloop.loop import promotion, splitting, versions
from neuroloop.model import card
from neuroloop.model.architectures import ARCHITECTURES
from neuroloop.model.bundle import CARD, CARD_DATA, Bundle, Manifest, with_card
from neuroloop.model.card import Card, compose

log = logging.getLogger("neuroloop.pipeline")

Result = dict[str, Any]
BUILD, RETRAINING = "data_and_model_build", "model_retraining"
SHARDS = 24
"""Epochs' worth of augmented training images; a longer training goes round them again."""
_MAP_IMAGES = 48
"""Training images that measure where the activation map lies; half as many change its offset by a hundredth."""


class Params(Record):
    """What a person may choose when triggering a build."""

    data_url: str
    minutes: float = Field(gt=0)
    epochs: int | None = Field(default=None, gt=0)
    image_size: int = Field(ge=32, le=512, multiple_of=16)
    seed: int = Field(ge=0)
    split: SplitName = "grouped"
    architecture: ArchitectureName = "compact"
    hyperparameters: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def of(cls, services: Services, given: dict[str, Any]) -> "Params":
        """The given values over the settings' defaults; empty ones count as not given."""
        settings = services.settings
        chosen = {key: value for key, value in given.items() if value not in (None, "")}
        architecture = ARCHITECTURES.get(chosen.get("architecture", settings.architecture))
        own_size = architecture is not None and "image_size" not in settings.model_fields_set
        defaults = {
            "data_url": settings.data_url,
            "minutes": settings.train_minutes,
            "image_size": architecture.image_size if architecture and own_size else settings.image_size,
            "seed": settings.seed,
            "architecture": settings.architecture,
        }
        if chosen.get("hyperparameters"):
            from neuroloop.model import hyperparameters  # TensorFlow: only where there is something to check

            chosen["hyperparameters"] = hyperparameters.checked(chosen["hyperparameters"])
        try:
            return cls.model_validate(defaults | chosen)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"])) or "combination of parameters"
            raise InvalidSetting(f"the {name} of this run is not valid", why=first["msg"]) from None

    @model_validator(mode="after")
    def _large_enough(self) -> "Params":
        minimum = ARCHITECTURES[self.architecture].minimum_size
        if self.image_size < minimum:
            raise ValueError(f"{self.architecture} takes images of {minimum} pixels and more, not {self.image_size}")
        return self


def keep(services: Services, run_id: str, step: str, result: Result) -> Result:
    """Store a step's result for later steps, and return it."""
    data = json.dumps(result, indent=1, sort_keys=True).encode()
    services.store.put(keys.run(run_id, f"{step}.json"), data, content_type="application/json")
    log.info("%s: %s", step, json.dumps(result)[:2000])
    return result


def kept(services: Services, run_id: str, step: str) -> Result:
    """What an earlier step of this run returned."""
    try:
        found: Result = json.loads(services.store.get(keys.run(run_id, f"{step}.json")))
    except NotFound:
        raise NotFound(
            f"run {run_id} has no result of {step}", why="that step has not run", fix=f"clear {step} in Airflow"
        ) from None
    return found


def tracked(services: Services, run_id: str, experiment: str = BUILD) -> str:
    """The MLflow run of a pipeline run."""
    return services.registry.open_run(run_id, experiment=experiment, tags={"neuroloop.pipeline": experiment})


# --- data ---------------------------------------------------------------------------------------


def check_source(services: Services, run_id: str, params: Params) -> Result:
    """Look at the source before anything is fetched. Raises `InvalidSource` with what was expected and found."""
    found = services.source(params.data_url, seed=params.seed)
    summary = source.check(found.files())
    if params.split == "legacy" and not any(map(dataset.is_test, summary["parts"])):
        raise InvalidSource(
            f"{found.url} has no test part of its own",
            why=f"the legacy split needs a part whose name starts with test; its parts: {summary['parts'] or 'none'}",
            fix="choose the grouped split",
        )
    services.pretrained(params.architecture)  # where its weights cannot be had, better now than after the audit
    about = {"source": found.url, "simulated": found.simulated, "split": params.split}
    return keep(services, run_id, "check_source", {**about, **summary})


def download_data(services: Services, run_id: str, params: Params) -> Result:
    """Fetch every image, verify it, and freeze the whole as one DVC version.

    Resumable: an image that this run has already fetched, by its recorded hash, is not fetched again.
    """
    origin = services.source(params.data_url, seed=params.seed)
    files = origin.files()
    workspace = services.settings.home / "dvc" / hashlib.sha256(origin.url.encode()).hexdigest()[:12]
    entries = _fetch(origin, files, workspace, run_id)
    expected = kept(services, run_id, "check_source")["images"]
    if len(entries) != expected:
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
    services.registry.set_tags(run, {"data_version": version, "simulated": str(origin.simulated).lower()})
    services.registry.log_params(run, {"data_url": origin.url, "data_version": version, "images": len(entries)})
    services.registry.log_bytes(run, "data/data.dvc", data_dvc)
    services.registry.log_bytes(run, "data/provenance.csv", provenance.provenance_csv(entries))
    result = {"version": version, "images": len(entries), "bytes": sum(entry.size for entry in entries)}
    origins = Counter(entry.origin for entry in entries)
    return keep(services, run_id, "download_data", {**result, "origins": dict(origins.most_common(20))})


def _fetch(origin: DataSource, files: list[SourceFile], workspace: Path, run_id: str) -> list[ImageEntry]:
    """Bring `files` to `workspace/data`, remove what is not of them, and describe each from what is on disk."""
    journal = workspace / "fetched" / f"{keys.safe_run_id(run_id)}.txt"
    journal.parent.mkdir(parents=True, exist_ok=True)
    done = dict(line.split(" ", 1)[::-1] for line in journal.read_text().splitlines()) if journal.exists() else {}
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
    with ThreadPoolExecutor(4) as pool, journal.open("a") as record:
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

    def progress(done: int, total: int) -> None:
        if done % 1000 == 0 or done == total:
            log.info("%d of %d images looked at", done, total)

    looks = look(snapshot.images, image_reader(services), progress=progress)
    report = judge(snapshot, looks)
    stops = services.settings.audit_stops
    _write_audit(services, run_id, snapshot, report)  # before anything may stop the run: people need the pictures
    refuse(findings(report), stops)
    split = write_splits(services, snapshot, report)
    refuse_leaks(looks, split)
    measured = _shortcuts(looks, report, split)
    found = _write_audit(services, run_id, snapshot, report, measured)
    refuse(found, stops)
    run = tracked(services, run_id)
    services.registry.log_bytes(run, "data/split.json", split.model_dump_json(indent=1).encode())
    counts = {part: len(split.of(part)) for part in PARTS}
    services.registry.log_params(run, {f"images_{part}": count for part, count in counts.items()})
    result = {**report.summary(), "quarantined": len(split.quarantined), "parts": counts}
    return keep(services, run_id, "audit_data", result)


def _shortcuts(looks: Looks[ImageEntry], report: Audit, split: Split) -> Shortcuts:
    """What can be told without a lesion, on the source's split and on ours; our test part stays closed."""
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
    found = findings(report, measured)
    document = audit_report.document(report, found, measured, source=snapshot.source)
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
    run = tracked(services, run_id)
    services.registry.log_bytes(run, "data/audit.json", data)
    services.registry.log_bytes(run, "data/audit.html", page)
    figures = {"data_leak_rate": report.leak_rate}
    figures |= {f"data_{name}": value for name, value in report.summary().items() if isinstance(value, int)}
    for name, scores in document["shortcuts"].items():
        where = {"legacy_test": scores["source"], "grouped_validation": scores["grouped"]}
        figures |= {f"{part}_shortcut_{name}_accuracy": score for part, score in where.items() if score is not None}
    services.registry.log_metrics(run, figures)
    return found


def write_splits(services: Services, snapshot: Snapshot, report: Audit) -> Split:
    """The grouped split of a snapshot, frozen; and the legacy one, where the source has a test part of its own."""
    split = splitting.freeze(services.store, snapshot, report)
    services.store.put(keys.split(split.version), split.model_dump_json().encode(), content_type="application/json")
    if any(dataset.is_test(entry.part) for entry in snapshot.images):
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
    captured = statistics.capture(split, image_reader(services))
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
    """Write the shards that training reads: each one epoch of canonical, augmented images."""
    split = run_split(services, run_id)
    arrays = dataset.canonical_arrays(split.of("train"), image_reader(services), params.image_size)
    result = write_shards(services, run_id, arrays, params.seed, simulated=split.simulated)
    return keep(services, run_id, "augment_input_data", result)


def write_shards(
    services: Services, run_id: str, arrays: Arrays, seed: int, *, simulated: bool, experiment: str = BUILD
) -> Result:
    """The training part and `SHARDS` augmented epochs of it, with parameters and a preview in MLflow."""
    settings = AugmentParams()
    services.store.put(keys.run(run_id, "train.npz"), arrays.to_bytes())
    generator = np.random.default_rng(seed)
    sizes = []
    for number, (images, labels) in enumerate(
        dataset.augmented_epochs(arrays, epochs=SHARDS, generator=generator, params=settings)
    ):
        services.store.put(_shard(run_id, number), dataset.pack(images=images, labels=labels))
        sizes.append(len(images))
        log.info("shard %d of %d: %d images", number + 1, SHARDS, len(images))
    run = tracked(services, run_id, experiment)
    services.registry.log_params(run, {f"augment_{name}": value for name, value in asdict(settings).items()})
    services.registry.log_bytes(run, "augmentation/preview.png", _preview(arrays, settings, seed, simulated))
    return {"images": len(arrays.images), "shards": SHARDS, "images_per_shard": sizes[0], **asdict(settings)}


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


# --- model --------------------------------------------------------------------------------------


def building_model(services: Services, run_id: str, params: Params) -> Result:
    """Train the network, calibrate it, fit its input gate, and pack the bundle that will be served."""
    version = kept(services, run_id, "download_data")["version"]
    result = fit(
        services,
        run_id,
        version=version,
        statistics_json=services.store.get(keys.run(run_id, "statistics.json")),
        size=params.image_size,
        seed=params.seed,
        epochs=params.epochs,
        minutes=params.minutes,
        architecture=params.architecture,
        hyperparameters=params.hyperparameters,
    )
    return keep(services, run_id, "building_model", result)


def fit(
    services: Services,
    run_id: str,
    *,
    version: str,
    statistics_json: bytes,
    size: int,
    seed: int,
    epochs: int | None,
    minutes: float,
    warm_start: bytes | None = None,
    learning_rate: float | None = None,
    architecture: ArchitectureName = "compact",
    hyperparameters: Mapping[str, Any] = {},
    experiment: str = BUILD,
) -> Result:
    """Train on the run's shards and leave `bundle.zip`; `warm_start` are weights to begin from."""
    # TensorFlow: only where a model is trained
    from neuroloop.model import calibration, devices, explanation, export, gate, network, training
    from neuroloop.model.bundle import OnnxModel, write
    from neuroloop.model.hyperparameters import configure

    run = tracked(services, run_id, experiment)
    config = configure(architecture, hyperparameters, epochs=epochs, minutes=minutes, seed=seed)
    if learning_rate is not None:
        config = replace(config, learning_rate=learning_rate)
    device = devices.prepare()
    weights = services.pretrained(architecture) if warm_start is None else None
    model = network.build(size, arch=architecture, seed=seed, weights=weights)
    if warm_start is not None:
        export.load_weights(model, warm_start)
    parameters = int(model.count_params())
    services.registry.log_params(
        run,
        {**{f"train_{name}": value for name, value in asdict(config).items()}, "image_size": size}
        | {"parameters": parameters, "warm_start": warm_start is not None, "device": device}
        | {"architecture": architecture, "pretrained": weights.name if weights else "none"},
    )
    services.registry.set_tags(run, {"architecture": architecture})
    held_out = {part: load_arrays(services, run_id, part) for part in ("train", "validation", "calibration")}

    def shard(number: int) -> Callable[[], tuple[Any, Any]]:
        def load() -> tuple[Any, Any]:
            arrays = dataset.unpack(services.store.get(_shard(run_id, number)))
            return arrays["images"], arrays["labels"]

        return load

    split = read_split(services, version, kept(services, run_id, "held_out")["split"])

    def on_epoch(epoch: int, metrics: dict[str, float]) -> None:
        prefix = f"{split.name}_validation_"
        named = {
            prefix + name.removeprefix("val_") if name.startswith("val_") else f"train_{name}": value
            for name, value in metrics.items()
        }
        services.registry.log_metrics(run, named, step=epoch)
        log.info("epoch %d: %s", epoch, ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))

    validation = held_out["validation"]
    outcome = training.train(
        model,
        [shard(number) for number in range(SHARDS)],
        (validation.images, validation.labels),
        config,
        on_epoch=on_epoch,
    )
    best = outcome.history[outcome.best_epoch]
    onnx = export.export_onnx(model)
    exported = OnnxModel(onnx, threads=2)
    scored = held_out["calibration"]
    calibrated = calibration.fit(exported.run(scored.images).logits, scored.labels, scored.groups)
    spread = np.linspace(0, len(held_out["train"].images) - 1, _MAP_IMAGES).astype(int)
    map_offset = explanation.displacement(exported.run, held_out["train"].images[spread])
    log.info("fitting the input gate")
    fitted = gate.fit_gate(
        lambda images: exported.run(images).features,
        held_out["train"].images,
        validation.images,
        np.random.default_rng(seed),
    )
    with tempfile.TemporaryDirectory() as folder:
        write(
            Path(folder),
            onnx=onnx,
            gate=fitted,
            statistics=statistics_json,
            image_size=size,
            architecture=architecture,
            calibration=calibrated,
            map_offset=map_offset,
            data_version=version,
            split=split.name,
            simulated=split.simulated,
            metrics={"val_macro_f1": best["val_macro_f1"]},
            weights=export.save_weights(model),
        )
        services.store.put(keys.run(run_id, "bundle.zip"), _zipped(Path(folder)))
    services.registry.log_metrics(
        run,
        {"temperature": calibrated.temperature, "refer_below": calibrated.refer_below}
        | {"train_seconds_total": outcome.seconds},
    )
    return {
        "epochs": outcome.epochs,
        "best_epoch": outcome.best_epoch,
        "seconds": round(outcome.seconds, 1),
        "val_macro_f1": round(best["val_macro_f1"], 4),
        "temperature": round(calibrated.temperature, 4),
        "parameters": parameters,
        "settings": {name: value for name, value in asdict(config).items() if value is not None},
    }


def evaluate_model(
    services: Services,
    run_id: str,
    experiment: str = BUILD,
    *,
    corrections: Callable[[int], Arrays] | None = None,
) -> Result:
    """Score the candidate, the trivial baselines and the champion on the same test part.

    `corrections` gives the held-out corrections at an image size, where there are any; both models are scored on them
    too. A run on the legacy split meets no champion: that one may have trained on the very test images.
    """
    from neuroloop.loop import scoring  # plots and forests: slow to load, and only this step needs them

    held_out = kept(services, run_id, "held_out")
    split = read_split(services, held_out["version"], held_out["split"])
    run = tracked(services, run_id, experiment)
    test = open_test(services, run_id, "score the candidate, the baselines and the champion", experiment)
    train, validation, calibration = (load_arrays(services, run_id, part) for part in PARTS if part != "test")
    for part, arrays in zip(PARTS, (train, validation, calibration, test), strict=True):
        log_dataset(services, run, split, part, arrays)
    with open_bundle(services, run_id) as candidate:
        log.info("scoring the candidate on %d images, then under stress", len(test.images))
        probabilities = candidate.predict(test.images).probabilities
        result = scoring.scores_of(candidate, probabilities, split, train, calibration, test)
        plots = scoring.plots_of(candidate, probabilities, split, test)
        if corrections is not None:
            result["feedback"] = scoring.scores_on(candidate, corrections(candidate.image_size))
    champion = services.registry.by_alias("champion") if split.name == "grouped" else None
    result["champion"] = result["outdated"] = None
    if champion is not None:
        try:
            result["champion"] = score_champion(services, champion.version, split, test, corrections)
        except OutdatedBundle as error:
            log.warning("the champion, version %s, cannot be compared: %s", champion.version, error)
            result["outdated"] = {"version": champion.version, "reason": str(error)}
    services.registry.log_metrics(run, scoring.metrics_of(result))
    for name, plot in plots.items():
        services.registry.log_bytes(run, f"evaluation/{name}", plot)
    services.registry.log_bytes(run, "evaluation/scores.json", json.dumps(result, indent=1).encode())
    return keep(services, run_id, "evaluate_model", result)


def score_champion(
    services: Services,
    champion: str,
    split: Split,
    test: Arrays,
    corrections: Callable[[int], Arrays] | None = None,
) -> Result:
    """The champion's scores on the candidate's test part and the held-out corrections, in its own image size."""
    from neuroloop.loop import scoring

    with tempfile.TemporaryDirectory() as folder:
        bundle = Bundle.load(services.registry.download_bundle(champion, Path(folder)), threads=2)
        if bundle.image_size != test.images.shape[1]:
            test = dataset.canonical_arrays(split.of("test"), image_reader(services), bundle.image_size)
        scores = scoring.scores_on(bundle, test)
        result: Result = {"version": champion, "test": scores, "simulated": bundle.manifest.simulated}
        if corrections is not None:
            result["feedback"] = scoring.scores_on(bundle, corrections(bundle.image_size))
        return result


def log_dataset(services: Services, run: str, split: Split, part: Part, arrays: Arrays) -> None:
    """Tell MLflow that a run read a part, identified by the pixels and labels the model saw."""
    digest = hashlib.sha256(arrays.images.tobytes() + arrays.labels.tobytes()).hexdigest()[:32]
    contexts = {"train": "training", "validation": "validation", "calibration": "calibration", "test": "testing"}
    counts = np.bincount(arrays.labels, minlength=len(LABELS)).tolist()
    profile = {
        "images": len(arrays.labels),
        "groups": len(set(arrays.groups.tolist())),
        "image_size": arrays.images.shape[1],
        "data_version": split.version,
        "simulated": split.simulated,
        **dict(zip(LABELS, counts, strict=True)),
    }
    services.registry.log_dataset(
        run, f"{split.name}_{part}", digest, context=contexts[part], source=f"dvc:{split.version}", profile=profile
    )


def register_model(services: Services, run_id: str, experiment: str = BUILD) -> Result:
    """Put the model card into the bundle and register it in MLflow as a new version; once per run."""
    evaluated = kept(services, run_id, "evaluate_model")
    run = tracked(services, run_id, experiment)
    with unzipped(services.store.get(keys.run(run_id, "bundle.zip"))) as folder:
        if Bundle.load(folder).card is None:  # a repeated registration keeps the card of the first
            with_card(folder, model_card(services, run_id, Bundle.load(folder).manifest, experiment))
            services.store.put(keys.run(run_id, "bundle.zip"), _zipped(folder))
        bundle = Bundle.load(folder)
        tags = {
            "data_version": evaluated["data_version"],
            "simulated": str(evaluated["simulated"]).lower(),
            "split": bundle.manifest.split,
            "architecture": bundle.manifest.architecture,
            "pipeline": experiment,
            "test_macro_f1": f"{evaluated['test']['macro_f1']:.4f}",
            "test_accuracy": f"{evaluated['test']['accuracy']:.4f}",
            "notice": RESEARCH_NOTICE,
            "bundle_sha256": bundle.sha256,
        }
        text = (folder / CARD).read_text()
        for name in (CARD, CARD_DATA):
            services.registry.log_bytes(run, f"model-card/{name}", (folder / name).read_bytes())
        registered = services.registry.register(run, folder, tags=tags, description=text)
        shortcomings = [limit for limit in bundle.card.limits if limit not in card.ALWAYS] if bundle.card else []
    result = {"version": registered.version, **tags, "shortcomings": shortcomings}
    return keep(services, run_id, "register_model", result)


def model_card(services: Services, run_id: str, manifest: Manifest, experiment: str) -> Card:
    """The model card from what this run's steps returned and what is known of its data version."""
    trained = kept(services, run_id, "retrain_model" if experiment == RETRAINING else "building_model")
    version = manifest.data_version
    split = read_split(services, version, manifest.split)
    audited = json.loads(services.store.get(keys.audit(version)))
    snapshot = Snapshot.model_validate_json(services.store.get(keys.snapshot(version)))
    augmentation: Result = {}
    if experiment != RETRAINING:
        shards = kept(services, run_id, "augment_input_data")
        augmentation = {name: shards[name] for name in asdict(AugmentParams()) if name in shards}
    return compose(
        model=card.Model(
            architecture=manifest.architecture,
            parameters=trained.get("parameters"),
            image_size=manifest.image_size,
            canonical_version=manifest.canonical_version,
            created_at=manifest.created_at,
            run_id=run_id,
            pipeline=experiment,
            from_version=trained.get("from_version"),
        ),
        data=card.Data(
            version=version,
            source=snapshot.source,
            simulated=manifest.simulated,
            split=manifest.split,
            parts={part: len(split.of(part)) for part in PARTS},
            groups={part: len({entry.group for entry in split.of(part)}) for part in PARTS},
            quarantined=len(split.quarantined),
            leak_rates={part["name"]: part["leak_rate"] for part in audited["parts"]},
            shortcuts=audited["shortcuts"],
            licences=tuple(sorted({entry.licence for entry in snapshot.images if entry.licence})),
        ),
        calibration=manifest.calibration,
        evaluated=kept(services, run_id, "evaluate_model"),
        trained=trained,
        augmentation=augmentation,
        test_openings=sum(opening.split == manifest.split for opening in openings(services, version)),
    )


def promote_model(services: Services, run_id: str, experiment: str = BUILD) -> Result:
    """Decide, move the aliases, and write the ledger: the reason in words, whichever way it goes."""
    version = kept(services, run_id, "register_model")["version"]
    evaluated = kept(services, run_id, "evaluate_model")
    current = services.registry.by_alias("champion")
    met = (evaluated["champion"] or evaluated["outdated"] or {}).get("version")
    frozen = evaluated["split"] == "grouped"
    if frozen and current is not None and current.version not in (version, met):
        log.info("version %s became champion since the evaluation: comparing with it", current.version)
        evaluated = reevaluate(services, run_id, experiment)
        met = current.version
    candidate = promotion.Scores(
        test=evaluated["test"],
        feedback=evaluated.get("feedback") or {},
        simulated=evaluated["simulated"],
        split=evaluated["split"],
        leaked=evaluated.get("leaked", {}).get("share"),
    )
    before = evaluated["champion"]
    champion = (
        promotion.Scores(test=before["test"], feedback=before.get("feedback") or {}, simulated=before["simulated"])
        if before
        else None
    )
    promoted, checks = promotion.decide(
        candidate,
        champion,
        evaluated["baselines"],
        retraining=experiment == RETRAINING,
        outdated=(evaluated["outdated"] or {}).get("reason", ""),
    )
    row = Promotion(
        run_id=run_id,
        version=version,
        previous=met,
        promoted=promoted,
        checks=checks,
        metrics={"candidate": evaluated["test"], "champion": before and before["test"]}
        | {"feedback": {"candidate": evaluated.get("feedback"), "champion": before and before.get("feedback")}},
    )
    if promoted:
        if met:
            services.registry.set_alias("previous", met)
        services.registry.set_alias("champion", version)
    elif frozen:
        services.registry.set_alias("challenger", version)
    services.log.record_promotion(row)
    run = tracked(services, run_id, experiment)
    services.registry.set_tags(run, {"promoted": str(promoted).lower(), "promotion_reason": row.reason[:4000]})
    services.registry.close_run(run)
    result = {"version": version, "previous": met, "promoted": promoted, "reason": row.reason}
    return keep(services, run_id, "promote_model", result)


def reevaluate(services: Services, run_id: str, experiment: str) -> Result:
    """Evaluate again where another run promoted its model in between."""
    if experiment == RETRAINING:
        from neuroloop.loop import retraining

        return retraining.evaluate_model(services, run_id)
    return evaluate_model(services, run_id)


def send_email(services: Services, run_id: str, experiment: str = BUILD) -> Result:
    """Tell the operator how the run ended, and drop the shards, which no later step reads."""
    promoted, evaluated = kept(services, run_id, "promote_model"), kept(services, run_id, "evaluate_model")
    registered = kept(services, run_id, "register_model")
    test = evaluated["test"]
    verdict = "is the new champion" if promoted["promoted"] else "was not promoted"
    subject = f"NeuroLoop {experiment}: version {promoted['version']} {verdict}"
    simulated = " (simulated scans)" if evaluated["simulated"] else ""
    part = {
        "grouped": "its frozen test part, split by groups of twins",
        "legacy": "the source's own test part, which has twins in training and compares with nothing here",
    }[registered["split"]]
    recalls = [f"recall {name}: {test[f'recall_{name}']:.3f}" for name in LABELS if f"recall_{name}" in test]
    shortcomings = registered["shortcomings"] or ["Every measured figure reaches its target."]
    body = "\n".join(
        [
            f"Run {run_id} of {experiment} ended. Model version {promoted['version']} {verdict}.",
            "",
            promoted["reason"],
            "",
            f"Data version {evaluated['data_version']}{simulated}. On {part}:",
            f"macro-F1 {test['macro_f1']:.3f} ({test['macro_f1_low']:.3f} to {test['macro_f1_high']:.3f}), "
            f"accuracy {test['accuracy']:.3f}, calibration error {test['ece']:.3f}.",
            *recalls,
            "",
            "What falls short:",
            *(f"- {each}" for each in shortcomings),
            "",
            f"The model card stands with the version: {services.settings.mlflow_page}/#/models",
            f"Compare the runs: {services.settings.mlflow_page}/#/experiments",
        ]
    )
    services.notifier.send(subject, body)
    for number in range(SHARDS):
        services.store.delete(_shard(run_id, number))
    return keep(services, run_id, "send_email", {"subject": subject})


# --- hand-off -----------------------------------------------------------------------------------


def read_split(services: Services, version: str, name: SplitName = "grouped") -> Split:
    """A split of a data version. Raises `NotFound`, for the legacy one where the source declares no test part."""
    key = keys.split(version) if name == "grouped" else keys.legacy_split(version)
    try:
        return Split.model_validate_json(services.store.get(key))
    except NotFound as error:
        why = "the source has no part of its own whose name starts with test, or one that lacks a class"
        raise NotFound(
            f"data version {version} has no {name} split",
            why=why if name == "legacy" else str(error),
            fix="choose the grouped split" if name == "legacy" else "clear audit_data in Airflow",
        ) from None


def run_split(services: Services, run_id: str) -> Split:
    """The split that a build works on, of the data version it downloaded."""
    version = kept(services, run_id, "download_data")["version"]
    return read_split(services, version, kept(services, run_id, "check_source").get("split", "grouped"))


def image_reader(services: Services) -> Callable[[ImageEntry | SplitEntry], bytes]:
    """Reads a snapshot's image from the store, by its content hash."""
    return lambda entry: services.store.get(keys.image(entry.md5))


def load_arrays(services: Services, run_id: str, part: str) -> Arrays:
    """A part's canonical arrays as this run wrote them. Raises `NeuroLoopError` for the test part: see `open_test`."""
    if part == "test":
        raise NeuroLoopError(
            "the test part is not loaded like the others",
            why="each look at it is logged, so that nobody can choose a model by it unseen",
            fix="call open_test(services, run_id, why)",
        )
    return Arrays.from_bytes(services.store.get(keys.run(run_id, f"{part}.npz")))


def open_test(services: Services, run_id: str, why: str, experiment: str = BUILD) -> Arrays:
    """The test part's canonical arrays as this run wrote them; the only way to them, and every call is logged."""
    held_out = kept(services, run_id, "held_out")
    log_opening(services, run_id, why, version=held_out["version"], split=held_out["split"], experiment=experiment)
    return Arrays.from_bytes(services.store.get(keys.run(run_id, "test.npz")))


def log_opening(
    services: Services, run_id: str, why: str, *, version: str, split: SplitName = "grouped", experiment: str = BUILD
) -> Opening:
    """Write down, in the store and in MLflow, that test images of a data version are looked at, before they are."""
    number = 1
    while True:
        opening = Opening(run_id=run_id, number=number, version=version, split=split, why=why)
        try:
            key = keys.opening(run_id, number)
            services.store.create(key, opening.model_dump_json().encode(), content_type="application/json")
            break
        except AlreadyExists:
            number += 1
    tags = {"test_openings": str(number), "test_opened_for": why}
    services.registry.set_tags(tracked(services, run_id, experiment), tags)
    log.info("opened the %s test part of data version %s, time %d of this run: %s", split, version, number, why)
    return opening


def openings(services: Services, version: str = "") -> list[Opening]:
    """Every opening of a test part so far, of one data version or of all, oldest first."""
    found = [Opening.model_validate_json(services.store.get(key)) for key in services.store.list(keys.TEST_OPENINGS)]
    return sorted((each for each in found if version in ("", each.version)), key=lambda each: each.at)


@contextmanager
def open_bundle(services: Services, run_id: str) -> Iterator[Bundle]:
    """The candidate of this run, verified."""
    with unzipped(services.store.get(keys.run(run_id, "bundle.zip"))) as folder:
        yield Bundle.load(folder, threads=2)


@contextmanager
def unzipped(data: bytes) -> Iterator[Path]:
    """The files of a zip archive of ours in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(io.BytesIO(data)) as archive:
        archive.extractall(folder)
        yield Path(folder)


def _zipped(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    return buffer.getvalue()


def _shard(run_id: str, number: int) -> str:
    return keys.run(run_id, f"shards/{number:03d}.npz")
