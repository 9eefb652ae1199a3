"""The model card: what a model is, what was measured of it, and where it must not be trusted.

In the form of Mitchell et al., Model Cards for Model Reporting, FAT* 2019. `compose` gathers the figures of a run,
`as_markdown` writes them down; both are pure.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from pydantic import Field

from neuroloop.core.schemas import LABELS, RESEARCH_NOTICE, Record, SplitName
from neuroloop.model.calibration import Calibration

Figures = dict[str, float]

NAME = "brain-tumor-classifier"
NAMES = {"glioma": "glioma", "meningioma": "meningioma", "notumor": "no tumour", "pituitary": "pituitary tumour"}
BASELINES = {
    "majority": "always the largest class",
    "border": "random forest on border, corners and outline",
    "thumbnail": "random forest on 8x8 pixels",
    "nearest": "most alike training image at 32x32 pixels",
}
SELECTIVE = {
    "answered": "share answered: taken for a brain, not below the limit above, not too unlike the training images",
    "answered_accuracy": "accuracy of what is answered",
    "accuracy_at_85": "accuracy if the most certain 85 % were answered",
    "accuracy_at_90": "accuracy if the most certain 90 % were answered",
    "area": "area under the risk-coverage curve (mean error; lower is better)",
}
INTENDED_USE = (
    "Research and teaching: studying how a classifier of brain-MRI slices behaves, explains itself and changes with "
    "feedback, by people who know the field and do not act on its answers. It takes one slice of brain MRI (any plane) "
    "and names one of four classes: glioma, meningioma, pituitary tumour, or none of these."
)
OUT_OF_USE = (
    "Diagnosis, triage, treatment, screening, or any decision about a patient; other organs and modalities; scans of "
    "children, after surgery, or of other diseases, which were not in the training data by intent."
)
_ALWAYS = (
    "It sees a single slice, without history, other sequences or neighbouring slices.",
    '"No tumour" means none of three kinds was found in this slice. It does not mean a healthy brain, and unfamiliar '
    "images tend towards this class.",
    'A heat map shows what the answer rests on. It is no outline of a lesion, and there is none for "no tumour".',
)

_GROUPED = (
    "Which images are of one patient is not known. Parts are kept apart by image similarity, so two unlike slices of "
    "one patient may stand in training and test: expect less on new patients."
)

# What a figure is called a limit from; these are the project's own targets.
MACRO_F1_TARGET, MOST_CERTAIN_TARGET = 0.96, 0.99
RECALL_TARGET, ECE_TARGET, COVERAGE_TARGET, ANSWERED_TARGET, POINTING_TARGET = 0.90, 0.02, 0.02, 0.99, 0.80
ANSWERED_LEAST, GROUPS_FOR_SETS = 0.85, 19
DROP_NOTED = 0.05
"""A loss of macro-F1 under stress that a reader should know of, five points."""
RANDOMISED_MOST = 0.5
"""Rank correlation with the maps of shuffled weights above which heat maps show the image more than the model."""


class Model(Record):
    """What the model is."""

    name: str = NAME
    architecture: str
    parameters: int | None = None
    image_size: int = Field(description="Side of the canonical image, pixels")
    canonical_version: str
    created_at: datetime
    run_id: str = Field(description="The pipeline run")
    pipeline: str
    from_version: str | None = Field(default=None, description="The version it was retrained from")


class Data(Record):
    """What it was trained and tested on."""

    version: str
    source: str = ""
    simulated: bool
    split: SplitName
    parts: dict[str, int] = Field(description="part -> images")
    groups: dict[str, int] = Field(default={}, description="part -> groups of twins")
    quarantined: int = 0
    leak_rates: dict[str, float] = Field(
        default={}, description="The source's own part -> share of its images with a twin in another of them"
    )
    shortcuts: dict[str, dict[str, float | None]] = Field(
        default={},
        description="What can be told without a lesion: trait -> accuracy on the source's split and on the grouped one",
    )
    licences: tuple[str, ...] = ()


class Card(Record):
    """All figures of the card; `card.json`. Sections that were not measured are empty."""

    notice: str = RESEARCH_NOTICE
    model: Model
    data: Data
    scores: Figures = Field(description="On the test part, as `evaluation.evaluate` names them")
    baselines: Figures
    leaked: dict[str, Any] = Field(description="legacy split: share and notice; leaked, unleaked -> scores")
    feedback: Figures = Field(description="On held-out corrections")
    calibration: Calibration
    coverage: dict[str, Figures] = Field(description="level -> measured coverage of the prediction sets")
    risk_coverage: Figures
    stress: dict[str, Figures]
    explanation: dict[str, Any] = Field(description="`explanation.Check`, on simulated scans")
    gate: dict[str, Any]
    training: dict[str, Any]
    augmentation: dict[str, Any]
    test_openings: int = Field(ge=0, description="Times this test part has been looked at so far, by any run")
    shortcomings: tuple[str, ...] = Field(default=(), description="Of the limits, the figures that miss their target")
    limits: tuple[str, ...] = Field(description="Where it must not be trusted, the measured shortcomings first")


def compose(
    *,
    model: Model,
    data: Data,
    calibration: Calibration,
    evaluated: Mapping[str, Any],
    trained: Mapping[str, Any],
    augmentation: Mapping[str, Any],
    test_openings: int,
) -> Card:
    """The card of a run; `evaluated` and `trained` are what its steps returned."""
    card = Card(
        model=model,
        data=data,
        calibration=calibration,
        scores=evaluated["test"],
        baselines=evaluated.get("baselines") or {},
        leaked=evaluated.get("leaked") or {},
        feedback=evaluated.get("feedback") or {},
        coverage=evaluated.get("coverage") or {},
        risk_coverage=_numbers(evaluated.get("risk_coverage") or {}),
        stress=evaluated.get("stress") or {},
        explanation=evaluated.get("explanation") or {},
        gate=evaluated.get("gate") or {},
        training=dict(trained),
        augmentation=dict(augmentation),
        test_openings=test_openings,
        limits=(),
    )
    found = tuple(_shortcomings(card))
    limits = found + _ALWAYS + ((_GROUPED,) if data.split == "grouped" else ())
    return card.model_copy(update={"shortcomings": found, "limits": limits})


def as_markdown(card: Card) -> str:
    """The card for people to read, GitHub's Markdown, the most important first."""
    sections = [
        _head(card),
        _scores(card),
        _limits(card),
        _baselines(card),
        _certainty(card),
        _stress(card),
        _explanation(card),
        _gate(card),
        _data(card),
        _training(card),
        _use(),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


# --- sections -----------------------------------------------------------------------------------


def _head(card: Card) -> str:
    model, data = card.model, card.data
    kind = "simulated scans, no patient's" if data.simulated else "real scans"
    size = f"{model.parameters / 1e6:.2f} M parameters, " if model.parameters else ""
    born = f", retrained from version {model.from_version}" if model.from_version else ""
    lines = [
        f"# Model card: {model.name}",
        f"**{card.notice}**",
        f"Network `{model.architecture}` ({size}{model.image_size} px), trained on {kind}{born}. Data version "
        f"`{data.version}`, {_split_name(data.split)} split. Run `{model.run_id}` of {model.pipeline}, "
        f"{model.created_at:%d %B %Y}.",
    ]
    return "\n\n".join(lines)


def _scores(card: Card) -> str:
    scores = card.scores
    title = {
        "grouped": "Scores on the frozen test part",
        "legacy": "Scores on the source's own test part (legacy, leaked: not comparable)",
    }[card.data.split]
    rows = [
        [name, _number(scores[key]), _interval(scores, key)]
        for key, name in {
            "macro_f1": "macro-F1",
            "accuracy": "accuracy",
            **{f"recall_{label}": f"recall, {NAMES[label]}" for label in LABELS},
            **{f"precision_{label}": f"precision, {NAMES[label]}" for label in LABELS},
            "ece": "calibration error (ECE)",
            "ece_floor": "the same by chance alone, mean",
            "nll": "log loss",
        }.items()
        if key in scores
    ]
    images = card.data.parts.get("test")
    note = "Intervals: 95 %, bootstrapped over groups of twins; no narrower than Wilson's where few are wrong."
    note += f" {images:,} images; this test part has been looked at {_times(card.test_openings)} so far."
    text = f"## {title}\n\n{_table(['score', 'value', '95 % interval'], rows)}\n\n{note if images else ''}".rstrip()
    halves = {"leaked": "with a twin outside of the test part", "unleaked": "without one"}
    rows = [
        [words, *(_with_interval(card.leaked[name], key) for key in ("accuracy", "macro_f1"))]
        for name, words in halves.items()
        if name in card.leaked
    ]
    if rows:
        text += f"\n\n**{card.leaked.get('notice', 'legacy')}.** Of these test images, those\n\n"
        text += _table(["", "accuracy", "macro-F1"], rows)
    if card.feedback:
        count = f" {card.feedback['images']:.0f}" if "images" in card.feedback else ""
        text += f"\n\nOn{count} held-out corrections, which an earlier model erred on: accuracy "
        text += f"{_with_interval(card.feedback, 'accuracy')}."
    return text


def _limits(card: Card) -> str:
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in card.limits)


