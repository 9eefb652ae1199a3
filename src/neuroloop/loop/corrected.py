"""The corrections of all batches so far: which of them are learned from and which tested on, and their pixels."""

from collections.abc import Iterator, Mapping

import numpy as np

from neuroloop.bootstrap import Services
from neuroloop.core import keys
from neuroloop.core.schemas import LABELS, Part
from neuroloop.data import similarity
from neuroloop.data.audit import twins
from neuroloop.data.dataset import Arrays
from neuroloop.imaging.canonical import canonicalize
from neuroloop.imaging.decode import decode
from neuroloop.loop import feedback, handoff, splitting
from neuroloop.loop.feedback import Correction
from neuroloop.loop.handoff import log

_AT_ONCE = 4096  # images that are compared with corrections at a time


def known(services: Services) -> list[Correction]:
    """All corrections of all batches that are not erased."""
    return feedback.allowed(services.log, feedback.used(services.store))


def tested_on(services: Services, version: str, found: list[Correction]) -> list[Correction]:
    """Those that `divided` would test on, for who learns from none: not all data versions have to be looked at.

    For of the others only twins of held-out ones matter.
    """
    others = {each.key: each.key for each in found if not each.held_out}
    met = {key for _, key in _known(services, [each for each in found if each.held_out], others)}
    return divided(services, version, [each for each in found if each.held_out or each.key in met])[1]


def arrays_of(services: Services, found: list[Correction], size: int) -> Arrays:
    """Canonical arrays of corrected images; what is similar shares a group."""
    images = np.empty((len(found), size, size), np.uint8)
    thumbnails = np.empty((len(found), similarity.SIDE**2), np.float32)
    for number, correction in enumerate(found):  # one at a time: uploads may be large
        pixels = decode(services.store.get(correction.key))
        images[number], thumbnails[number] = canonicalize(pixels, size), similarity.thumbnail(pixels)
    groups, _, _ = similarity.connect(thumbnails, [correction.label for correction in found])
    return Arrays(
        images=images,
        labels=np.array([LABELS.index(correction.label) for correction in found], np.int64),
        groups=groups,
        paths=tuple(correction.key for correction in found),
    )


def divided(
    services: Services, version: str, found: list[Correction]
) -> tuple[list[Correction], list[Correction], dict[str, str]]:
    """The corrections to train on, those to test on, and why others serve for neither: path -> reason.

    One picture counts once, and not at all where it has been corrected to several classes, cannot be read or, in a
    model of real scans, is a simulated one. What is trained on has no twin in what is held out, and a held-out
    correction none in the training part or in an earlier batch, which champion and candidate have both learned:
    otherwise remembering would look like learning.
    """
    split = handoff.read_split(services, version)
    unfit = feedback.repeated(found)
    if not split.simulated:
        unfit |= dict.fromkeys(feedback.simulated(services.log, found), "a simulated scan")
    readable = splitting.thumbnails(services.store, [correction.key for correction in found])
    unfit |= {correction.key: "it cannot be read" for correction in found if correction.key not in readable}
    found = [correction for correction in found if correction.key not in unfit]
    held_out = [correction for correction in found if correction.held_out]
    candidates = [correction for correction in found if not correction.held_out]

    def of(*parts: Part) -> dict[str, str]:
        return {keys.image(entry.md5): f"{entry.path} ({entry.part})" for entry in split.of(*parts)}

    closed = splitting.closed(splitting.decisions(services.store), simulated=split.simulated)
    closed |= of("validation", "calibration", "test")
    left_out = unfit | {
        correction.key: f"twin of {name}, which is {role}"
        for some, others, role in ((held_out, of("train"), "trained on"), (candidates, closed, "held out"))
        for correction, name in _known(services, some, others)
    }
    # Of twins among the corrections, the batch that came first decides.
    came = {correction.key: correction.batch for correction in candidates}
    pairs = list(_known(services, held_out, {key: key for key in came}))
    left_out |= {key: f"twin of {held.key}, which is held out" for held, key in pairs if held.batch <= came[key]}
    left_out |= {
        held.key: f"twin of {key}, which an earlier batch has trained on" for held, key in pairs if key not in left_out
    }
    for key, reason in left_out.items():
        log.info("%s is left out: %s", key, reason)
    return (
        [correction for correction in candidates if correction.key not in left_out],
        [correction for correction in held_out if correction.key not in left_out],
        left_out,
    )


def _known(
    services: Services, corrections: list[Correction], images: Mapping[str, str]
) -> Iterator[tuple[Correction, str]]:
    """Those of the corrections that have a twin among these images (store key -> in words), each with one of them."""
    by_key, names = {correction.key: correction for correction in corrections}, list(images)
    mine = splitting.thumbnails(services.store, by_key)
    for at in range(0, len(names) if mine else 0, _AT_ONCE):
        theirs = splitting.thumbnails(services.store, names[at : at + _AT_ONCE])
        if theirs:
            ours, others = list(mine), list(theirs)
            for i, j in twins(np.stack(list(mine.values())), np.stack(list(theirs.values()))):
                yield by_key[ours[i]], images[others[j]]
