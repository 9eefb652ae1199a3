"""What is wrong with a snapshot, and which of its images are the same or nearly the same picture.

Public brain-MRI sets are merges of merges: images recur byte for byte, re-encoded, or mirrored, often on both sides of
the split they come with, and now and then under another class. Plain perceptual hashes miss the mirrored ones. So every
image is compared with every other by the correlation of 32x32 thumbnails over the eight symmetries of the square.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from neuroloop.core.errors import InvalidImage, InvalidSource
from neuroloop.core.schemas import LABELS, ImageEntry, Quarantined, Record, Snapshot
from neuroloop.imaging.decode import decode

SIMILAR = 0.95
"""Correlation from which two images share a group: twins, neighbouring slices of one patient, other crops of a scan."""

SAME = 0.99
"""Correlation from which two images are one picture. On the public set the count of leaked test images is the same
(992) at every threshold from 0.99 to 0.999, so nothing hangs on the exact value."""

BLANK_DEVIATION = 2.0
"""Grey levels. A darker-than-usual slice has a standard deviation above 10; below 2 there is nothing to see."""

MOST_UNREADABLE = 0.20
"""Share of a class that may be unreadable before the source is taken for broken rather than blemished."""

_SIDE = 32
_BLOCK = 1024


class SourcePart(Record):
    """One of the source's own parts, and how much of it stands in another of them as well."""

    name: str
    images: int
    identical: int = Field(description="images whose very bytes stand in another part too")
    twins: int = Field(description="images that stand in another part too, identical, re-encoded, mirrored or turned")

    @property
    def leak_rate(self) -> float:
        """`twins` as a share of the part's images, 0 to 1."""
        return self.twins / self.images if self.images else 0.0


class Audit(Record):
    """What the audit of one snapshot found; `groups` has every image that is not quarantined."""

    version: str
    images: int = Field(description="images looked at, quarantined ones included")
    quarantined: tuple[Quarantined, ...]
    groups: dict[str, int] = Field(description="path -> group; one group holds similar images, mirrored or not")
    largest_group: int
    mixed_groups: int = Field(description="groups of similar, not equal, images with more than one class; kept")
    identical: int = Field(description="images that repeat the bytes of an earlier one")
    label_conflicts: tuple[tuple[str, str], ...] = Field(description="pairs: one picture, two classes; quarantined")
    source_parts: tuple[SourcePart, ...] = Field(description="the source's own parts, empty where it has none")

    @property
    def twins_across_parts(self) -> int:
        """Images that have a twin in another of the source's own parts."""
        return sum(part.twins for part in self.source_parts)

    def summary(self) -> dict[str, object]:
        """The figures without the lists: small JSON for a task's result or a tracking run."""
        return {
            "images": self.images,
            "quarantined": len(self.quarantined),
            "groups": len(set(self.groups.values())),
            "largest_group": self.largest_group,
            "mixed_groups": self.mixed_groups,
            "identical": self.identical,
            "label_conflicts": len(self.label_conflicts),
            "leak_rates": {part.name: round(part.leak_rate, 4) for part in self.source_parts},
        }


def thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The whole image as a vector whose inner product with another is their correlation.

    `pixels` (H, W) -> float32 (1024,), zero mean, unit norm; all zero for a uniform image.
    """
    small = Image.fromarray(pixels.astype(np.float32)).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    values = np.asarray(small, np.float32).ravel()
    values = values - values.mean()
    norm = float(np.linalg.norm(values))
    return values / norm if norm > 1e-3 else np.zeros_like(values)


def twins(a: NDArray[np.float32], b: NDArray[np.float32], threshold: float = SIMILAR) -> list[tuple[int, int]]:
    """Which thumbnails of `a` (n, 1024) are those of `b` (m, 1024), flipped or turned or not: sorted pairs (i, j)."""
    found: set[tuple[int, int]] = set()
    for i, j, _ in _similar(a, b, threshold):
        found.update(zip(i.tolist(), j.tolist(), strict=True))
    return sorted(found)


def audit(
    snapshot: Snapshot,
    read: Callable[[ImageEntry], bytes],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Audit:
    """Decode every image once, quarantine what cannot be used, and group what is similar.

    `read` gives an image's bytes and is called from several threads; `progress` gets (done, total). Quarantined, each
    with its reason: unreadable and blank images, and pictures that stand under two classes. Raises `InvalidSource`
    where more than `MOST_UNREADABLE` of a class cannot be used: that is no source to go on with.
    """
    thumbnails, reasons = _look(snapshot.images, read, progress)
    _refuse_broken(snapshot.images, reasons)

    entries = [entry for entry in snapshot.images if entry.path not in reasons]
    kinds = [(entry.label, entry.part) for entry in entries]
    roots, same = _connect(np.stack([thumbnails[entry.path] for entry in entries]), kinds)
    conflicts = sorted((entries[i].path, entries[j].path) for i, j in same if entries[i].label != entries[j].label)
    label = {entry.path: entry.label for entry in entries}
    for one, other in conflicts:
        reasons[one] = f"label conflict: the same picture stands as {label[other]} in {other}"
        reasons[other] = f"label conflict: the same picture stands as {label[one]} in {one}"

    groups: dict[str, int] = {}
    members: dict[int, list[ImageEntry]] = {}
    numbers: dict[int, int] = {}
    for entry, root in zip(entries, roots.tolist(), strict=True):
        if entry.path not in reasons:
            number = groups[entry.path] = numbers.setdefault(root, len(numbers))
            members.setdefault(number, []).append(entry)
    return Audit(
        version=snapshot.version,
        images=len(snapshot.images),
        quarantined=tuple(Quarantined(path=path, reason=reason) for path, reason in sorted(reasons.items())),
        groups=groups,
        largest_group=max((len(group) for group in members.values()), default=0),
        mixed_groups=sum(len({entry.label for entry in group}) > 1 for group in members.values()),
        identical=len(snapshot.images) - len({entry.sha256 for entry in snapshot.images}),
        label_conflicts=tuple(conflicts),
        source_parts=_source_parts(entries, same),
    )


def _look(
    images: tuple[ImageEntry, ...],
    read: Callable[[ImageEntry], bytes],
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, NDArray[np.float32]], dict[str, str]]:
    """Thumbnails by path, and the reasons by path of what cannot be used."""

    def one(entry: ImageEntry) -> NDArray[np.float32] | str:
        try:
            pixels = decode(read(entry))
        except InvalidImage as error:
            return f"unreadable: {error}"
        if pixels.std() < BLANK_DEVIATION:
            return f"blank: its grey levels deviate by {pixels.std():.1f} of 255 only"
        return thumbnail(pixels)

    thumbnails: dict[str, NDArray[np.float32]] = {}
    reasons: dict[str, str] = {}
    with ThreadPoolExecutor(4) as pool:  # decoding and reading both release the interpreter lock
        for done, (entry, result) in enumerate(zip(images, pool.map(one, images), strict=True), 1):
            if isinstance(result, str):
                reasons[entry.path] = result
            else:
                thumbnails[entry.path] = result
            if progress:
                progress(done, len(images))
    return thumbnails, reasons


def _refuse_broken(images: tuple[ImageEntry, ...], reasons: dict[str, str]) -> None:
    for label in LABELS:
        paths = [entry.path for entry in images if entry.label == label]
        bad = [path for path in paths if path in reasons]
        if not paths or len(bad) > MOST_UNREADABLE * len(paths):
            named = "; ".join(f"{path} ({reasons[path].rstrip('.')})" for path in bad[:5])
            more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
            raise InvalidSource(
                f"{len(bad)} of {len(paths)} {label} images cannot be used",
                why=f"at most {MOST_UNREADABLE:.0%} may be: {named}{more}" if bad else "the snapshot has none of them",
                fix="mend or remove these files in the source and start again",
            )


def _similar(
    a: NDArray[np.float32], b: NDArray[np.float32], threshold: float
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]]:
    """Blocks of (index in a, index in b, correlation) over the eight symmetries; bounded memory."""
    index = faiss.IndexFlatIP(_SIDE * _SIDE)
    index.add(np.ascontiguousarray(b, np.float32))
    for start in range(0, len(a), _BLOCK):
        images = a[start : start + _BLOCK].reshape(-1, _SIDE, _SIDE)
        for turned in (np.rot90(images, quarter, (1, 2)) for quarter in range(4)):
            for flipped in (turned, turned[:, :, ::-1]):
                queries = np.ascontiguousarray(flipped, np.float32).reshape(len(images), -1)
                limits, scores, j = index.range_search(queries, threshold)
                i = start + np.repeat(np.arange(len(images)), np.diff(limits.astype(np.int64)))
                yield i, j, scores


def _connect(
    thumbnails: NDArray[np.float32], kinds: Sequence[tuple[str, str]]
) -> tuple[NDArray[np.int64], list[tuple[int, int]]]:
    """Connected components of similarity, and the pairs that are one picture of two kinds (class, source part).

    (n, 1024) -> roots (n,), the lowest index of each image's component, and sorted pairs (i, j), i < j.
    """
    n = len(thumbnails)
    code = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    codes = np.array([code[kind] for kind in kinds])
    roots = np.arange(n)
    same: set[tuple[int, int]] = set()
    for i, j, score in _similar(thumbnails, thumbnails, SIMILAR):
        once = i < j  # the pair (j, i) comes with the inverse symmetry
        i, j, score = i[once], j[once], score[once]
        told = (score >= SAME) & (codes[i] != codes[j])
        same.update(zip(i[told].tolist(), j[told].tolist(), strict=True))
        ends = np.concatenate([i, np.arange(n)]), np.concatenate([j, roots])
        _, component = connected_components(
            coo_array((np.ones(len(ends[0]), bool), ends), shape=(n, n)), directed=False
        )
        roots = np.unique(component, return_index=True)[1][component]
    return roots, sorted(same)


def _source_parts(entries: list[ImageEntry], same: list[tuple[int, int]]) -> tuple[SourcePart, ...]:
    leaked: set[int] = set()
    for i, j in same:
        if entries[i].part != entries[j].part:
            leaked |= {i, j}
    where: dict[str, set[str]] = {}
    for entry in entries:
        where.setdefault(entry.sha256, set()).add(entry.part)
    return tuple(
        SourcePart(
            name=name,
            images=sum(entry.part == name for entry in entries),
            identical=sum(entry.part == name and len(where[entry.sha256]) > 1 for entry in entries),
            twins=sum(entries[i].part == name for i in leaked),
        )
        for name in sorted({entry.part for entry in entries} - {""})
    )
