"""The build, step by step: one function per task of `data_and_model_build`.

Each step reads what earlier ones left under `runs/<run>/` in the store, computes, stores, and returns a small JSON
result, which is also kept as `runs/<run>/<step>.json`. A step may be repeated: its keys come from the run's id. The
steps up to the arrays that training reads are in `preparation`.
"""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from neuroloop.bootstrap import Services
from neuroloop.core import keys
from neuroloop.core.errors import InvalidBundle, NeuroLoopError, NotFound, OutdatedBundle
from neuroloop.core.schemas import (
    LABELS,
    PARTS,
    RESEARCH_NOTICE,
    ArchitectureName,
    ModelVersion,
    Outcome,
    Part,
    PipelineEnd,
    Promotion,
    Snapshot,
    Split,
)
from neuroloop.data import dataset
from neuroloop.data.dataset import Arrays
from neuroloop.imaging.augment import AugmentParams
from neuroloop.loop import corrected, hosts, promotion
from neuroloop.loop.handoff import (
    BUILD,
    RETRAINING,
    Result,
    drop_shards,
    drop_training_part,
    epoch_metrics,
    image_reader,
    in_use,
    keep,
    kept,
    load_arrays,
    log,
    occasion,
    open_bundle,
    open_test,
    openings,
    read_split,
    tracked,
    training_shards,
    unzipped,
    zipped,
)
from neuroloop.loop.params import Params
from neuroloop.loop.preparation import (
    audit_data,
    augment_input_data,
    capture_statistics,
    check_source,
    download_data,
    transform_testing_data,
)
from neuroloop.loop.shards import audit_shard, list_shards, prepare_shard
from neuroloop.model import card
from neuroloop.model.bundle import BUNDLE_TAG, CARD, CARD_DATA, MODEL, Bundle, Manifest, with_card
from neuroloop.model.card import BASELINES, Card, compose

__all__ = [
    "Params",
    "audit_data",
    "audit_shard",
    "augment_input_data",
    "building_model",
    "capture_statistics",
    "check_source",
    "download_data",
    "evaluate_model",
    "fit",
    "list_shards",
    "play",
    "prepare_shard",
    "promote_model",
    "register_model",
    "send_email",
    "transform_testing_data",
]

_COMPARED = 200  # validation images that network and export must answer alike
_MAP_IMAGES = 48
"""Training images that measure where the activation map lies; half as many change its offset by a hundredth."""
_LEDGER = 10_000  # rows looked back at: years of builds and retrainings


