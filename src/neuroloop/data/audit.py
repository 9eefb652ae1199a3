"""What is wrong with a set of images, and which of them are the same or nearly the same picture.

Public brain-MRI sets are merges of merges: images recur byte for byte, re-encoded, mirrored or turned, often on both
sides of the split they come with, now and then under another class, and some are no MRI at all. The audit looks at
every image once, puts aside what cannot be used, each with its reason, and groups the rest by likeness.
"""

import io
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from neuroloop.core.errors import InvalidImage, InvalidSource
from neuroloop.core.schemas import Quarantined, Record, Split
from neuroloop.data import modality, shortcuts, similarity
from neuroloop.data.packed import pack, unpack
from neuroloop.data.similarity import thumbnail as thumbnail
from neuroloop.data.similarity import twins as twins
from neuroloop.data.source import is_test, is_training
from neuroloop.imaging.decode import FORMATS, SMALLEST_SIDE, decode

BLANK_DEVIATION = 2.0
"""Grey levels. A darker-than-usual slice has a standard deviation above 10; below 2 there is nothing to see."""

MOST_UNUSABLE = 0.20
"""Share of a class that may be unusable before the source is taken for broken rather than blemished."""

_BATCH = 256  # images whose frames are in memory at a time
_THREADS = 4  # decoding and reading both release the interpreter lock

FaultKind = Literal["unreadable", "tiny", "blank", "wrong_modality"]


class AuditedImage(Protocol):
    """What the audit must know of an image; `schemas.ImageEntry` is one."""

    @property
    def path(self) -> str:
        """Its name, unique in the set."""

    @property
    def label(self) -> str:
        """Its class."""

    @property
    def part(self) -> str:
        """The source's own part, empty if it has none."""

    @property
    def sha256(self) -> str:
        """Hash of its bytes."""

    @property
    def size(self) -> int:
        """Its bytes."""


Entry = TypeVar("Entry", bound=AuditedImage)
Entry_co = TypeVar("Entry_co", bound=AuditedImage, covariant=True)


class AuditedSet(Protocol[Entry_co]):
    """A set of images to audit; `schemas.Snapshot` is one."""

    @property
    def version(self) -> str:
        """What tells this set from a changed one."""
        ...

    @property
    def images(self) -> Sequence[Entry_co]:
        """All of them."""


class SourcePart(Record):
    """One of the source's own parts, and how much of it stands in another of them as well."""

    name: str
    images: int = Field(description="images that can be read")
    identical: int = Field(description="images whose very bytes stand in another part too")
    twins: int = Field(description="images that stand in another part too, identical, re-encoded, mirrored or turned")
    held_out: bool = Field(
        default=True, description="not trained on, as all parts named train... are, else the largest not named test..."
    )

    @property
    def leak_rate(self) -> float:
        """`twins` as a share of the part's images, 0 to 1."""
        return self.twins / self.images if self.images else 0.0


class Audit(Record):
    """What the audit of one snapshot found; `groups` has every image that is not quarantined."""

    version: str
    images: int = Field(description="images looked at, quarantined ones included")
    classes: dict[str, int] = Field(description="class -> images")
    quarantined: tuple[Quarantined, ...]
    faults: dict[FaultKind, tuple[str, ...]] = Field(description="kind -> paths of images that are no use; quarantined")
    broken: dict[str, tuple[str, ...]] = Field(
        description=f"class -> paths, for classes of which more than {MOST_UNUSABLE:.0%} are faulty"
    )
    groups: dict[str, int] = Field(description="path -> group; one group holds similar images, mirrored or not")
    components: int = Field(description="groups of all readable images, before any other was quarantined")
    largest_group: int
    mixed_groups: int = Field(description="groups of similar, not equal, images with more than one class; kept")
    identical: int = Field(description="readable images that repeat the bytes of an earlier one")
    label_conflicts: tuple[tuple[str, str], ...] = Field(
        description="pairs: one picture (or two neighbouring slices), two classes; quarantined"
    )
    source_parts: tuple[SourcePart, ...] = Field(description="the source's own parts, empty where it has none")
    leaks: dict[str, str] = Field(description="image -> its most alike twin in another of the source's own parts")

    @property
    def leaked(self) -> tuple[str, ...]:
        """The images that have a twin in another of the source's own parts, sorted."""
        return tuple(sorted(self.leaks))

    @property
    def held_out(self) -> tuple[SourcePart, ...]:
        """The source's own parts that one would test on."""
        return tuple(part for part in self.source_parts if part.held_out)

    @property
    def identical_across_parts(self) -> int:
        """Held-out images whose very bytes stand in another of the source's own parts."""
        return sum(part.identical for part in self.held_out)

    @property
    def twins_across_parts(self) -> int:
        """Held-out images that have a twin in another of the source's own parts."""
        return sum(part.twins for part in self.held_out)

    @property
    def leak_rate(self) -> float:
        """`twins_across_parts` as a share of the held-out images, 0 to 1; 0 where there are none."""
        return self.twins_across_parts / max(sum(part.images for part in self.held_out), 1)

    def summary(self) -> dict[str, object]:
        """The figures without the lists: small JSON for a task's result or a tracking run."""
        return {
            "images": self.images,
            "quarantined": len(self.quarantined),
            "groups": len(set(self.groups.values())),
            "largest_group": self.largest_group,
            "mixed_groups": self.mixed_groups,
            "identical": self.identical,
            "identical_across_parts": self.identical_across_parts,
            "twins_across_parts": self.twins_across_parts,
            "label_conflicts": len(self.label_conflicts),
            **{kind: len(paths) for kind, paths in self.faults.items()},
            "leak_rates": {part.name: round(part.leak_rate, 4) for part in self.source_parts},
        }


