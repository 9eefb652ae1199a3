"""What is measured of a candidate, and the names under which MLflow has it. Pure functions of bundles and arrays."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from neuroloop.core.schemas import Split
from neuroloop.data.dataset import Arrays
from neuroloop.loop.promotion import legacy_notice
from neuroloop.model import evaluation, explanation, stress
from neuroloop.model.bundle import Bundle, OnnxModel

Result = dict[str, Any]
_GATE = (
    *("accepted_brains", "accepted_widened", "accepted_rendered", "novel_widened", "novel_rendered"),
    *("missed_widened", "rejected", "measured", "threshold_origin"),
)


def scores_of(
    candidate: Bundle,
    probabilities: NDArray[np.float32],
    split: Split,
    train: Arrays,
    calibration: Arrays,
    test: Arrays,
) -> Result:
    """All that is said of a candidate on the test part of `split`, JSON-ready.

    `probabilities` (n, 4) are its answers on `test`; `train` fits the trivial baselines; `calibration` is the part that
    the candidate was calibrated on. Keys: split, data_version, simulated, test, baselines, coverage, risk_coverage,
    stress, gate, for the legacy split leaked, and for simulated scans explanation. Deterministic.
    """
    accepted = candidate.gate.accepts(test.images)
    refused = evaluation.share(~accepted, test.groups, generator=np.random.default_rng(0))
    result: Result = {
        "split": split.name,
        "data_version": split.version,
        "simulated": split.simulated,
        "test": _scores(probabilities, test),
        "baselines": evaluation.baselines(train.images, train.labels, test.images, test.labels),
        "coverage": _rounded(_coverage(candidate, calibration, test, probabilities)),
        "risk_coverage": _rounded(_risk_coverage(candidate, test, probabilities, accepted)),
        "stress": _rounded(
            stress.suite(
                lambda images: candidate.predict(images).probabilities,
                test.images,
                test.labels,
                np.random.default_rng(0),
                groups=test.groups,
            )
        ),
        "gate": {name: getattr(candidate.gate.facts, name) for name in _GATE} | {"test_refused": _rounded(refused)},
    }
    if split.name == "legacy":
        result["leaked"] = _leaked(probabilities, test, split)
    if split.simulated:  # only there is it known where the lesion is
        result["explanation"] = _explanation(candidate)
    return result


def scores_on(bundle: Bundle, arrays: Arrays, *, count: bool = False) -> dict[str, float]:
    """A model's scores on images of its own size, as `evaluation.evaluate` gives them; with `count`, images as well."""
    scores = _scores(bundle.predict(arrays.images).probabilities, arrays)
    return {"images": len(arrays.labels), **scores} if count else scores


def plots_of(candidate: Bundle, probabilities: NDArray[np.float32], split: Split, test: Arrays) -> dict[str, bytes]:
    """File name -> PNG of how a candidate does, with `probabilities` (n, 4), on the test part of `split`."""
    kind = legacy_notice(leak_rate(split, test)) if split.name == "legacy" else "grouped, frozen"
    title = f"Test part ({kind}{', simulated scans' if split.simulated else ''})"
    limit = candidate.manifest.calibration.refer_below
    return {
        "confusion.png": evaluation.confusion_plot(test.labels, probabilities.argmax(axis=1), title=title),
        "reliability.png": evaluation.reliability_plot(probabilities, test.labels, title=title),
        "risk_coverage.png": evaluation.risk_coverage_plot(probabilities, test.labels, refer_below=limit, title=title),
        "errors.png": evaluation.error_grid(test.images, probabilities, test.labels, title=title),
    }


def leak_rate(split: Split, test: Arrays) -> float:
    """The share (0..1) of the images of `test` that have a twin in another part of the source."""
    return float(np.isin(test.paths, split.leaked).mean())


