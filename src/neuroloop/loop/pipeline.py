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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from neuroloop.bootstrap import Services
from neuroloop.core import keys
from neuroloop.core.errors import InvalidSource, NotFound
from neuroloop.core.schemas import (
    LABELS,
    PARTS,
    RESEARCH_NOTICE,
    ImageEntry,
    Part,
    Promotion,
    Record,
    Snapshot,
    SourceFile,
    Split,
    SplitEntry,
)
from neuroloop.data import dataset, source, statistics
from neuroloop.data.audit import audit
from neuroloop.data.dataset import Arrays
from neuroloop.imaging.augment import AugmentParams, augment_batch
from neuroloop.loop import promotion
from neuroloop.model.bundle import Bundle

log = logging.getLogger("neuroloop.pipeline")

Result = dict[str, Any]
BUILD, RETRAINING = "data_and_model_build", "model_retraining"
SHARDS = 12
"""Epochs' worth of augmented training images; a longer training goes round them again."""


class Params(Record):
    """What a person may choose when triggering a build."""

    data_url: str
    minutes: float = Field(gt=0)
    epochs: int | None = Field(default=None, gt=0)
    image_size: int = Field(ge=32, le=512, multiple_of=16)
    seed: int = Field(ge=0)

    @classmethod
    def of(cls, services: Services, given: dict[str, Any]) -> "Params":
        """The given values over the settings' defaults; empty ones count as not given."""
        settings = services.settings
        defaults = {
            "data_url": settings.data_url,
            "minutes": settings.train_minutes,
            "image_size": settings.image_size,
            "seed": settings.seed,
        }
        return cls.model_validate(defaults | {key: value for key, value in given.items() if value not in (None, "")})


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
    return keep(services, run_id, "check_source", {"source": found.url, "simulated": found.simulated, **summary})


def download_data(services: Services, run_id: str, params: Params) -> Result:
    """Fetch every image, verify it, and freeze the whole as one DVC version.

    Resumable: an image that this run has already fetched, by its recorded hash, is not fetched again.
    """
    origin = services.source(params.data_url, seed=params.seed)
    files = origin.files()
    workspace = services.settings.home / "dvc" / hashlib.sha256(origin.url.encode()).hexdigest()[:12]
    entries = _fetch(origin.read, files, workspace, run_id)
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
    result = {"version": version, "images": len(entries), "bytes": sum(entry.size for entry in entries)}
    return keep(services, run_id, "download_data", result)


def _fetch(
    read: Callable[[SourceFile], bytes], files: list[SourceFile], workspace: Path, run_id: str
) -> list[ImageEntry]:
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
            data = read(file)
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = target.with_name(f".{target.name}.part")
            fresh.write_bytes(data)
            # A link into DVC's cache must not be written through.
            target.unlink(missing_ok=True)
            fresh.rename(target)
        sha256 = hashlib.sha256(data).hexdigest()
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        return ImageEntry(path=path, label=file.label, part=file.part, md5=md5, sha256=sha256, size=len(data))

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

    report = audit(snapshot, image_reader(services), progress=progress)
    frozen: dict[str, Part] = {}
    if services.store.exists(keys.SPLIT_REGISTRY):
        frozen = json.loads(services.store.get(keys.SPLIT_REGISTRY))
    # Always the same seed: which part an image stands in must not depend on a run's choice.
    split = dataset.make_split(snapshot, report, frozen=frozen)
    services.store.put(keys.SPLIT_REGISTRY, json.dumps(dataset.registry(split, frozen)).encode())
    services.store.put(keys.split(version), split.model_dump_json().encode(), content_type="application/json")
    run = tracked(services, run_id)
    services.registry.log_bytes(run, "data/audit.json", report.model_dump_json(indent=1).encode())
    services.registry.log_bytes(run, "data/split.json", split.model_dump_json(indent=1).encode())
    counts = {part: len(split.of(part)) for part in PARTS}
    services.registry.log_params(run, {f"images_{part}": count for part, count in counts.items()})
    result = {**report.summary(), "quarantined": len(split.quarantined), "parts": counts}
    return keep(services, run_id, "audit_data", result)


def capture_statistics(services: Services, run_id: str) -> Result:
    """Per-class figures of the data as JSON, the reference for drift, and as plots in MLflow."""
    split = read_split(services, kept(services, run_id, "download_data")["version"])
    captured = statistics.capture(split, image_reader(services))
    data = captured.model_dump_json(indent=1).encode()
    services.store.put(keys.run(run_id, "statistics.json"), data, content_type="application/json")
    run = tracked(services, run_id)
    services.registry.log_bytes(run, "statistics/statistics.json", data)
    for name, png in statistics.plots(captured, image_reader(services)).items():
        services.registry.log_bytes(run, f"statistics/{name}", png)
    scalars = {
        label: {"images": sum(figures.images.values()), "mean": figures.mean, "deviation": figures.deviation}
        for label, figures in captured.classes.items()
    }
    return keep(services, run_id, "capture_statistics", {"classes": scalars})