def play(services: Services, run_id: str, params: Params) -> Generator[tuple[str, Result]]:
    """Every step of a build in this process, in order: the name and the result of each when it is done.

    Its MLflow run is closed however that ends: as failed by a step that fails, and not where the caller wants no more.
    """
    failed = True
    try:
        yield "check_source", check_source(services, run_id, params)
        yield "download_data", download_data(services, run_id, params)
        shards = list_shards(services, run_id)
        for shard in shards:
            yield "audit_shard", audit_shard(services, run_id, shard)
        yield "audit_data", audit_data(services, run_id)
        for shard in shards:
            yield "prepare_shard", prepare_shard(services, run_id, params, shard)
        yield "capture_statistics", capture_statistics(services, run_id)
        for step in (augment_input_data, transform_testing_data, building_model):
            yield step.__name__, step(services, run_id, params)
        for last in (evaluate_model, register_model, promote_model, send_email):
            yield last.__name__, last(services, run_id)
        failed = False
    except GeneratorExit:
        failed = False
        raise
    finally:
        with contextlib.suppress(NeuroLoopError):  # what ended the build says more
            services.registry.close_run(tracked(services, run_id), failed=failed)


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
    gate_network: bytes | None = None,
    architecture: ArchitectureName = "compact",
    hyperparameters: Mapping[str, Any] = {},
    experiment: str = BUILD,
) -> Result:
    """Train on the run's shards and leave `bundle.zip`; `warm_start` are weights to begin from.

    The weights are a start, not noise to be burnt away: the learning rate is then a third of a fresh training's.
    `gate_network` is an input gate's network to keep instead of training one.
    """
    # TensorFlow: only where a model is trained
    from neuroloop.model import calibration, canary, devices, explanation, export, gate_training, network, training
    from neuroloop.model.bundle import OnnxModel, write
    from neuroloop.model.hyperparameters import configure

    run = tracked(services, run_id, experiment)
    config = configure(architecture, hyperparameters, epochs=epochs, minutes=minutes, seed=seed)
    if warm_start is not None:
        config = replace(config, learning_rate=config.learning_rate / 3)
    device = devices.prepare()
    in_use(services, run_id)
    hosts.call(services, run_id, config, size=size, architecture=architecture)
    strategy = devices.strategy(services.settings.distribution)
    weights = services.pretrained(architecture) if warm_start is None else None
    with strategy.scope():
        model = network.build(size, arch=architecture, seed=seed, weights=weights)
    if warm_start is not None:
        export.load_weights(model, warm_start)
    parameters = int(model.count_params())
    services.registry.log_params(
        run,
        {**{f"train_{name}": value for name, value in asdict(config).items()}, "image_size": size}
        | {"parameters": parameters, "warm_start": warm_start is not None}
        | {"architecture": architecture, "pretrained": weights.name if weights else "none"},
    )
    # The device is no parameter, which never changes: the next try may run on another machine.
    replicas = str(strategy.num_replicas_in_sync)
    services.registry.set_tags(run, {"architecture": architecture, "device": device, "replicas": replicas})
    held_out = {part: load_arrays(services, run_id, part) for part in ("train", "validation", "calibration")}
    split = read_split(services, version, kept(services, run_id, "held_out")["split"])
    # Behind the epochs of a try that was killed.
    first_step = services.registry.next_step(run, f"{split.name}_train_loss")

    def on_epoch(epoch: int, metrics: dict[str, float]) -> None:
        services.registry.log_metrics(run, epoch_metrics(split.name, metrics), step=first_step + epoch)
        log.info("epoch %d: %s", epoch, ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))

    validation = held_out["validation"]
    with strategy.scope():
        outcome = training.train(
            model,
            training_shards(services, run_id),
            (validation.images, validation.labels),
            config,
            on_epoch=on_epoch,
        )
    best = outcome.history[outcome.best_epoch]
    onnx = export.export_onnx(model)
    exported = OnnxModel(onnx, threads=2)
    apart = export.difference(model, exported.run, validation.images[:_COMPARED])
    scored = held_out["calibration"]
    calibrated = calibration.fit(exported.run(scored.images).logits, scored.labels, scored.groups)
    spread = np.linspace(0, len(held_out["train"].images) - 1, _MAP_IMAGES).astype(int)
    map_offset = explanation.displacement(exported.run, held_out["train"].images[spread])
    chosen = canary.choose(
        validation.images, validation.labels, calibrated.probabilities(exported.run(validation.images).logits)
    )
    log.info("fitting the input gate")
    learned = held_out["train"]
    one_each = np.unique(learned.groups, return_index=True)[1]  # of each group of twins
    fitted = gate_training.fit_gate(
        exported.answers,
        (learned.images[one_each], learned.labels[one_each]),
        (validation.images, validation.labels),
        np.random.default_rng(seed),
        steps=gate_training.steps_for(minutes, epochs),
        onnx=gate_network,
    )
    with tempfile.TemporaryDirectory() as folder:
        write(
            Path(folder),
            onnx=onnx,
            gate=fitted,
            statistics=statistics_json,
            image_size=size,
            architecture=architecture,
            hyperparameters=hyperparameters,
            calibration=calibrated,
            map_offset=map_offset,
            data_version=version,
            split=split.name,
            simulated=split.simulated,
            metrics={"val_macro_f1": best["val_macro_f1"]},
            weights=export.save_weights(model),
            canary=chosen,
        )
        services.store.put(keys.run(run_id, "bundle.zip"), zipped(Path(folder)))
    services.registry.log_metrics(
        run,
        {
            f"{split.name}_calibration_temperature": calibrated.temperature,
            f"{split.name}_calibration_refer_below": calibrated.refer_below,
            f"{split.name}_train_seconds_total": outcome.seconds,
            f"{split.name}_validation_export_difference": apart,
            f"{split.name}_train_kept_epoch": outcome.best_epoch,
            f"{split.name}_validation_kept_macro_f1": best["val_macro_f1"],
        },
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
    too. A build, which learns from the source alone, finds them by itself: what earlier retrainings have learned must
    not be lost unseen. A run on the legacy split meets no champion: that one may have trained on the very test images.
    """
    from neuroloop.loop import scoring  # plots and forests: slow to load, and only this step needs them

    held_out = kept(services, run_id, "held_out")
    split = read_split(services, held_out["version"], held_out["split"])
    run = tracked(services, run_id, experiment)
    if experiment == BUILD and split.name == "grouped":
        tested_on = corrected.tested_on(services, split.version, corrected.known(services))
        corrections = partial(corrected.arrays_of, services, tested_on) if tested_on else None
    with open_bundle(services, run_id) as candidate:
        why = "score the candidate, the baselines and the champion"
        test = open_test(services, run_id, why, experiment, subject=candidate.manifest.files[MODEL])
        train, validation, calibration = (load_arrays(services, run_id, part) for part in PARTS if part != "test")
        for part, arrays in zip(PARTS, (train, validation, calibration, test), strict=True):
            log_dataset(services, run, split, part, arrays)
        log.info("scoring the candidate on %d images, then under stress", len(test.images))
        probabilities = candidate.predict(test.images).probabilities
        result = scoring.scores_of(candidate, probabilities, split, train, calibration, test)
        plots = scoring.plots_of(candidate, probabilities, split, test)
        if corrections is not None:
            result["feedback"] = scoring.scores_on(candidate, corrections(candidate.image_size), count=True)
    champion = services.registry.by_alias("champion") if split.name == "grouped" else None
    result["test_images"] = dict(zip(LABELS, np.bincount(test.labels, minlength=len(LABELS)).tolist(), strict=True))
    result["champion"] = result["outdated"] = None
    if champion is not None:
        try:
            bundle = open_champion(services, champion)
        except OutdatedBundle as error:
            log.warning("the champion, version %s, cannot be compared: %s", champion.version, error)
            simulated = champion.tags.get("simulated") == "true"
            result["outdated"] = {"version": champion.version, "reason": str(error), "simulated": simulated}
        else:
            scores = score_champion(services, bundle, split, test, corrections)
            result["champion"] = {"version": champion.version, **scores}
    services.registry.log_metrics(run, scoring.metrics_of(result))
    for name, plot in plots.items():
        services.registry.log_bytes(run, f"evaluation/{name}", plot)
    services.registry.log_bytes(run, "evaluation/scores.json", json.dumps(result, indent=1).encode())
    return keep(services, run_id, "evaluate_model", result)


def open_champion(services: Services, champion: ModelVersion) -> Bundle:
    """The champion's bundle. Raises `OutdatedBundle` for one of another version of the program.

    And `NeuroLoopError` for one that is damaged or gone: perhaps only for a moment, so nothing takes its place unasked.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            files = services.registry.download_bundle(champion.version, Path(folder))
            return Bundle.load(files, threads=2, sha256=champion.tags.get(BUNDLE_TAG))
    except OutdatedBundle:
        raise
    except (InvalidBundle, NotFound) as error:
        raise NeuroLoopError(
            f"The champion, version {champion.version}, cannot be loaded to compare with",
            why=str(error),
            fix="restore its files, or roll back to another version; where there is none, take the alias champion away "
            "in MLflow; then clear this task",
        ) from error


def score_champion(
    services: Services,
    champion: Bundle,
    split: Split,
    test: Arrays,
    corrections: Callable[[int], Arrays] | None = None,
) -> Result:
    """The champion's scores on the candidate's test part and the held-out corrections, in its own image size."""
    from neuroloop.loop import scoring

    if champion.image_size != test.images.shape[1]:
        test = dataset.canonical_arrays(split.of("test"), image_reader(services), champion.image_size)
    result: Result = {"test": scoring.scores_on(champion, test), "simulated": champion.manifest.simulated}
    if corrections is not None:
        result["feedback"] = scoring.scores_on(champion, corrections(champion.image_size), count=True)
    return result


def log_dataset(services: Services, run: str, split: Split, part: Part, arrays: Arrays) -> None:
    """Tell MLflow that a run read a part, identified by the pixels and labels it saw: of many to train on, a sample."""
    digest = hashlib.sha256(arrays.images.tobytes() + arrays.labels.tobytes()).hexdigest()[:32]
    contexts = {"train": "training", "validation": "validation", "calibration": "calibration", "test": "testing"}
    counts = np.bincount(arrays.labels, minlength=len(LABELS)).tolist()
    profile = {
        "images": len(arrays.labels),
        "groups": len(set(arrays.groups.tolist())),
        "image_size": arrays.images.shape[1],
        "data_version": split.version,
        "simulated": split.simulated,
        "sample": part == "train" and len(arrays.labels) < len(split.of("train")),
        **dict(zip(LABELS, counts, strict=True)),
    }
    services.registry.log_dataset(
        run,
        f"{split.name}_{part}",
        digest,
        context=contexts[part],
        source=f"{services.settings.store}/{keys.snapshot(split.version)}",
        profile=profile,
    )


def register_model(services: Services, run_id: str, experiment: str = BUILD) -> Result:
    """Put the model card into the bundle and register it in MLflow as a new version; once per run."""
    evaluated = kept(services, run_id, "evaluate_model")
    run = tracked(services, run_id, experiment)
    with unzipped(services.store.get(keys.run(run_id, "bundle.zip"))) as folder:
        if Bundle.load(folder).card is None:  # a repeated registration keeps the card of the first
            with_card(folder, model_card(services, run_id, Bundle.load(folder).manifest, experiment))
            services.store.put(keys.run(run_id, "bundle.zip"), zipped(folder))
        bundle = Bundle.load(folder)
        tags = {
            "data_version": evaluated["data_version"],
            "simulated": str(evaluated["simulated"]).lower(),
            "split": bundle.manifest.split,
            "architecture": bundle.manifest.architecture,
            "pipeline": experiment,
            "pipeline_run": run_id,
            "test_macro_f1": f"{evaluated['test']['macro_f1']:.4f}",
            "test_accuracy": f"{evaluated['test']['accuracy']:.4f}",
            "notice": RESEARCH_NOTICE,
            BUNDLE_TAG: bundle.sha256,
        }
        text = (folder / CARD).read_text()
        for name in (CARD, CARD_DATA):
            services.registry.log_bytes(run, f"model-card/{name}", (folder / name).read_bytes())
        registered = services.registry.register(run, folder, tags=tags, description=text)
        shortcomings = bundle.card.shortcomings if bundle.card else ()
    result = {"version": registered.version, **tags, "shortcomings": list(shortcomings)}
    return keep(services, run_id, "register_model", result)


def model_card(services: Services, run_id: str, manifest: Manifest, experiment: str) -> Card:
    """The model card from what this run's steps returned and what is known of its data version."""
    trained = kept(services, run_id, "retrain_model" if experiment == RETRAINING else "building_model")
    version = manifest.data_version
    split = read_split(services, version, manifest.split)
    audited = json.loads(services.store.get(keys.audit(version)))
    snapshot = Snapshot.model_validate_json(services.store.get(keys.snapshot(version)))
    augmentation: Result = asdict(AugmentParams())
    if experiment != RETRAINING:
        shards = kept(services, run_id, "augment_input_data")
        augmentation = {name: shards[name] for name in augmentation if name in shards}
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
        test_openings=looks_at(services, split),
    )