def _baselines(card: Card) -> str:
    rows = [
        [text, _number(card.baselines.get(f"{name}_macro_f1")), _number(card.baselines.get(f"{name}_accuracy"))]
        for name, text in BASELINES.items()
        if f"{name}_macro_f1" in card.baselines
    ]
    if not rows:
        return ""
    rows.insert(0, ["**this model**", *(f"**{_number(card.scores.get(key))}**" for key in ("macro_f1", "accuracy"))])
    return "## Beside rules that never look at a lesion\n\n" + _table(["rule", "macro-F1", "accuracy"], rows)


def _certainty(card: Card) -> str:
    calibration = card.calibration
    lines = [
        "## How sure it is",
        f"Probabilities are calibrated on a part of their own (temperature {calibration.temperature:.3f}). An image "
        f"whose largest probability is below {calibration.refer_below:.3f} is referred to a reader.",
    ]
    if card.coverage:
        header = ["class", *(f"sets at {_level(level)}" for level in card.coverage)]
        rows = [
            [NAMES[label], *(_with_interval(figures, label) for figures in card.coverage.values())]
            for label in LABELS
            if any(label in figures for figures in card.coverage.values())
        ]
        if any("size" in figures for figures in card.coverage.values()):
            rows.append(["*classes in a set, mean*", *(_number(f.get("size"), 2) for f in card.coverage.values())])
        lines += [
            "Prediction sets (class-conditional split conformal): how often they hold the true class, measured on the "
            "test part, each group of twins counted once.",
            _table(header, rows),
        ]
    for level, figures in card.coverage.items():
        again = [
            f"{NAMES[each]} {_number(figures[f'{each}_resplit'])}" for each in LABELS if f"{each}_resplit" in figures
        ]
        if again:
            mean = ", ".join(again)
            lines.append(f"At {_level(level)}, the mean over other divisions into calibration and test: {mean}.")
    rows = [
        [words, _number(card.risk_coverage[name])] for name, words in SELECTIVE.items() if name in card.risk_coverage
    ]
    if rows:
        lines += ["When the least certain images go to a reader:", _table(["", "value"], rows)]
    return "\n\n".join(lines)


