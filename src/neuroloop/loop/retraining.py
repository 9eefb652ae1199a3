"""The retraining, step by step: one function per task of `model_retraining` that is not the build's own."""

import contextlib
import json
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from neuroloop.bootstrap import Services
from neuroloop.core.errors import Forbidden, NotFound
from neuroloop.core.schemas import PipelineEnd
from neuroloop.data import dataset
from neuroloop.data.dataset import Arrays
from neuroloop.loop import corrected, feedback, handoff, pipeline, preparation
from neuroloop.loop.handoff import RETRAINING, Result, log
from neuroloop.model.bundle import BUNDLE_TAG, Bundle
from neuroloop.records import erasure, orphans


def check_source_flag(services: Services, run_id: str) -> Result:
    """Count the unused corrections; `go` when there are strictly more than the threshold, or this run has its batch."""
    handoff.begin(services, run_id, RETRAINING)
    threshold = services.settings.feedback_threshold
    unsettled = _settled(services)
    waiting = len(feedback.waiting(services.store))
    mine = any(batch.run_id == run_id for batch in feedback.batches(services.store))
    verb = "more than" if waiting > threshold else "not more than"
    reason = unsettled or f"{waiting} corrections wait, {verb} {threshold}."
    go = mine or (not unsettled and waiting > threshold)
    result = {"waiting": waiting, "threshold": threshold, "go": go, "reason": reason}
    return handoff.keep(services, run_id, "check_source_flag", result)


def _settled(services: Services) -> str:
    """See that what a killed server left does not count; if this identity may not, why corrections cannot be used."""
    erasure.finish_all(services.log, services.store)
    try:
        orphans.settle_corrections(services.log, services.store)
    except Forbidden as error:
        return f"Housekeeping, which may, has to put the corrections in order first: {error}"
    try:
        orphans.bring_back_corrections(services.log, services.store)
    except Forbidden as error:  # nothing wrong is learned without them: they wait for a later retraining
        log.warning("corrections without a copy are left to housekeeping, which may bring it back: %s", error)
    return ""


def flag_false(services: Services, run_id: str, *, by_hand: bool) -> Result:
    """End without a retraining; only a person who triggered the run gets a mail, so that a schedule does not spam."""
    found = handoff.kept(services, run_id, "check_source_flag")
    if by_hand:
        body = f"Run {run_id} of {RETRAINING} did not retrain: {found['reason']}"
        once = handoff.occasion(services, run_id, "flag_false")
        services.notifier.send(f"NeuroLoop {RETRAINING}: not enough corrections yet", body, once=once)
    services.log.record_end(PipelineEnd(dag=RETRAINING, outcome="nothing_to_do", run_id=run_id, task="flag_false"))
    return handoff.keep(services, run_id, "flag_false", {"waiting": found["waiting"], "reason": found["reason"]})


def flag_true(services: Services, run_id: str) -> Result:
    """Make this run's batch exactly once; empty when another run took the corrections first, or none is of use."""
    batch = feedback.claim(services.store, run_id, services.settings.feedback_threshold)
    if batch is None or not _worth(services, batch):
        why = (
            "another run has taken the corrections"
            if batch is None
            else f"no correction of batch {batch.number} teaches anything: repeated, contradictory or simulated"
        )
        log.info("nothing is left to do: %s", why)
        services.log.record_end(PipelineEnd(dag=RETRAINING, outcome="nothing_to_do", run_id=run_id, task="flag_true"))
        return {}
    result = {"batch": batch.number, "corrections": len(batch.corrections)}
    return handoff.keep(services, run_id, "flag_true", result)


def _worth(services: Services, batch: feedback.Batch) -> bool:
    """Whether any correction of this batch is of use: new, not contradicted, no simulated one for a real model."""
    found = corrected.known(services)
    out = set(feedback.repeated(found))
    if simulated := feedback.simulated(services.log, found):
        champion = services.registry.by_alias("champion")
        out |= simulated if champion is not None and champion.tags.get("simulated") == "false" else set()
    own = feedback.by_name(batch.corrections)
    return any(each.name in own and each.key not in out for each in found)