@dataclass(frozen=True)
class Looks(Generic[Entry]):
    """What one pass over the images saw of those that can be read, in their order."""

    images: tuple[Entry, ...]
    thumbnails: NDArray[np.float32]  # (n, 1024), see `similarity.thumbnail`
    traits: Mapping[str, NDArray[np.float32]]  # see `shortcuts.describe`
    rings: NDArray[np.float32]  # (n,), see `modality.bone_ring`
    faults: Mapping[str, tuple[FaultKind, str]]  # of the others: path -> kind, and the reason in words

    def indices(self, paths: Collection[str]) -> NDArray[np.int64]:
        """Where the images of these paths stand."""
        return np.array([index for index, image in enumerate(self.images) if image.path in paths], np.int64)

    def to_bytes(self) -> bytes:
        """All but the images themselves, which `from_bytes` is given again, as an .npz without pickle."""
        return pack(
            paths=np.array([image.path for image in self.images], np.str_),
            thumbnails=self.thumbnails,
            rings=self.rings,
            faults=np.array([[path, *fault] for path, fault in self.faults.items()], np.str_).reshape(-1, 3),
            **{f"trait_{name}": values for name, values in self.traits.items()},
        )

    @classmethod
    def from_bytes(cls, data: bytes, images: Iterable[Entry]) -> "Looks[Entry]":
        """The inverse of `to_bytes`; `images` has at least those that were looked at."""
        found, by_path = unpack(data), {image.path: image for image in images}
        return cls(
            images=tuple(by_path[path] for path in found["paths"].tolist()),
            thumbnails=found["thumbnails"],
            traits={name[6:]: values for name, values in found.items() if name.startswith("trait_")},
            rings=found["rings"],
            faults={path: (kind, reason) for path, kind, reason in found["faults"].tolist()},
        )

    @classmethod
    def joined(cls, looks: Sequence["Looks[Entry]"]) -> "Looks[Entry]":
        """One after the other; those at slices of a set, in order, are those at the whole set. At least one."""
        seen = [each for each in looks if each.images] or [looks[0]]
        return cls(
            images=tuple(image for each in seen for image in each.images),
            thumbnails=np.concatenate([each.thumbnails for each in seen]),
            traits={name: np.concatenate([each.traits[name] for each in seen]) for name in seen[0].traits},
            rings=np.concatenate([each.rings for each in seen]),
            faults={path: fault for each in looks for path, fault in each.faults.items()},
        )