def _stress(card: Card) -> str:
    rows = [
        [name, _number(figures.get("mild_macro_f1")), _number(figures.get("strong_macro_f1")), _points(figures["drop"])]
        for name, figures in card.stress.items()
        if "drop" in figures
    ]
    if not rows:
        return ""
    clean = card.stress.get("clean", {}).get("macro_f1")
    note = f"Macro-F1 under stressors applied to the canonical image{f' (clean: {_number(clean)})' if clean else ''}."
    return f"## Robustness\n\n{note}\n\n" + _table(["stressor", "mild", "strong", "points lost (strong)"], rows)


def _explanation(card: Card) -> str:
    pointing = card.explanation.get("pointing")
    if not pointing:
        return ""
    per_class = ", ".join(f"{NAMES[label]} {_percent(share)}" for label, share in pointing["per_class"].items())
    return (
        "## Heat maps\n\n"
        f"On {pointing['scans']} fresh simulated scans with a known lesion, {_percent(pointing['shown'])} were called "
        f"a tumour. Of these, the hottest pixel lay in the lesion (dilated by {_percent(pointing['tolerance'])} of the "
        f"width) in {_percent(pointing['hits'])} ({per_class}); a random place in the head would in "
        f"{_percent(pointing['chance'])}. With shuffled weights the maps change: rank correlation "
        f"{card.explanation['randomised_correlation']:.2f}."
    )