def looks_at(services: Services, split: Split) -> int:
    """How often test images of this split were looked at, under other data versions too: frozen, most are the same."""
    own, seen = {entry.sha256 for entry in split.of("test")}, {split.version: True}
    found = [opening for opening in openings(services) if opening.split == split.name]
    for opening in found:
        if opening.version not in seen:
            with contextlib.suppress(NotFound):
                other = read_split(services, opening.version, split.name)
                seen[opening.version] = not own.isdisjoint(entry.sha256 for entry in other.of("test"))
    return sum(seen.get(opening.version, False) for opening in found)


def promote_model(services: Services, run_id: str, experiment: str = BUILD) -> Result:
    """Decide, write the ledger, and move the aliases: the reason in words, whichever way it goes.

    The ledger's row comes first and is the decision, so a repeat decides nothing anew. It moves no alias either where
    another run or a person has changed the champion since.
    """
    version = kept(services, run_id, "register_model")["version"]
    row = next((each for each in services.log.promotions_since(run_id) if each.run_id == run_id), None)
    if row is None:
        row = decision(services, run_id, version, experiment)
        services.log.record_promotion(row)
    if row.version != version:
        raise NeuroLoopError(
            f"run {run_id} has decided on version {row.version} before, not on {version}",
            why="its id, or its results in the store, belong to another run too",
            fix="trigger it anew with a run id of its own",
        )
    current = services.registry.by_alias("champion")
    moved = current is not None and row.promoted and current.version not in (version, row.previous)
    if moved or any(each.promoted for each in services.log.promotions_since(run_id) if each.run_id != run_id):
        log.warning("the champion has changed since this run's decision: no alias moves")
    elif row.promoted:
        if row.previous:
            services.registry.set_alias("previous", row.previous)
        services.registry.set_alias("champion", version)
    elif kept(services, run_id, "evaluate_model")["split"] == "grouped":
        services.registry.set_alias("challenger", version)
    run = tracked(services, run_id, experiment)
    services.registry.set_tags(run, {"promoted": str(row.promoted).lower(), "promotion_reason": row.reason[:4000]})
    services.registry.close_run(run)
    result = {"version": version, "previous": row.previous, "promoted": row.promoted, "reason": row.reason}
    return keep(services, run_id, "promote_model", result)