def metrics_of(evaluated: Result) -> dict[str, float]:
    """The metrics of an evaluation under their names in MLflow, `<split>_<part>_<score>`."""
    split = evaluated["split"]
    groups: dict[str, dict[str, float]] = {
        "test": evaluated["test"],
        "test_baseline": evaluated["baselines"],
        "test_selective": evaluated["risk_coverage"],
        "test_refused": evaluated["gate"]["test_refused"],
        "feedback": evaluated.get("feedback", {}),
    }
    groups |= {f"test_coverage_{level[2:]}": figures for level, figures in evaluated["coverage"].items()}
    groups |= {f"test_stress_{stressor}": figures for stressor, figures in evaluated["stress"].items()}
    if "explanation" in evaluated:
        pointing = evaluated["explanation"]["pointing"]
        groups["explanation"] = {name: pointing[name] for name in ("hits", "chance", "shown")}
    if "leaked" in evaluated:
        groups["test_leaked"] = {"share": evaluated["leaked"]["share"], **evaluated["leaked"].get("leaked", {})}
        groups["test_unleaked"] = evaluated["leaked"].get("unleaked", {})
    return {f"{split}_{group}_{name}": value for group, figures in groups.items() for name, value in figures.items()}


def _explanation(candidate: Bundle) -> Result:
    """Whether the heat maps point at the lesions of fresh simulated scans, and come from what was learned."""
    shuffled = OnnxModel(explanation.randomised(candidate.onnx, np.random.default_rng(0)), threads=2)
    offset, size = candidate.manifest.map_offset, candidate.image_size
    found = explanation.check(candidate.predict, shuffled.run, size, offset=offset, per_class=40)
    return found.model_dump()


def _scores(probabilities: NDArray[np.float32], arrays: Arrays) -> dict[str, float]:
    generator = np.random.default_rng(0)
    return evaluation.evaluate(probabilities, arrays.labels, arrays.groups, generator=generator)


def _coverage(
    candidate: Bundle, fitted_on: Arrays, test: Arrays, probabilities: NDArray[np.float32]
) -> dict[str, dict[str, float]]:
    """`evaluation.coverage`, and <class>_resplit of `evaluation.resplit_coverage` over both parts."""
    generator, both = np.random.default_rng(0), (fitted_on, test)
    calibration = candidate.manifest.calibration
    measured = evaluation.coverage(probabilities, test.labels, test.groups, calibration, generator=generator)
    groups = [len(set(arrays.groups.tolist())) for arrays in both]
    resplit = evaluation.resplit_coverage(
        np.concatenate([candidate.predict(fitted_on.images).probabilities, probabilities]),
        np.concatenate([arrays.labels for arrays in both]),
        np.concatenate([arrays.groups for arrays in both]),
        share=groups[0] / sum(groups),
        generator=generator,
    )
    for level, figures in measured.items():
        figures |= {f"{label}_resplit": share for label, share in resplit[level].items()}
    return measured


def _risk_coverage(
    candidate: Bundle, test: Arrays, probabilities: NDArray[np.float32], accepted: NDArray[np.bool_]
) -> dict[str, float]:
    """Points of the risk-coverage curve, and where the candidate's own limits and its gate put it."""
    calibration = candidate.manifest.calibration
    curve = evaluation.risk_coverage(probabilities, test.labels)
    answered = accepted & ~candidate.predict(test.images).refer  # as served: also not too unlike what was learned
    found = {
        "accuracy_at_85": curve.at(0.85),
        "accuracy_at_90": curve.at(0.90),
        "area": curve.area,
        "refer_below": calibration.refer_below,
        "answered": float(answered.mean()),
    }
    if answered.any():
        found["answered_accuracy"] = float((probabilities.argmax(axis=1) == test.labels)[answered].mean())
    return found


def _leaked(probabilities: NDArray[np.float32], test: Arrays, split: Split) -> Result:
    """The legacy test part in two: the images with a twin in another part of the source, and the others."""
    leaked = np.isin(test.paths, split.leaked)
    share = leak_rate(split, test)
    result: Result = {"images": int(leaked.sum()), "share": share, "notice": legacy_notice(share)}
    for name, own in (("leaked", leaked), ("unleaked", ~leaked)):
        if own.any():
            scores = evaluation.evaluate(
                probabilities[own], test.labels[own], test.groups[own], generator=np.random.default_rng(0)
            )
            wanted = [f"{each}{bound}" for each in ("accuracy", "macro_f1") for bound in ("", "_low", "_high")]
            result[name] = {each: scores[each] for each in wanted}
    return result


def _rounded(figures: dict[str, Any]) -> dict[str, Any]:
    """To 4 digits, so that the result stays small; differences below that are noise on any test part."""
    return {
        name: _rounded(value) if isinstance(value, dict) else round(float(value), 4) for name, value in figures.items()
    }