def augment_input_data(services: Services, run_id: str, params: Params) -> Result:
    """Write the shards that training reads: each one epoch of canonical, augmented images."""
    split = read_split(services, kept(services, run_id, "download_data")["version"])
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
    version = kept(services, run_id, "download_data")["version"]
    result = write_held_out(services, run_id, version, params.image_size)
    return keep(services, run_id, "transform_testing_data", result)


def write_held_out(services: Services, run_id: str, version: str, size: int) -> Result:
    """Canonical arrays of validation, calibration and test under the run's keys."""
    split = read_split(services, version)
    counts: dict[str, int] = {}
    for part in PARTS:
        if part != "train":
            arrays = dataset.canonical_arrays(split.of(part), image_reader(services), size)
            services.store.put(keys.run(run_id, f"{part}.npz"), arrays.to_bytes())
            counts[part] = len(arrays.images)
    return {"image_size": size, **counts}


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
    experiment: str = BUILD,
) -> Result:
    """Train on the run's shards and leave `bundle.zip`; `warm_start` are weights to begin from."""
    from neuroloop.model import calibration, gate, network, training  # TensorFlow: only where a model is trained
    from neuroloop.model.bundle import OnnxModel, write

    run = tracked(services, run_id, experiment)
    config = training.TrainConfig(epochs=epochs, minutes=minutes, seed=seed)
    if learning_rate is not None:
        config = replace(config, learning_rate=learning_rate)
    model = network.build(size, seed=seed)
    if warm_start is not None:
        training.load_weights(model, warm_start)
    parameters = int(model.count_params())
    services.registry.log_params(
        run,
        {**{f"train_{name}": value for name, value in asdict(config).items()}, "image_size": size}
        | {"parameters": parameters, "warm_start": warm_start is not None},
    )
    held_out = {part: load_arrays(services, run_id, part) for part in ("train", "validation", "calibration")}

    def shard(number: int) -> Callable[[], tuple[Any, Any]]:
        def load() -> tuple[Any, Any]:
            arrays = dataset.unpack(services.store.get(_shard(run_id, number)))
            return arrays["images"], arrays["labels"]

        return load

    def on_epoch(epoch: int, metrics: dict[str, float]) -> None:
        services.registry.log_metrics(
            run, {f"train_{k}" if k in _TRAINING else k: v for k, v in metrics.items()}, step=epoch
        )
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
    onnx = training.export_onnx(model)
    exported = OnnxModel(onnx, threads=2)
    scored = held_out["calibration"]
    temperature = calibration.fit_temperature(exported.run(scored.images).logits, scored.labels)
    log.info("fitting the input gate")
    fitted = gate.fit_gate(
        lambda images: exported.run(images).features,
        held_out["train"].images,
        validation.images,
        np.random.default_rng(seed),
    )
    split = read_split(services, version)
    with tempfile.TemporaryDirectory() as folder:
        write(
            Path(folder),
            onnx=onnx,
            gate=fitted,
            statistics=statistics_json,
            image_size=size,
            temperature=temperature,
            data_version=version,
            simulated=split.simulated,
            metrics={"val_macro_f1": best["val_macro_f1"]},
            weights=training.save_weights(model),
        )
        services.store.put(keys.run(run_id, "bundle.zip"), _zipped(Path(folder)))
    services.registry.log_metrics(run, {"temperature": temperature, "train_seconds_total": outcome.seconds})
    return {
        "epochs": outcome.epochs,
        "best_epoch": outcome.best_epoch,
        "seconds": round(outcome.seconds, 1),
        "val_macro_f1": round(best["val_macro_f1"], 4),
        "temperature": round(temperature, 4),
        "parameters": parameters,
    }


_TRAINING = frozenset({"loss", "accuracy"})


def evaluate_model(services: Services, run_id: str, experiment: str = BUILD) -> Result:
    """Score the candidate, the trivial baselines and the champion on the same frozen test part."""
    test, train = load_arrays(services, run_id, "test"), load_arrays(services, run_id, "train")
    with open_bundle(services, run_id) as candidate:
        probabilities = candidate.predict(test.images).probabilities
        gate = {name: getattr(candidate.gate, name) for name in ("accepted_brains", "accepted_widened", "rejected")}
        simulated, version = candidate.manifest.simulated, candidate.manifest.data_version
    from neuroloop.model import evaluation

    log.info("opened the test part of data version %s: %d images", version, len(test.images))
    scores = score(probabilities, test)
    rules = evaluation.baselines(train.images, train.labels, test.images, test.labels)
    champion = services.registry.by_alias("champion")
    result: Result = {
        "test": scores,
        "baselines": rules,
        "simulated": simulated,
        "data_version": version,
        "gate": gate,
        "champion": None,
    }
    if champion is not None:
        result["champion"] = score_champion(services, champion.version, version, test)
    run = tracked(services, run_id, experiment)
    services.registry.log_metrics(run, {f"test_{name}": value for name, value in scores.items()})
    services.registry.log_metrics(run, {f"baseline_{name}": value for name, value in rules.items()})
    plot = evaluation.confusion_plot(
        test.labels,
        probabilities.argmax(axis=1),
        title=f"Frozen test part{' (simulated scans)' if simulated else ''}",
    )
    services.registry.log_bytes(run, "evaluation/confusion.png", plot)
    services.registry.log_bytes(run, "evaluation/scores.json", json.dumps(result, indent=1).encode())
    return keep(services, run_id, "evaluate_model", result)


