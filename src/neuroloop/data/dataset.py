"""The grouped split, and the arrays that training, calibration and evaluation read."""

import hashlib
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neuroloop.core.errors import InvalidSource
from neuroloop.core.schemas import (
    LABELS,
    PARTS,
    ImageEntry,
    Part,
    Quarantined,
    Snapshot,
    Split,
    SplitEntry,
    SplitName,
)
from neuroloop.data.audit import Audit, FaultKind
from neuroloop.data.packed import pack, unpack
from neuroloop.data.source import is_test
from neuroloop.imaging.augment import AugmentParams, augment_batch
from neuroloop.imaging.canonical import canonicalize
from neuroloop.imaging.decode import decode

FRACTIONS: Mapping[Part, float] = {"train": 0.66, "validation": 0.10, "calibration": 0.10, "test": 0.14}

Similar = Callable[[Sequence[ImageEntry]], Iterable[tuple[int, int]]]
"""Tells which of the given images are similar, as pairs of their indices."""

BLOCK = 512
"""Training images that are worked on, stored and read together."""

UNUSABLE: tuple[FaultKind, ...] = ("unreadable", "tiny", "blank")
"""The audit's faults of images that cannot be put before a model at all."""


@dataclass(frozen=True)
class Arrays:
    """Images in canonical form: `images` uint8 (n, s, s), `labels` int64 (n,) into `LABELS`, `groups` int64 (n,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    groups: NDArray[np.int64]
    paths: tuple[str, ...]

    def to_bytes(self) -> bytes:
        """As an .npz without pickle."""
        return pack(images=self.images, labels=self.labels, groups=self.groups, paths=np.array(self.paths, np.str_))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Arrays":
        """The inverse of `to_bytes`."""
        found = unpack(data)
        return cls(found["images"], found["labels"], found["groups"], tuple(found["paths"].tolist()))

    @classmethod
    def joined(cls, some: Sequence["Arrays"]) -> "Arrays":
        """One after the other; at least one."""
        return cls(
            images=np.concatenate([each.images for each in some]),
            labels=np.concatenate([each.labels for each in some]),
            groups=np.concatenate([each.groups for each in some]),
            paths=tuple(path for each in some for path in each.paths),
        )


def make_split(
    snapshot: Snapshot,
    audit: Audit,
    *,
    frozen: Mapping[str, Part] | None = None,
    bound: Mapping[str, Collection[Part]] | None = None,
    similar: Similar | None = None,
    seed: int = 0,
    fractions: Mapping[Part, float] = FRACTIONS,
) -> Split:
    """Divide the images by groups: no group stands in two parts, every class in all; the source's parts are ignored.

    `frozen` maps sha256 -> part and is what earlier splits decided: such an image keeps its part for ever, whatever its
    name or class is now, and a group with one follows it. `bound` maps sha256 -> parts of frozen images that it is
    similar to and that are not there now (removed, or quarantined): a new image follows them too, and is quarantined
    where they are several. The other groups go, large ones first, where their class is furthest below its share,
    `fractions` of the class's images. The result depends on the images' bytes and the seed only, not on names or order.

    A group may come to hold images frozen in different parts: a new image ties them together, or one comes back to a
    twin that arrived while it was away. Then as few as possible are quarantined, new ones first and test images last,
    because wherever they went they would leak one part into another; the rest stay, as one group a part.
    `similar` tells the pairs (i, j) of a list of images that are similar; without it all of such a group count as
    similar, and only the images of its most protected part stay.

    Raises `InvalidSource` where a class has too few unlike images to reach every part.
    """
    known = {sha256: frozenset(parts) for sha256, parts in (bound or {}).items()}
    known |= {sha256: frozenset((part,)) for sha256, part in (frozen or {}).items()}
    members = _members(snapshot.images, audit)
    quarantined = list(audit.quarantined)
    placed: list[tuple[Part, list[ImageEntry]]] = []
    free: list[list[ImageEntry]] = []

    for group in members.values():
        parts = frozenset[Part]().union(*(known.get(entry.sha256, ()) for entry in group))
        if len(parts) > 1:
            kept, reasons = _untie(group, known, frozen or {}, similar)
            placed += [(part, some) for part, some in kept if part]
            free += [some for part, some in kept if not part]
            quarantined += reasons
        elif parts:
            placed.append((next(iter(parts)), group))
        else:
            free.append(group)
    placed = _place(free, placed, fractions, seed)
    _refuse_gaps(placed, members, PARTS)
    return _split(snapshot, placed, quarantined)


def source_split(
    snapshot: Snapshot, audit: Audit, *, validation: float = 0.05, calibration: float = 0.05, seed: int = 0
) -> Split:
    """The legacy split: tested on the part that the source itself calls test, to compare with what others report.

    The test part is every usable image of the source's parts that `source.is_test`, otherwise quarantined ones (of
    another modality, at odds with a twin) included, as others test on them; those outside it are learned from. The
    rest is divided into train, validation and calibration, fractions of a class's images (small ones: what it is
    compared with trained on nearly all of them), by groups among themselves, but not kept apart from the test
    part: that is what this split is there to show. So groups that reach into the test part are learned from, as they
    are by others, while enough other groups remain to hold out; these have nothing of the test part in them. `leaked`
    names the test images with a twin in another of the source's parts.
    Raises `InvalidSource` where the source has no test part of its own, or a class reaches not every part.
    """
    tests = [entry for entry in snapshot.images if is_test(entry.part)]
    if not tests or len(tests) == len(snapshot.images):
        parts = ", ".join(sorted({entry.part for entry in snapshot.images} - {""})) or "none"
        raise InvalidSource(
            "There is no legacy split of this source",
            why=f"it needs a part of its own whose name starts with test, and others; the source's parts: {parts}",
            fix="choose the grouped split",
        )
    unusable = {path for kind in UNUSABLE for path in audit.faults.get(kind, ())}
    own = {entry.path for entry in tests}
    rest = tuple(entry for entry in snapshot.images if entry.path not in own)
    members = _members(rest, audit)
    fractions: dict[Part, float] = {
        "train": 1 - validation - calibration,
        "validation": validation,
        "calibration": calibration,
    }
    reaching = {audit.groups[entry.path] for entry in tests if entry.path in audit.groups}
    leaking = [group for number, group in members.items() if number in reaching]
    # What was quarantined is in no group of the audit: one of its own.
    leaking += [[entry] for entry in rest if entry.path not in audit.groups and entry.path not in unusable]
    apart = [group for number, group in members.items() if number not in reaching]
    placed = _place(apart, [("train", group) for group in leaking], fractions, seed)
    if _gaps(placed, ("validation", "calibration")):
        placed = _place([*apart, *leaking], [], fractions, seed)

    # In the test part a group is what it is to the audit; quarantined images are in none, so each is its own.
    shown = [entry for entry in tests if entry.path not in unusable]
    grouped: dict[object, list[ImageEntry]] = defaultdict(list)
    for entry in shown:
        grouped[audit.groups.get(entry.path, entry.path)].append(entry)
    placed += [("test", group) for group in grouped.values()]
    _refuse_gaps(placed, members, PARTS)
    leaked = set(audit.leaked)
    return _split(
        snapshot,
        placed,
        [each for each in audit.quarantined if each.path in unusable],
        name="legacy",
        leaked=tuple(sorted(entry.path for entry in shown if entry.path in leaked)),
    )


def canonical_arrays(entries: Sequence[SplitEntry], read: Callable[[SplitEntry], bytes], size: int) -> Arrays:
    """Decode the entries into canonical form, in their order. `read` is called from several threads."""

    def one(entry: SplitEntry) -> NDArray[np.uint8]:
        return canonicalize(decode(read(entry)), size)

    images = np.empty((len(entries), size, size), np.uint8)
    with ThreadPoolExecutor(4) as pool:
        for number, image in enumerate(pool.map(one, entries)):
            images[number] = image
    return Arrays(
        images=images,
        labels=np.array([LABELS.index(entry.label) for entry in entries], np.int64),
        groups=np.array([entry.group for entry in entries], np.int64),
        paths=tuple(entry.path for entry in entries),
    )


def blocks(entries: Sequence[SplitEntry]) -> list[NDArray[np.int64]]:
    """The entries in blocks of about `BLOCK`, as rising indices: a group of twins stands in one block, by its hash.

    So each block is drawn like the whole, and what the blocks are depends on the entries alone.
    """
    first: dict[int, str] = {}
    for entry in entries:
        first[entry.group] = min(first.get(entry.group, entry.sha256), entry.sha256)
    count = max(1, -(-len(entries) // BLOCK))
    # Not the hash itself: that one orders the groups of the split.
    own = {group: zlib.crc32(b"block " + sha256.encode()) % count for group, sha256 in first.items()}
    numbers = np.array([own[entry.group] for entry in entries], np.int64)
    return [np.flatnonzero(numbers == number) for number in range(count)]


def choose(labels: NDArray[np.int64], groups: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
    """What one epoch shows: one random member of each twin group, smaller classes topped up to the largest.

    `labels`, `groups` (n,) of the images. Returns shuffled indices (m,), m = classes present x groups of the largest.
    Topping up goes round a class's groups, so that none counts more than once more often than another.
    """
    own: dict[int, list[NDArray[np.int64]]] = defaultdict(list)
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, key in enumerate(zip(labels.tolist(), groups.tolist(), strict=True)):
        members[key].append(index)
    for (label, _), indices in members.items():
        own[label].append(np.array(indices))
    largest = max((len(each) for each in own.values()), default=0)
    chosen = np.array(
        [
            generator.choice(each[number])
            for each in own.values()
            for number in np.resize(generator.permutation(len(each)), largest)
        ],
        np.int64,
    )
    generator.shuffle(chosen)
    return chosen


def augmented_epochs(
    arrays: Arrays, *, epochs: int, generator: np.random.Generator, params: AugmentParams
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Training shards of what fits into memory: what `choose` shows, augmented: images uint8 (m, s, s), labels (m,)."""
    for _ in range(epochs):
        chosen = choose(arrays.labels, arrays.groups, generator)
        yield augment_batch(arrays.images[chosen], generator, params), arrays.labels[chosen]


