"""Whether a candidate becomes the champion: every check with its reason in words."""

from collections.abc import Mapping

from pydantic import BaseModel

from neuroloop.core.schemas import LABELS, Check, SplitName

ACCURACY_LOSS = 0.005
"""A retrained model may lose at most this much overall accuracy on the frozen test part."""
RECALL_LOSS = 0.02
"""... and at most this much recall in any class,"""
IMAGES_LOST = 2
"""or this many images of it, where they are more: of 42 images one is 2.4 %, so one that changed sides by chance would
outweigh any gain elsewhere. From 100 images of a class on, the share decides."""
BASELINES = ("majority", "border", "thumbnail", "nearest")


class Scores(BaseModel, frozen=True):
    """Scores of one model on the test part of a split and, where there are any, on the held-out corrections."""

    test: dict[str, float]
    feedback: dict[str, float] = {}
    simulated: bool
    split: SplitName = "grouped"
    leaked: float | None = None
    """Share (0..1) of the legacy test images that have a twin outside of the test part."""


def legacy_notice(leaked: float | None) -> str:
    """What stands beside every figure of the legacy split: `legacy, 75.7 % leaked`."""
    return "legacy, leak rate unknown" if leaked is None else f"legacy, {100 * leaked:.1f} % leaked"


def decide(
    candidate: Scores,
    champion: Scores | None,
    baselines: Mapping[str, float],
    *,
    retraining: bool,
    images: Mapping[str, int] | None = None,
    best: Mapping[str, float] | None = None,
    outdated: str = "",
    outdated_simulated: bool = True,
) -> tuple[bool, tuple[Check, ...]]:
    """Promote or not, with a check per reason.

    A first model must beat every trivial baseline in macro-F1. Later ones must not be worse than the champion on the
    frozen test part (`ACCURACY_LOSS`, `RECALL_LOSS`, and `IMAGES_LOST` of a class's `images` in it), nor than `best`,
    the test scores of the best champion that there was on it: or many retrainings, each a little worse, would add up.
    And they must be better where it counts: a retraining on the held-out corrections, a new build, or a retraining of
    whose corrections none is held out, in test macro-F1. A build, which has learned from no correction, must also not
    lose what retrainings have learned of the held-out ones (but for `IMAGES_LOST`). A model trained on
    simulated scans never replaces one trained on real ones. A model of the legacy split is never promoted: its test
    part leaks, and it may have trained on images of the frozen one. `baselines` has `<name>_macro_f1` for each of
    `BASELINES`. `outdated` says why a champion that is there cannot be compared: no server of this version can serve it
    either; `outdated_simulated` whether that one was trained on simulated scans.
    """
    if candidate.split != "grouped":
        return False, (_frozen_split(candidate),)
    checks = [_beats_baselines(candidate, baselines)]
    if outdated:
        reason = f"The champion cannot be compared, nor served by this version of the program: {outdated.rstrip('.')}."
        checks += [Check(name="champion", passed=True, reason=reason), _same_world(candidate, outdated_simulated)]
    if champion is not None:
        bars = {name: max(score, (best or {}).get(name, score)) for name, score in champion.test.items()}
        checks += [_same_world(candidate, champion.simulated), _accuracy(candidate, bars)]
        allowed = {label: max(RECALL_LOSS, IMAGES_LOST / n) for label, n in (images or {}).items() if n}
        checks += [
            _recall(label, candidate, bars, allowed.get(label, RECALL_LOSS))
            for label in LABELS
            if f"recall_{label}" in bars
        ]
        if retraining and candidate.feedback:
            checks.append(_learned(candidate, champion))
        else:
            checks.append(_better(candidate, champion))
            checks += [_remembers(candidate, champion)] if candidate.feedback and champion.feedback else []
    return all(check.passed for check in checks), tuple(checks)


def _frozen_split(candidate: Scores) -> Check:
    reason = (
        f"It was trained and tested on the split that the source declares ({legacy_notice(candidate.leaked)}), which "
        f"serves only to compare with others (test accuracy {candidate.test['accuracy']:.3f}): it is never promoted."
    )
    return Check(name="split", passed=False, reason=reason)


def _beats_baselines(candidate: Scores, baselines: Mapping[str, float]) -> Check:
    best = max(BASELINES, key=lambda name: baselines[f"{name}_macro_f1"])
    score, bar = candidate.test["macro_f1"], baselines[f"{best}_macro_f1"]
    verb = "beats" if score > bar else "does not beat"
    reason = f"Test macro-F1 {score:.3f} {verb} the best trivial baseline ({best}, {bar:.3f})."
    return Check(name="baselines", passed=score > bar, reason=reason)


def _same_world(candidate: Scores, champion_simulated: bool) -> Check:
    passed = champion_simulated or not candidate.simulated
    reason = (
        "It may replace the champion as far as its data goes."
        if passed
        else "It was trained on simulated scans and the champion on real ones: it cannot replace it."
    )
    return Check(name="data", passed=passed, reason=reason)


def _accuracy(candidate: Scores, bars: Mapping[str, float]) -> Check:
    now, before = candidate.test["accuracy"], bars["accuracy"]
    passed = now >= before - ACCURACY_LOSS - 1e-9
    verdict = "within" if passed else "beyond"
    reason = (
        f"Test accuracy {now:.3f} against {before:.3f}, the most of the champion and the best before it: {verdict} the "
        f"{ACCURACY_LOSS:.1%} it may lose."
    )
    return Check(name="accuracy", passed=passed, reason=reason)


def _recall(label: str, candidate: Scores, bars: Mapping[str, float], allowed: float) -> Check:
    now, before = candidate.test[f"recall_{label}"], bars[f"recall_{label}"]
    passed = now >= before - allowed - 1e-9
    verdict = "within" if passed else "beyond"
    reason = f"Recall of {label} {now:.3f} against {before:.3f}: {verdict} the {allowed:.1%} it may lose."
    return Check(name=f"recall_{label}", passed=passed, reason=reason)


def _learned(candidate: Scores, champion: Scores) -> Check:
    now, before = candidate.feedback["accuracy"], champion.feedback["accuracy"]
    verb = "better than" if now > before else "not better than"
    reason = f"Accuracy on the held-out corrections {now:.3f}, {verb} the champion's {before:.3f}."
    return Check(name="feedback", passed=now > before, reason=reason)


def _remembers(candidate: Scores, champion: Scores) -> Check:
    now, before = candidate.feedback["accuracy"], champion.feedback["accuracy"]
    passed = now >= before - IMAGES_LOST / max(candidate.feedback["images"], 1) - 1e-9
    reason = f"Accuracy on the held-out corrections {now:.3f} against the champion's {before:.3f}"
    if not passed:
        reason += (
            ": this model would lose what retrainings have learned. Add the corrected images to the source, or make it "
        )
        reason += "the champion by hand (neuroloop rollback --to)"
    return Check(name="feedback", passed=passed, reason=f"{reason}.")


def _better(candidate: Scores, champion: Scores) -> Check:
    now, before = candidate.test["macro_f1"], champion.test["macro_f1"]
    verb = "better than" if now > before else "not better than"
    reason = f"Test macro-F1 {now:.3f}, {verb} the champion's {before:.3f}."
    return Check(name="macro_f1", passed=now > before, reason=reason)