def score(probabilities: NDArray[np.float32], arrays: Arrays) -> dict[str, float]:
    """The scores of calibrated `probabilities` (n, 4) on the n images of `arrays`."""
    from neuroloop.model import evaluation

    generator = np.random.default_rng(0)
    return evaluation.evaluate(probabilities, arrays.labels, arrays.groups, generator=generator)


def score_champion(services: Services, champion: str, data_version: str, test: Arrays) -> Result:
    """The champion's scores on the candidate's test part, in the champion's own image size."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = Bundle.load(services.registry.download_bundle(champion, Path(folder)), threads=2)
        if bundle.image_size != test.images.shape[1]:
            entries = read_split(services, data_version).of("test")
            test = dataset.canonical_arrays(entries, image_reader(services), bundle.image_size)
        scores = score(bundle.predict(test.images).probabilities, test)
        return {"version": champion, "test": scores, "simulated": bundle.manifest.simulated}


def register_model(services: Services, run_id: str, experiment: str = BUILD) -> Result:
    """Register the bundle in MLflow as a new version; once per run."""
    evaluated = kept(services, run_id, "evaluate_model")
    tags = {
        "data_version": evaluated["data_version"],
        "simulated": str(evaluated["simulated"]).lower(),
        "pipeline": experiment,
        "test_macro_f1": f"{evaluated['test']['macro_f1']:.4f}",
        "test_accuracy": f"{evaluated['test']['accuracy']:.4f}",
        "notice": RESEARCH_NOTICE,
    }
    with unzipped(services.store.get(keys.run(run_id, "bundle.zip"))) as folder:
        tags["bundle_sha256"] = Bundle.load(folder).sha256
        registered = services.registry.register(tracked(services, run_id, experiment), folder, tags=tags)
    return keep(services, run_id, "register_model", {"version": registered.version, **tags})


def promote_model(services: Services, run_id: str, experiment: str = BUILD) -> Result:
    """Decide, move the aliases, and write the ledger: the reason in words, whichever way it goes."""
    version = kept(services, run_id, "register_model")["version"]
    evaluated = kept(services, run_id, "evaluate_model")
    current = services.registry.by_alias("champion")
    met = (evaluated["champion"] or {}).get("version")
    if current is not None and current.version not in (version, met):
        log.info("version %s became champion since the evaluation: comparing with it", current.version)
        evaluated = reevaluate(services, run_id, experiment)
        met = current.version
    candidate = promotion.Scores(
        test=evaluated["test"], feedback=evaluated.get("feedback") or {}, simulated=evaluated["simulated"]
    )
    before = evaluated["champion"]
    champion = (
        promotion.Scores(test=before["test"], feedback=before.get("feedback") or {}, simulated=before["simulated"])
        if before
        else None
    )
    promoted, checks = promotion.decide(
        candidate, champion, evaluated["baselines"], retraining=experiment == RETRAINING
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
    else:
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
    test = evaluated["test"]
    verdict = "is the new champion" if promoted["promoted"] else "was not promoted"
    subject = f"NeuroLoop {experiment}: version {promoted['version']} {verdict}"
    simulated = " (simulated scans)" if evaluated["simulated"] else ""
    body = "\n".join(
        [
            f"Run {run_id} of {experiment} ended. Model version {promoted['version']} {verdict}.",
            "",
            promoted["reason"],
            "",
            f"Data version {evaluated['data_version']}{simulated}. On its frozen test part, split by groups of twins:",
            f"macro-F1 {test['macro_f1']:.3f} ({test['macro_f1_low']:.3f} to {test['macro_f1_high']:.3f}), "
            f"accuracy {test['accuracy']:.3f}, calibration error {test['ece']:.3f}.",
            *(
                f"recall {name.removeprefix('recall_')}: {value:.3f}"
                for name, value in test.items()
                if "recall_" in name
            ),
            "",
            f"Compare the runs: {services.settings.mlflow_page}/#/experiments",
        ]
    )
    services.notifier.send(subject, body)
    for number in range(SHARDS):
        services.store.delete(_shard(run_id, number))
    return keep(services, run_id, "send_email", {"subject": subject})


# --- hand-off -----------------------------------------------------------------------------------


def read_split(services: Services, version: str) -> Split:
    """The frozen split of a data version."""
    return Split.model_validate_json(services.store.get(keys.split(version)))


def image_reader(services: Services) -> Callable[[ImageEntry | SplitEntry], bytes]:
    """Reads a snapshot's image from the store, by its content hash."""
    return lambda entry: services.store.get(keys.image(entry.md5))


def load_arrays(services: Services, run_id: str, part: str) -> Arrays:
    """A part's canonical arrays as this run wrote them."""
    return Arrays.from_bytes(services.store.get(keys.run(run_id, f"{part}.npz")))


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