def _gate(card: Card) -> str:
    gate = card.gate
    if "accepted_brains" not in gate:
        return ""
    brains = {
        "accepted_brains": "brains of the validation part, refused",
        "accepted_widened": "the same in changed contrasts, refused",
        "accepted_rendered": "simulated heads in any contrast and plane, refused",
    }
    refused = gate.get("test_refused") or {}
    rows = [["**brains of the test part, refused**", _shares(refused, "share")]] if refused else []
    rows += [[words, _percent(1 - gate[name])] for name, words in brains.items() if name in gate]
    novel = {
        "novel_widened": "brains in changed contrasts, left to a reader as beyond what was learned",
        "novel_rendered": "simulated heads in any contrast and plane, left to a reader likewise",
        "missed_widened": "tumours in changed contrasts, called no tumour and not left to a reader for it",
    }
    rows += [[words, _percent(gate[name])] for name, words in novel.items() if name in gate]
    rows += [[f"{_words(kind)}, let through", _percent(1 - share)] for kind, share in gate.get("rejected", {}).items()]
    origin = gate.get("threshold_origin") or "The validation brains set the gate's threshold."
    count = f"{gate['measured']} fresh" if gate.get("measured") else "fresh"
    return (
        "## Input gate: how often it errs\n\n"
        + _table(["images", "share"], rows)
        + f"\n\n{origin} So their own rows say what was asked for; the test part's says what came of it. Contrasts are "
        "changed in the ways that it has learned from: in another way it errs more often. The other kinds are "
        f"{count} made-up images each (photographs and textures of pictures that it has not seen), and it has learned "
        "from more of each kind: what is unlike them may pass more often."
    )


def _data(card: Card) -> str:
    data = card.data
    rows = [
        [part, f"{images:,}", f"{data.groups[part]:,}" if part in data.groups else ""]
        for part, images in data.parts.items()
    ]
    origin = f" from `{data.source}`" if data.source else ""
    lines = [
        "## Data",
        f"Version `{data.version}`{origin}, {_split_name(data.split)} split; {data.quarantined:,} images quarantined.",
        _table(["part", "images", "groups of twins"], rows),
    ]
    if data.leak_rates:
        leaks = ", ".join(
            f"{_percent(rate)} of {part or 'the images in no part'}" for part, rate in data.leak_rates.items()
        )
        end = (
            "These parts were not used."
            if data.split == "grouped"
            else "**The test part above is one of these: its scores are inflated.**"
        )
        lines.append(f"In the source's own parts, images with an identical or mirrored twin in another: {leaks}. {end}")
    if data.shortcuts:
        rows = [
            [_words(trait), *(_number(accuracies.get(split)) for split in ("source", "grouped"))]
            for trait, accuracies in data.shortcuts.items()
        ]
        lines += [
            "What tells the class without a look at the lesion, accuracy on images as they came:",
            _table(["trait", "source's split", "grouped split"], rows),
        ]
    if data.licences:
        lines.append(f"Licences: {', '.join(data.licences)}.")
    return "\n\n".join(lines)


def _training(card: Card) -> str:
    rows = [[_words(name), _plain(value)] for name, value in _flat(card.training)]
    rows += [[f"augmentation: {_words(name)}", _plain(value)] for name, value in _flat(card.augmentation)]
    return "## Training\n\n" + _table(["setting or outcome", "value"], rows) if rows else ""


def _use() -> str:
    return f"## Intended use\n\n{INTENDED_USE}\n\n**Not for:** {OUT_OF_USE}"


# --- what falls short -----------------------------------------------------------------------------


