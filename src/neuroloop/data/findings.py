"""What a person should know of the data, graded: what it is, why it matters, and what to do."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal

from pydantic import Field

from neuroloop.core.errors import InvalidSource
from neuroloop.core.schemas import Record
from neuroloop.data.audit import MOST_UNUSABLE, Audit, FaultKind
from neuroloop.data.shortcuts import Shortcuts
from neuroloop.data.source import IMAGE_SUFFIXES
from neuroloop.imaging.decode import SMALLEST_SIDE

GRAVE_LEAK = 0.01
"""Leak rate of a part from which its scores mislead: one point of accuracy is what models are told apart by."""

Grade = Literal["error", "warning", "note"]
GRADES: tuple[Grade, ...] = ("error", "warning", "note")


class Finding(Record):
    """One thing a person should know of the data: what, why it matters, and what to do.

    `error`: whoever relies on it is misled. `warning`: worth a look; the platform has dealt with it as said. `note`:
    good to know.
    """

    grade: Grade
    name: str
    what: str
    why: str
    fix: str
    images: int = Field(description="how many images it is about")


def findings(
    audit: Audit, measured: Shortcuts | None = None, ignored: Mapping[str, int] | None = None
) -> tuple[Finding, ...]:
    """What a person should know, the gravest first; `measured` adds the shortcuts.

    `ignored` is what was not looked at, in words -> number of files.
    """
    found = [*_ignored(ignored or {}), *_broken(audit), *_leaks(audit), *_quarantined(audit), *_likeness(audit)]
    if measured:
        found += _tempting(measured)
    return tuple(sorted(found, key=lambda finding: GRADES.index(finding.grade)))


def refuse(found: Sequence[Finding], stop_on: Collection[str] = ()) -> None:
    """Raise `InvalidSource` for a class that is mostly unusable, and for the findings named in `stop_on`."""
    stopping = [finding for finding in found if finding.name == "broken_class" or finding.name in stop_on]
    if stopping:
        broken = any(finding.name == "broken_class" for finding in stopping)
        raise InvalidSource(
            f"The audit stops the run: {'; '.join(finding.what.rstrip('.') for finding in stopping)}",
            why=stopping[0].why
            if broken
            else f"NEUROLOOP_AUDIT_STOP_ON names {', '.join(finding.name for finding in stopping)}",
            fix=f"{stopping[0].fix.rstrip('.')}; the audit report shows the images (data/audit.html in MLflow)",
        )


def _ignored(ignored: Mapping[str, int]) -> Iterator[Finding]:
    if ignored:
        count = sum(ignored.values())
        named = ", ".join(f"{number:,} {what}" for what, number in ignored.items())
        yield Finding(
            grade="warning",
            name="ignored",
            what=f"{count:,} files were not looked at: {named}",
            why=f"images are told by their names, which end in {', '.join(IMAGE_SUFFIXES)}, in folders of their class",
            fix="where they are images, convert them or move them into class folders",
            images=count,
        )


def _broken(audit: Audit) -> Iterator[Finding]:
    reasons = {each.path: each.reason.rstrip(".") for each in audit.quarantined}
    for label, bad in audit.broken.items():
        named = "; ".join(f"{path} ({reasons[path]})" for path in bad[:5])
        more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        yield Finding(
            grade="error",
            name="broken_class",
            what=f"{len(bad)} of {audit.classes[label]} {label} images cannot be used",
            why=f"at most {MOST_UNUSABLE:.0%} may be: {named}{more}",
            fix="mend or remove these files in the source and start again",
            images=len(bad),
        )


def _leaks(audit: Audit) -> Iterator[Finding]:
    for part in audit.held_out:
        if part.twins:
            yield Finding(
                grade="error" if part.leak_rate >= GRAVE_LEAK else "warning",
                name="source_leak",
                what=f"{part.leak_rate:.1%} of {part.name or 'the images in no part'} ({part.twins:,} of "
                f"{part.images:,} images) stand in another part of the source too, "
                f"{part.identical} of them byte for byte",
                why="a model can know these images by heart: a score on this part says little about new ones",
                fix="use the grouped split; quote a score on this part only with its leak rate beside it",
                images=part.twins,
            )


_FAULT_WORDS: dict[FaultKind, tuple[str, str, str]] = {
    "unreadable": (
        "cannot be read: no image, damaged or cut off",
        "they are quarantined; nothing was lost unless the source holds them whole elsewhere",
        "export or download them again",
    ),
    "tiny": (
        f"are smaller than {SMALLEST_SIDE} pixels",
        "they are quarantined: no anatomy can be told apart at this size",
        "find them in their original size",
    ),
    "blank": (
        "show nothing",
        "they are quarantined: a class cannot be learnt from an even grey",
        "remove them from the source",
    ),
    "wrong_modality": (
        "look like CT, not MRI: the head is in a closed bright ring of bone",
        "they are quarantined: a model would learn that CT means their class. The test is made to spare MRI, so some "
        "CT with a thin or blurred skull may remain",
        "look at them in the report, and remove them from the source",
    ),
}


def _quarantined(audit: Audit) -> Iterator[Finding]:
    for kind, (what, why, fix) in _FAULT_WORDS.items():
        count = len(audit.faults[kind])
        if count:
            yield Finding(grade="warning", name=kind, what=f"{_images(count)} {what}", why=why, fix=fix, images=count)
    if audit.label_conflicts:
        count = len({path for pair in audit.label_conflicts for path in pair})
        yield Finding(
            grade="warning",
            name="label_conflicts",
            what=f"{_images(count)} show one picture under two classes, or neighbouring slices that cannot be told "
            f"from it, in {len(audit.label_conflicts)} pairs",
            why="of one picture one label is wrong, and nothing here says which: both are quarantined",
            fix="have a reader decide, and remove the wrong one from the source; where a volume was labelled slice by "
            "slice both may be right",
            images=count,
        )
    if tied := [each for each in audit.quarantined if each.path in audit.groups]:
        yield Finding(
            grade="warning",
            name="between_parts",
            what=f"{_images(len(tied))} are similar to images of two parts of the frozen split",
            why="an image never changes its part, so they would leak one into the other: they are quarantined",
            fix="nothing, unless they are many: then look at them in the report",
            images=len(tied),
        )


def _likeness(audit: Audit) -> Iterator[Finding]:
    kept, groups = len(audit.groups), len(set(audit.groups.values()))
    if audit.mixed_groups:
        yield Finding(
            grade="warning",
            name="mixed_groups",
            what=f"{audit.mixed_groups} groups of similar images hold more than one class",
            why="neighbouring slices may differ in class; a wrong label may hide there too",
            fix="look at them in the report",
            images=audit.mixed_groups,
        )
    if groups < kept:
        yield Finding(
            grade="note",
            name="duplicates",
            what=f"{kept:,} usable images are {groups:,} groups of similar ones; "
            f"{audit.identical:,} repeat another's bytes",
            why="similar images are less evidence than their number says, and must stay in one part of a split",
            fix="nothing: the grouped split, the sampling and the intervals count groups",
            images=kept - groups,
        )


def _tempting(measured: Shortcuts) -> Iterator[Finding]:
    if found := measured.telling():
        splits = {"source": ("source's", measured.source), "grouped": ("grouped", measured.grouped)}

        def told(name: str) -> str:
            which, scores = splits[found[name]]
            return f"{name} {scores[name]:.1%} on the {which} split"

        largest = " and ".join(
            f"{scores['majority']:.1%} on the {which}" for which, scores in splits.values() if scores
        )
        yield Finding(
            grade="warning",
            name="shortcuts",
            what=f"Traits that are no lesion predict the class: {', '.join(map(told, found))} "
            f"(the largest class of those tested on: {largest})",
            why="a model may learn how the images were made instead of what they show",
            fix="train on the canonical form, and demand a score well above these",
            images=0,
        )


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"