def _members(images: Sequence[ImageEntry], audit: Audit) -> dict[int, list[ImageEntry]]:
    members: dict[int, list[ImageEntry]] = defaultdict(list)
    for entry in images:
        if entry.path in audit.groups:
            members[audit.groups[entry.path]].append(entry)
    return members


def _place(
    free: list[list[ImageEntry]],
    placed: list[tuple[Part, list[ImageEntry]]],
    fractions: Mapping[Part, float],
    seed: int,
) -> list[tuple[Part, list[ImageEntry]]]:
    """`placed`, and the free groups each where its class is furthest below its share."""
    placed = list(placed)
    have = _counts(placed)
    images: Counter[str] = Counter()
    for (label, _), count in (have + _counts([("train", group) for group in free])).items():
        images[label] += count
    wanted = {(label, part): share * count for label, count in images.items() for part, share in fractions.items()}
    left = Counter(map(_label, free))
    for group in sorted(free, key=lambda group: (-len(group), _draw(group, seed))):
        label = _label(group)
        empty = [part for part in fractions if not have[label, part]]
        # The last groups of a class go where it has none yet: every part needs each class.
        open_to = empty if empty and left[label] <= len(empty) else fractions
        left[label] -= 1
        missing = {part: wanted[label, part] - have[label, part] for part in open_to}
        roomy = [part for part in missing if missing[part] >= len(group)]
        # Relative shortfall fills the parts evenly, each with its share of large groups; a group that fits nowhere
        # goes where most is missing.
        shortfall = {part: missing[part] / wanted[label, part] for part in roomy} or missing
        part = max(shortfall, key=shortfall.__getitem__)
        placed.append((part, group))
        have.update((entry.label, part) for entry in group)
    return placed


