"""The grouped split, and the arrays that training, calibration and evaluation read."""

import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neuroloop.core.errors import InvalidSource, NeuroLoopError
from neuroloop.core.schemas import LABELS, PARTS, ImageEntry, Part, Quarantined, Snapshot, Split, SplitEntry
from neuroloop.data.audit import Audit
from neuroloop.imaging.augment import AugmentParams, augment_batch
from neuroloop.imaging.canonical import canonicalize
from neuroloop.imaging.decode import decode

FRACTIONS: Mapping[Part, float] = {"train": 0.60, "validation": 0.12, "calibration": 0.10, "test": 0.18}


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
        arrays = unpack(data)
        return cls(arrays["images"], arrays["labels"], arrays["groups"], tuple(arrays["paths"].tolist()))


def make_split(
    snapshot: Snapshot,
    audit: Audit,
    *,
    frozen: Mapping[str, Part] | None = None,
    seed: int = 0,
    fractions: Mapping[Part, float] = FRACTIONS,
) -> Split:
    """Divide the images by groups: no group stands in two parts, every class in all; the source's parts are ignored.

    `frozen` maps sha256 -> part and is what earlier splits decided: such an image keeps its part for ever, and a group
    with one follows it. Where a new image ties images together that are frozen in different parts, it is quarantined,
    because wherever it went it would leak into the other; the frozen ones stay, as one group a part. The other groups
    go, large ones first, where their class is furthest below its share, `fractions` of the class's images. The
    result depends on the images' bytes and the seed only, not on names or order. Raises `InvalidSource` where a class
    has too few unlike images to reach every part.
    """
    frozen = frozen or {}
    members: dict[int, list[ImageEntry]] = defaultdict(list)
    for entry in snapshot.images:
        if entry.path in audit.groups:
            members[audit.groups[entry.path]].append(entry)

    images: Counter[str] = Counter(entry.label for group in members.values() for entry in group)
    wanted = {(label, part): fractions[part] * count for label, count in images.items() for part in PARTS}
    have: Counter[tuple[str, Part]] = Counter()
    placed: list[tuple[Part, list[ImageEntry]]] = []
    quarantined = list(audit.quarantined)

    def place(part: Part, group: list[ImageEntry]) -> None:
        placed.append((part, group))
        have.update((entry.label, part) for entry in group)

    free: list[list[ImageEntry]] = []
    for group in members.values():
        parts = {frozen[entry.sha256] for entry in group if entry.sha256 in frozen}
        if not parts:
            free.append(group)
        elif len(parts) == 1:
            place(parts.pop(), group)
        else:
            for part in sorted(parts, key=PARTS.index):
                place(part, [entry for entry in group if frozen.get(entry.sha256) == part])
            reason = f"similar to images of both {' and '.join(sorted(parts))}: it would leak one into the other"
            quarantined += [Quarantined(path=e.path, reason=reason) for e in group if e.sha256 not in frozen]

    for group in sorted(free, key=lambda group: (-len(group), _draw(group, seed))):
        label = Counter(entry.label for entry in group).most_common(1)[0][0]

        missing = {part: wanted[label, part] - have[label, part] for part in PARTS}
        roomy = [part for part in PARTS if missing[part] >= len(group)]
        # Relative shortfall fills the parts evenly, each with its share of large groups; a group that fits nowhere
        # goes where most is missing.
        shortfall = {part: missing[part] / wanted[label, part] for part in roomy} or missing
        place(max(shortfall, key=shortfall.__getitem__), group)

    _refuse_gaps(have, members)
    groups = {entry.path: (number, part) for number, (part, group) in enumerate(_ordered(placed)) for entry in group}
    return Split(
        version=snapshot.version,
        simulated=snapshot.simulated,
        entries=tuple(
            SplitEntry(
                path=entry.path,
                label=entry.label,
                md5=entry.md5,
                sha256=entry.sha256,
                group=groups[entry.path][0],
                part=groups[entry.path][1],
            )
            for entry in snapshot.images
            if entry.path in groups
        ),
        quarantined=tuple(sorted(quarantined, key=lambda each: each.path)),
    )


def registry(split: Split, frozen: Mapping[str, Part] | None = None) -> dict[str, Part]:
    """What the next split must keep: `frozen` and the parts of this split, sha256 -> part."""
    return {**{entry.sha256: entry.part for entry in split.entries}, **(frozen or {})}


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


def augmented_epochs(
    arrays: Arrays, *, epochs: int, generator: np.random.Generator, params: AugmentParams
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Training shards: one random member of each twin group, smaller classes topped up to the largest, all augmented.

    Each shard is (images uint8 (m, s, s), labels int64 (m,)), shuffled, m = classes present x groups of the largest.
    Topping up goes round a class's groups, so that none counts more than once more often than another.
    """
    groups: dict[int, list[NDArray[np.int64]]] = defaultdict(list)
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, key in enumerate(zip(arrays.labels.tolist(), arrays.groups.tolist(), strict=True)):
        members[key].append(index)
    for (label, _), indices in members.items():
        groups[label].append(np.array(indices))
    largest = max((len(own) for own in groups.values()), default=0)
    for _ in range(epochs):
        chosen = np.array(
            [
                generator.choice(own[number])
                for own in groups.values()
                for number in np.resize(generator.permutation(len(own)), largest)
            ],
            np.int64,
        )
        generator.shuffle(chosen)
        yield augment_batch(arrays.images[chosen], generator, params), arrays.labels[chosen]


def pack(**arrays: NDArray[Any]) -> bytes:
    """Named arrays as an .npz; object arrays are refused, as they would need pickle."""
    buffer = io.BytesIO()
    try:
        np.savez(buffer, allow_pickle=False, **arrays)
    except ValueError as error:
        raise NeuroLoopError("These arrays cannot be packed", why=str(error), fix="give numbers or strings") from error
    return buffer.getvalue()


def unpack(data: bytes) -> dict[str, NDArray[Any]]:
    """The inverse of `pack`; bytes that would need pickle to read, or are no .npz, are refused."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, zlib and numpy each raise their own
        raise NeuroLoopError(
            "These bytes are no packed arrays", why=str(error), fix="run the step that made them again"
        ) from error


def _draw(group: list[ImageEntry], seed: int) -> str:
    # By content, so that a renamed or reordered source is divided the same way.
    return hashlib.sha256(f"{seed}:{min(entry.sha256 for entry in group)}".encode()).hexdigest()


def _ordered(placed: list[tuple[Part, list[ImageEntry]]]) -> list[tuple[Part, list[ImageEntry]]]:
    return sorted((each for each in placed if each[1]), key=lambda each: min(entry.path for entry in each[1]))


def _refuse_gaps(have: Mapping[tuple[str, Part], int], members: Mapping[int, list[ImageEntry]]) -> None:
    gaps = [f"{label} in {part}" for part in PARTS for label in LABELS if not have.get((label, part))]
    if gaps:
        unlike: Counter[str] = Counter(
            label for group in members.values() for label in {entry.label for entry in group}
        )
        raise InvalidSource(
            f"The images cannot be divided into {', '.join(PARTS)}",
            why=f"similar images must stay together, which leaves no {', no '.join(gaps)}; "
            f"groups of unlike images: {', '.join(f'{unlike[label]} {label}' for label in LABELS)}",
            fix="add images of other patients to the classes with few groups",
        )