def retrain_model(services: Services, run_id: str, *, minutes: float, epochs: int | None, seed: int) -> Result:
    """Train the champion further on its own training part plus the corrections that are not held out."""
    for batch in feedback.batches(services.store)[-3:]:  # of runs that never came to their end; older ones are done
        if batch.run_id != run_id:
            handoff.drop_training_part(services, batch.run_id)
            handoff.drop_shards(services, batch.run_id)
    settled = handoff.settled(services, run_id, "start", lambda: _start(services))
    start, sha256 = settled["version"], settled.get("sha256")
    with tempfile.TemporaryDirectory() as folder:
        bundle = Bundle.load(services.registry.download_bundle(start, Path(folder)), sha256=sha256)
        version, size = bundle.manifest.data_version, bundle.image_size
        statistics_json, weights = bundle.statistics, bundle.weights
        architecture, chosen = bundle.manifest.architecture, _known_settings(bundle.manifest.hyperparameters)
        gate_network = bundle.fitted_gate.onnx  # what a brain looks like has not changed
    found = corrected.known(services)
    kept, held_out, left_out = corrected.divided(services, version, found)
    preparation.write_held_out(services, run_id, version, size)
    split = handoff.read_split(services, version)
    base = dataset.canonical_arrays(split.of("train"), handoff.image_reader(services), size)
    times = feedback.repeats(len(kept), len(set(base.groups.tolist())))
    arrays = _joined(base, corrected.arrays_of(services, kept, size), times)
    preparation.write_shards(services, run_id, arrays, seed, simulated=split.simulated)
    run = handoff.tracked(services, run_id, RETRAINING)
    counts = {"trained_on": len(kept), "held_out": len(held_out), "left_out": len(left_out)}
    # Tags, not parameters, which never change: between two tries of this step, a correction may be erased.
    services.registry.set_tags(
        run,
        {"data_version": version, "warm_start_version": start, "corrections_repeats": str(times)}
        | {f"corrections_{name}": str(count) for name, count in counts.items()},
    )
    corrections = {"corrections": [each.model_dump() for each in found], "left_out": left_out}
    services.registry.log_bytes(run, "data/corrections.json", json.dumps(corrections, indent=1).encode())
    result = pipeline.fit(
        services,
        run_id,
        version=version,
        statistics_json=statistics_json,
        size=size,
        seed=seed,
        epochs=epochs,
        minutes=minutes,
        warm_start=weights,
        gate_network=gate_network,
        architecture=architecture,
        hyperparameters=chosen,
        experiment=RETRAINING,
    )
    # Apart, for what the step returns gets into the model card, where ids of predictions have no place.
    handoff.keep(services, run_id, "corrections", {"trained_on": [each.model_dump() for each in kept]})
    handoff.keep(
        services, run_id, "held_out_corrections", {"names": sorted(correction.name for correction in held_out)}
    )
    return handoff.keep(services, run_id, "retrain_model", {**result, "from_version": start, **counts})


def _known_settings(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The champion's hyper-parameters that this version of the program still has."""
    from neuroloop.model import hyperparameters  # TensorFlow: only where a model is trained

    gone = sorted(chosen.keys() - set(hyperparameters.names()))
    if gone:
        log.warning("the champion's settings %s are no longer there and count no more", ", ".join(gone))
    return {name: value for name, value in chosen.items() if name not in gone}


def _start(services: Services) -> Result:
    """The version to train further."""
    champion = services.registry.by_alias("champion")
    if champion is None:
        raise NotFound("no champion to retrain", fix=f"run {handoff.BUILD} first")
    return {"version": champion.version, "sha256": champion.tags.get(BUNDLE_TAG)}


def evaluate_model(services: Services, run_id: str) -> Result:
    """As in the build, and champion and candidate on the held-out corrections too."""
    held_out = [correction for correction in corrected.known(services) if correction.held_out]
    with contextlib.suppress(NotFound):  # of a training by a version before this list was kept
        names = handoff.kept(services, run_id, "held_out_corrections")["names"]
        held_out = [correction for correction in held_out if correction.name in names]
    corrections = partial(corrected.arrays_of, services, held_out) if held_out else None
    return pipeline.evaluate_model(services, run_id, RETRAINING, corrections=corrections)


def _joined(base: Arrays, corrections: Arrays, times: int) -> Arrays:
    """The training part and each correction `times` over, every copy a group of its own."""
    copies = np.tile(np.arange(len(corrections.images)), times)
    first = int(base.groups.max(initial=-1)) + 1
    return Arrays(
        images=np.concatenate([base.images, corrections.images[copies]]),
        labels=np.concatenate([base.labels, corrections.labels[copies]]),
        groups=np.concatenate([base.groups, first + np.arange(len(copies))]),
        paths=base.paths + tuple(corrections.paths[index] for index in copies),
    )