def _label(group: list[ImageEntry]) -> str:
    """The class of most of its images."""
    return Counter(entry.label for entry in group).most_common(1)[0][0]


def _untie(
    group: list[ImageEntry], known: Mapping[str, Collection[Part]], frozen: Collection[str], similar: Similar | None
) -> tuple[list[tuple[Part | None, list[ImageEntry]]], list[Quarantined]]:
    """What of a group with several parts can stay, each with its part (None: any), and why the others cannot.

    Images come in one by one, the most protected part first and new ones last, each joining the similar ones that are
    in already; one that would tie two parts together stays out. So what is in never ties any two.
    """

    def order(index: int) -> tuple[bool, int, bool, str]:
        entry = group[index]
        parts = known.get(entry.sha256, ())
        return not parts, -max(map(PARTS.index, parts), default=0), entry.sha256 not in frozen, entry.sha256

    near: dict[int, set[int]] = defaultdict(set)
    if similar is None:
        near = {i: set(range(len(group))) for i in range(len(group))}
    else:
        for i, j in similar(group):
            near[i].add(j)
            near[j].add(i)
    cluster: dict[int, tuple[set[Part], list[int]]] = {}
    out: list[Quarantined] = []
    for index in sorted(range(len(group)), key=order):
        entry = group[index]
        joined = {id(cluster[other]): cluster[other] for other in near[index] if other in cluster}.values()
        parts = set(known.get(entry.sha256, ())).union(*(parts for parts, _ in joined))
        if len(parts) > 1:
            named = " and ".join(sorted(parts))
            reason = f"similar to images of both {named}: it would leak one into the other"
            if entry.sha256 in frozen:
                reason = f"its part is {next(iter(known[entry.sha256]))}, but it is {reason}"
            out.append(Quarantined(path=entry.path, reason=reason))
            continue
        whole = (parts, [index, *(other for _, indices in joined for other in indices)])
        cluster.update((other, whole) for other in whole[1])
    wholes = {id(each): each for each in cluster.values()}.values()
    return [(next(iter(parts), None), [group[index] for index in indices]) for parts, indices in wholes], out