def decision(services: Services, run_id: str, version: str, experiment: str) -> Promotion:
    """Whether this run's version becomes the champion, as a row for the ledger."""
    evaluated = kept(services, run_id, "evaluate_model")
    while True:
        outdated = evaluated["outdated"] or {}
        met = (evaluated["champion"] or outdated).get("version")
        current = services.registry.by_alias("champion")
        if evaluated["split"] != "grouped" or current is None or current.version in (version, met):
            break
        log.info("version %s became champion since the evaluation: comparing with it", current.version)
        evaluated = reevaluate(services, run_id, experiment)
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
        images=evaluated["test_images"],
        best=best_before(services, evaluated["data_version"]),
        outdated=outdated.get("reason", ""),
        outdated_simulated=outdated.get("simulated", True),
    )
    return Promotion(
        run_id=run_id,
        version=version,
        previous=met,
        promoted=promoted,
        checks=checks,
        metrics={"candidate": evaluated["test"], "champion": before and before["test"]}
        | {"feedback": {"candidate": evaluated.get("feedback"), "champion": before and before.get("feedback")}},
    )


def best_before(services: Services, data_version: str) -> dict[str, float] | None:
    """Test scores of the best champion by macro-F1, going by the ledger, that this data version has had.

    Since a person last chose one, who may have taken the best back for a reason, or an unreadable one was replaced.
    """
    own = {each.version for each in services.registry.versions() if each.tags.get("data_version") == data_version}
    scored = []
    for row in services.log.promotions(limit=_LEDGER):
        checks = {check.name for check in row.checks}
        if row.promoted and "by_hand" in checks:
            break
        if row.promoted and row.version in own and row.metrics.get("candidate"):
            scored.append(row.metrics["candidate"])
        if row.promoted and "champion" in checks:
            break
    return max(scored, key=lambda test: test["macro_f1"], default=None)


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
    run = tracked(services, run_id, experiment)
    test = evaluated["test"]
    verdict = "is the new champion" if promoted["promoted"] else "was not promoted"
    subject = f"NeuroLoop {experiment}: version {promoted['version']} {verdict}"
    simulated = " (simulated scans)" if evaluated["simulated"] else ""
    part = {
        "grouped": "its frozen test part, split by groups of twins",
        "legacy": "the source's own test part, which has twins in training and compares with nothing here",
    }[registered["split"]]
    recalls = [f"recall {name}: {test[f'recall_{name}']:.3f}" for name in LABELS if f"recall_{name}" in test]
    rules = [
        f"{text} {evaluated['baselines'][f'{name}_macro_f1']:.3f}"
        for name, text in BASELINES.items()
        if f"{name}_macro_f1" in evaluated["baselines"]
    ]
    shortcomings = registered["shortcomings"] or ["No measured figure misses its target by more than chance explains."]
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
            f"Rules that never look at a lesion, macro-F1: {', '.join(rules)}.",
            "",
            "What falls short:",
            *(f"- {each}" for each in shortcomings),
            "",
            f"The model card stands with the version: {services.settings.mlflow_page}/#/models",
            f"Compare the runs: {services.settings.mlflow_page}/{services.registry.runs_page(run)}",
        ]
    )
    services.notifier.send(subject, body, once=occasion(services, run_id, "send_email"))
    outcome: Outcome = "promoted" if promoted["promoted"] else "not_promoted"
    services.log.record_end(PipelineEnd(dag=experiment, outcome=outcome, run_id=run_id, task="send_email"))
    if experiment == RETRAINING:
        drop_training_part(services, run_id)
    drop_shards(services, run_id)
    return keep(services, run_id, "send_email", {"subject": subject})