def _shortcomings(card: Card) -> list[str]:
    """The measured figures that miss the project's targets, in words."""
    found = []
    if card.data.simulated:
        found.append("It was trained on simulated scans only: its answers to real scans mean nothing.")
    if card.data.split == "legacy":
        found.append("Its scores are on a leaked test part and say little about new images; it is never promoted.")
    elif card.scores["macro_f1"] < MACRO_F1_TARGET:
        found.append(f"Its macro-F1 in the test part is {card.scores['macro_f1']:.3f}; {MACRO_F1_TARGET} was aimed at.")
    for label in LABELS:
        recall = card.scores.get(f"recall_{label}")
        if recall is not None and recall < RECALL_TARGET:
            found.append(f"It misses {_percent(1 - recall)} of the images of class {NAMES[label]} in the test part.")
    best = max((value for key, value in card.baselines.items() if key.endswith("macro_f1")), default=0.0)
    if best >= card.scores["macro_f1"]:
        found.append("A rule that never looks at a lesion scores as high.")
    if card.scores.get("ece", 0) > max(ECE_TARGET, card.scores.get("ece_chance", 0)):
        found.append(
            f"Its probabilities are off by {_percent(card.scores['ece'])} on average (ECE), more than chance explains."
        )
    few = [label for label in LABELS if card.calibration.groups.get(label, GROUPS_FOR_SETS) < GROUPS_FOR_SETS]
    if few:
        named = ", ".join(f"{NAMES[label]} {card.calibration.groups[label]}" for label in few)
        found.append(
            f"Its prediction sets hold some classes whatever the scan shows: a threshold at 95 % takes "
            f"{GROUPS_FOR_SETS} unlike calibration images of a class, and there are of {named}."
        )
    if (answered := card.risk_coverage.get("answered", 1)) < ANSWERED_LEAST:
        found.append(f"It answers {_percent(answered)} of the images itself and refuses or refers the rest.")
    accuracy = card.risk_coverage.get("answered_accuracy", 1)
    if accuracy < ANSWERED_TARGET:
        found.append(f"Of the images it answers itself, {_percent(1 - accuracy)} are wrong.")
    accuracy = card.risk_coverage.get("accuracy_at_85", 1)
    if accuracy < MOST_CERTAIN_TARGET:
        found.append(f"Of its most certain answers, 85 % of all, {_percent(1 - accuracy)} are wrong.")
    for level, figures in card.coverage.items():
        wanted = float(level)
        short = [label for label in LABELS if figures.get(label, 1) < wanted - COVERAGE_TARGET]
        # More is what the method gives with few images; so only where chance does not explain it.
        more = [label for label in LABELS if figures.get(f"{label}_low", 0) > wanted + COVERAGE_TARGET]
        for side, off in (("less", short), ("more", more)):
            if off:
                named = ", ".join(f"{NAMES[label]} {_percent(figures[label])}" for label in off)
                found.append(f"Prediction sets at {_level(level)} covered {side} in the test part: {named}.")
    for name, figures in card.stress.items():
        if figures.get("drop", 0) > DROP_NOTED:
            found.append(f"Under strong {_words(name)} it loses {_points(figures['drop'])} points of macro-F1.")
    pointing = card.explanation.get("pointing") or {}
    if pointing.get("hits", 1) < POINTING_TARGET:
        found.append(f"Its heat maps peak on the lesion in only {_percent(pointing['hits'])} of simulated scans.")
    likeness = card.explanation.get("randomised_correlation", 0.0)
    if likeness > RANDOMISED_MOST:
        found.append(
            f"Its heat maps owe little to what was learned: with shuffled weights they are much the same (rank "
            f"correlation {likeness:.2f})."
        )
    return found


# --- words and tables -----------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"  # noqa: RUF001


def _interval(scores: Mapping[str, float], key: str) -> str:
    low, high = scores.get(f"{key}_low"), scores.get(f"{key}_high")
    return "" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _with_interval(figures: Mapping[str, float], key: str) -> str:
    if key not in figures:
        return ""
    interval = _interval(figures, key)
    return _number(figures[key]) + (f" ({interval})" if interval else "")


def _shares(figures: Mapping[str, float], key: str) -> str:
    """As `_with_interval`, in percent."""
    return f"{_percent(figures[key])} ({100 * figures[f'{key}_low']:.1f} to {100 * figures[f'{key}_high']:.1f})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _level(level: str) -> str:
    return f"{100 * float(level):.0f} %"


def _points(share: float) -> str:
    return f"{100 * share:.1f}"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _split_name(split: SplitName) -> str:
    return {"grouped": "grouped", "legacy": "legacy (leaked)"}[split]


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _flat(section: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Its scalars in order, those of one level below with the name above in front."""
    rows: list[tuple[str, Any]] = []
    for name, value in section.items():
        if isinstance(value, Mapping):
            rows += [(f"{name} {inner}", each) for inner, each in value.items() if not isinstance(each, Mapping | list)]
        elif not isinstance(value, list | tuple) and value is not None:
            rows.append((name, value))
    return rows


def _numbers(section: Mapping[str, Any]) -> Figures:
    """The scalar figures; a curve stays in the run's artifacts."""
    return {
        name: float(value)
        for name, value in section.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