def audit(
    snapshot: AuditedSet[Entry],
    read: Callable[[Entry], bytes],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Audit:
    """Look at every image once, put aside what cannot be used, and group what is similar: `look`, then `judge`."""
    return judge(snapshot, look(snapshot.images, read, progress=progress))


def look(
    images: Sequence[Entry], read: Callable[[Entry], bytes], *, progress: Callable[[int, int], None] | None = None
) -> Looks[Entry]:
    """Decode every image once and keep only what the audit needs of it, some 5 kB each.

    `read` gives an image's bytes and is called from several threads; `progress` gets (done, total).
    """
    seen: list[Entry] = []
    faults: dict[str, tuple[FaultKind, str]] = {}
    thumbnails = np.empty((len(images), similarity.SIDE**2), np.float32)
    rings: list[NDArray[np.float32]] = []
    traits: list[dict[str, NDArray[np.float32]]] = []
    done = 0
    for batch in _ahead(images, lambda image: _look_at(read(image))):
        good: list[_Look] = []
        for image, result in batch:
            done += 1
            if isinstance(result, _Look):
                thumbnails[len(seen)] = result.thumbnail
                seen.append(image)
                good.append(result)
            else:
                faults[image.path] = result
            if progress:
                progress(done, len(images))
        if good:
            frames = np.stack([each.frame for each in good])
            traits.append(shortcuts.describe(frames, [each.histogram for each in good], [each.size for each in good]))
            rings.append(modality.bone_ring(frames))
    return Looks(
        images=tuple(seen),
        thumbnails=thumbnails[: len(seen)],
        traits={name: np.concatenate([each[name] for each in traits]) for name in traits[0]} if traits else {},
        rings=np.concatenate(rings) if rings else np.zeros(0, np.float32),
        faults=faults,
    )


def judge(snapshot: AuditedSet[Entry], looks: Looks[Entry]) -> Audit:
    """What follows from the looks. Quarantined, each with its reason, are images that cannot be read, tiny and blank
    ones, those of another modality, and pictures that stand under two classes.

    Leaks are counted among all readable images, whatever is quarantined afterwards.
    """
    entries = looks.images
    faults = dict(looks.faults)
    for index in np.flatnonzero(looks.rings >= modality.RING):
        faults[entries[index].path] = (
            "wrong_modality",
            f"wrong modality: it looks like CT, a closed ring of bone in {looks.rings[index]:.0%} of all directions",
        )
    reasons = {path: reason for path, (_, reason) in faults.items()}

    labels, parts = [image.label for image in entries], [image.part for image in entries]
    roots, same, scores = similarity.connect(looks.thumbnails, labels, parts)
    conflicts = sorted((entries[i].path, entries[j].path) for i, j in same if entries[i].label != entries[j].label)
    label = {image.path: image.label for image in entries}
    for pair in conflicts:
        for one, other in (pair, pair[::-1]):
            reasons.setdefault(
                one, f"label conflict: the same picture, or a neighbouring slice, stands as {label[other]} in {other}"
            )

    groups: dict[str, int] = {}
    members: dict[int, list[str]] = {}
    numbers: dict[int, int] = {}
    for image, root in zip(entries, roots.tolist(), strict=True):
        if image.path not in reasons:
            number = groups[image.path] = numbers.setdefault(root, len(numbers))
            members.setdefault(number, []).append(image.label)
    leaks: dict[str, tuple[float, str]] = {}
    for (i, j), score in zip(same, scores.tolist(), strict=True):
        if entries[i].part != entries[j].part:
            for one, other in ((entries[i].path, entries[j].path), (entries[j].path, entries[i].path)):
                leaks[one] = max(leaks.get(one, (0.0, "")), (round(score, 6), other))
    classes = Counter(image.label for image in snapshot.images)
    faulty = {
        name: [image.path for image in snapshot.images if image.label == name and image.path in faults]
        for name in classes
    }
    return Audit(
        version=snapshot.version,
        images=len(snapshot.images),
        classes=dict(sorted(classes.items())),
        quarantined=tuple(Quarantined(path=path, reason=reason) for path, reason in sorted(reasons.items())),
        faults={
            kind: tuple(sorted(path for path, (found, _) in faults.items() if found == kind)) for kind in _FAULT_KINDS
        },
        broken={
            name: tuple(paths) for name, paths in sorted(faulty.items()) if len(paths) > MOST_UNUSABLE * classes[name]
        },
        groups=groups,
        components=len(set(roots.tolist())),
        largest_group=max((len(group) for group in members.values()), default=0),
        mixed_groups=sum(len(set(group)) > 1 for group in members.values()),
        identical=len(entries) - len({image.sha256 for image in entries}),
        label_conflicts=tuple(conflicts),
        source_parts=_source_parts(entries, leaks),
        leaks={one: other for one, (_, other) in sorted(leaks.items())},
    )


def own_split(audit: Audit, looks: Looks[Entry]) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """The indices of the looks that one would train and test on by the source's own parts; None where it has none."""
    held_out = {part.name for part in audit.held_out}
    if not held_out:
        return None
    tested = np.array([image.part in held_out for image in looks.images])
    return np.flatnonzero(~tested), np.flatnonzero(tested)


def refuse_leaks(looks: Looks[Entry], split: Split) -> None:
    """Raise `InvalidSource` unless no two similar images stand in different parts of the split that was made.

    This looks at the images again instead of trusting the groups that the split was made from.
    """
    part = {entry.path: entry.part for entry in split.entries}
    chosen = looks.indices(part.keys())
    paths = [looks.images[index].path for index in chosen]
    pairs = similarity.across(looks.thumbnails[chosen], [part[path] for path in paths])
    if pairs:
        named = "; ".join(f"{paths[i]} ({part[paths[i]]}) and {paths[j]} ({part[paths[j]]})" for i, j in pairs[:5])
        raise InvalidSource(
            f"The split leaks: {len(pairs)} pairs of similar images stand in different parts",
            why=f"a score on them would be memory, not skill: {named}",
            fix="this is a fault of the split's registry: remove the images from the source, or begin with a new store",
        )


_FAULT_KINDS: tuple[FaultKind, ...] = ("unreadable", "tiny", "blank", "wrong_modality")


@dataclass(frozen=True)
class _Look:
    thumbnail: NDArray[np.float32]
    frame: NDArray[np.uint8]  # the whole image, squeezed to (128, 128)
    histogram: NDArray[np.int64]
    size: tuple[int, int, int]  # bytes, height, width


def _ahead(
    images: Sequence[Entry], work: Callable[[Entry], "_Look | tuple[FaultKind, str]"]
) -> Iterator[list[tuple[Entry, "_Look | tuple[FaultKind, str]"]]]:
    """Batches of images with their results; the next batch is worked on while the caller is busy with one."""
    with ThreadPoolExecutor(_THREADS) as pool:
        batches = [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
        waiting = pool.map(work, batches[0]) if batches else iter(())
        for number, batch in enumerate(batches):
            current = waiting
            waiting = pool.map(work, batches[number + 1]) if number + 1 < len(batches) else iter(())
            yield list(zip(batch, current, strict=True))


def _look_at(data: bytes) -> "_Look | tuple[FaultKind, str]":
    try:
        pixels = decode(data)
    except InvalidImage as error:
        return "tiny" if _is_tiny(data) else "unreadable", f"unreadable: {error}"
    if pixels.std() < BLANK_DEVIATION:
        return "blank", f"blank: its grey levels deviate by {pixels.std():.1f} of 255 only"
    small = thumbnail(pixels)
    if not small.any():  # such have no correlation, so they could not even be told from one another
        return "blank", "blank: a pattern so fine that nothing is left of it at 32 x 32 pixels"
    side = (shortcuts.FRAME, shortcuts.FRAME)
    return _Look(
        thumbnail=small,
        frame=np.asarray(Image.fromarray(pixels).resize(side, Image.Resampling.BOX)),
        histogram=np.bincount(pixels.ravel() >> 3, minlength=32),
        size=(len(data), *pixels.shape),
    )


def _is_tiny(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return min(image.size) < SMALLEST_SIDE
    except Exception:  # damaged files make Pillow raise OSError, SyntaxError, ValueError, struct.error, ...
        return False


def _source_parts(entries: Sequence[AuditedImage], leaks: Collection[str]) -> tuple[SourcePart, ...]:
    where: dict[str, set[str]] = {}
    for image in entries:
        where.setdefault(image.sha256, set()).add(image.part)
    images = Counter(image.part for image in entries)
    names = sorted(images)
    if len(names) < 2:  # what all images share is a folder, not a split
        return ()
    identical = Counter(image.part for image in entries if len(where[image.sha256]) > 1)
    twins = Counter(image.part for image in entries if image.path in leaks)
    largest = max(names, key=lambda name: (not is_test(name), images[name]))
    trained_on = set(filter(is_training, names)) or {largest}
    return tuple(
        SourcePart(
            name=name,
            images=images[name],
            identical=identical[name],
            twins=twins[name],
            held_out=name not in trained_on,
        )
        for name in names
    )