def _split(
    snapshot: Snapshot,
    placed: list[tuple[Part, list[ImageEntry]]],
    quarantined: list[Quarantined],
    *,
    name: SplitName = "grouped",
    leaked: tuple[str, ...] = (),
) -> Split:
    groups = {entry.path: (number, part) for number, (part, group) in enumerate(_ordered(placed)) for entry in group}
    return Split(
        version=snapshot.version,
        simulated=snapshot.simulated,
        name=name,
        entries=tuple(
            SplitEntry(
                path=entry.path,
                label=entry.label,
                md5=entry.md5,
                sha256=entry.sha256,
                group=groups[entry.path][0],
                part=groups[entry.path][1],
                origin=entry.origin,
            )
            for entry in snapshot.images
            if entry.path in groups
        ),
        quarantined=tuple(sorted(quarantined, key=lambda each: each.path)),
        leaked=leaked,
    )


def _counts(placed: list[tuple[Part, list[ImageEntry]]]) -> Counter[tuple[str, Part]]:
    return Counter((entry.label, part) for part, group in placed for entry in group)


def _draw(group: list[ImageEntry], seed: int) -> str:
    # By content, so that a renamed or reordered source is divided the same way.
    return hashlib.sha256(f"{seed}:{min(entry.sha256 for entry in group)}".encode()).hexdigest()


def _ordered(placed: list[tuple[Part, list[ImageEntry]]]) -> list[tuple[Part, list[ImageEntry]]]:
    return sorted((each for each in placed if each[1]), key=lambda each: min(entry.path for entry in each[1]))


def _gaps(placed: list[tuple[Part, list[ImageEntry]]], parts: Sequence[Part]) -> list[str]:
    have = _counts(placed)
    return [f"{label} in {part}" for part in parts for label in LABELS if not have[label, part]]


def _refuse_gaps(
    placed: list[tuple[Part, list[ImageEntry]]], members: Mapping[int, list[ImageEntry]], parts: Sequence[Part]
) -> None:
    if gaps := _gaps(placed, parts):
        unlike: Counter[str] = Counter(
            label for group in members.values() for label in {entry.label for entry in group}
        )
        raise InvalidSource(
            f"The images cannot be divided into {', '.join(parts)}",
            why=f"similar images must stay together, which leaves no {', no '.join(gaps)}; "
            f"groups of unlike images: {', '.join(f'{unlike[label]} {label}' for label in LABELS)}",
            fix="add images of other patients to the classes with few groups",
        )
