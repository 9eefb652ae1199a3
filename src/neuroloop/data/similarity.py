"""Which images are the same or nearly the same picture, however they are flipped or turned by quarters.

Two images are compared by the correlation of their 32x32 thumbnails, the best over the eight symmetries of the
square. To compare every image with every other in this way would take n^2 * 8 * 1024 multiplications. Instead each
thumbnail gets a short signature with two properties: a flip or a quarter turn does not change it, and the signatures
of two images are never further apart than the images themselves. So a search of signatures within a radius finds
every pair that matters and few others, which are then compared in full: nothing is lost, and the groups are exactly
those of the long way.

How a signature is made: the symmetries split a thumbnail into pieces that each answer to them in a simple way (the
isotypic components of the dihedral group D4): one piece stays as it is, three only change their sign, and two change
their signs or places. So the first piece itself, the magnitudes of the next three, and the larger and the smaller
magnitude of the last two are the same for all eight symmetries. None of these steps moves two images apart, nor does
leaving coordinates out. Principal axes within each piece put most of what tells images apart into few coordinates.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from threadpoolctl import threadpool_limits

SIMILAR = 0.95
"""Correlation from which two images share a group: twins, neighbouring slices of one patient, other crops of a scan."""

SAME = 0.99
"""Correlation from which two images are one picture. On the public set the count of leaked test images is the same
(992) at every threshold from 0.99 to 0.999, so nothing hangs on the exact value. Slices of a volume 1 mm apart are as
much alike (median 0.998), and more pixels do not help: at 128 px those reach 0.997, and true twins, mirrored or stored
anew, 0.95 to 0.99."""

SIDE = 32
"""Pixels of a thumbnail's side."""

_HALF = SIDE // 2
_SIGNATURE = 96
"""Coordinates kept. On the public set 32 leave 664,000 pairs to compare in full, 96 leave 110,000 and all leave 39,000;
searching more than 96 takes longer than it saves."""
_SAMPLE = 4096  # thumbnails that the principal axes are taken from; any axes would do, these are only the shortest way
_BLOCK = 512  # signatures looked up at a time: bounds memory even where all images are alike
_CHUNK = 1 << 14  # pairs compared in full at a time: 130 MB of thumbnails
_ROWS = 1 << 12  # thumbnails transformed at a time
_PARTNERS = 16
"""Pictures of another kind that an image is told of at most, if they have as many: n copies are n^2 pairs."""
_SLACK = 1e-4  # for rounding in single precision; a pair too many costs nothing
_PIECES = np.cumsum([136, 120, 136, 120, 256])  # 16x16 symmetric, antisymmetric, twice; then the exchanged two

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]
Pairs = list[tuple[int, int]]

# Matrices this small gain nothing from a second thread, and on a busy machine threads that wait for one another cost
# seconds.
_one_thread = threadpool_limits.wrap(limits=1, user_api="blas")


def thumbnail(pixels: NDArray[np.uint8]) -> Floats:
    """The whole image as a vector whose inner product with another is their correlation.

    `pixels` (H, W) -> float32 (1024,), zero mean, unit norm; all zero for a uniform image.
    """
    small = Image.fromarray(pixels.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BOX)
    values = np.asarray(small, np.float32).ravel()
    values = values - values.mean()
    norm = float(np.linalg.norm(values))
    return values / norm if norm > 1e-3 else np.zeros_like(values)


@_one_thread
def twins(a: Floats, b: Floats, threshold: float = SIMILAR) -> Pairs:
    """Which thumbnails of `a` (n, 1024) are those of `b` (m, 1024), flipped or turned or not: sorted pairs (i, j)."""
    if not len(a) or not len(b):
        return []
    mine, other = _pieces(a), _pieces(b)
    axes = _Axes.of(other)
    found: set[tuple[int, int]] = set()
    for i, j, _ in _near(axes.signatures(mine), axes.signatures(other), threshold):
        for some in _chunks(len(i)):
            hit = _correlation(mine[i[some]], other[j[some]]) >= threshold
            found.update(zip(i[some][hit].tolist(), j[some][hit].tolist(), strict=True))
    return sorted(found)


@_one_thread
def across(thumbnails: Floats, parts: Sequence[str], threshold: float = SIMILAR) -> Pairs:
    """The pairs of similar thumbnails (n, 1024) that stand in different parts: sorted (i, j), i < j."""
    if not len(thumbnails):
        return []
    pieces, codes = _pieces(thumbnails), _codes(parts)
    found: Pairs = []
    for i, j, _ in _near_one_another(_Axes.of(pieces).signatures(pieces), threshold):
        apart = codes[i] != codes[j]
        i, j = i[apart], j[apart]
        for some in _chunks(len(i)):
            hit = _correlation(pieces[i[some]], pieces[j[some]]) >= threshold
            found += zip(i[some][hit].tolist(), j[some][hit].tolist(), strict=True)
    return sorted(found)


@_one_thread
def connect(thumbnails: Floats, *kinds: Sequence[object]) -> tuple[Indices, Pairs, Floats]:
    """Group what is similar, and find the pictures that stand under two kinds (say two classes, or two source parts).

    `thumbnails` (n, 1024), `kinds` (n,) each -> roots (n,), the lowest index of each image's connected component at
    `SIMILAR`; the sorted pairs (i, j), i < j, at `SAME` that differ in one of the kinds; and their correlations. Of a
    picture with many copies these are not all pairs, but each copy that differs in a kind from another is in one.
    """
    n = len(thumbnails)
    roots = np.arange(n)
    if n == 0:
        return roots, [], np.zeros(0, np.float32)
    pieces, partners = _pieces(thumbnails), [_Partners(_codes(kind)) for kind in kinds]
    same: list[tuple[Indices, Indices, Floats]] = []
    for i, j, distance in _near_one_another(_Axes.of(pieces).signatures(pieces), SIMILAR):
        told = (distance <= _radius(SAME)) & _wanting(partners, i, j)
        wanted = np.flatnonzero(told | (roots[i] != roots[j]))
        # The nearest first: they connect most, and what is connected already need not be compared.
        wanted = wanted[np.argsort(distance[wanted], kind="stable")]
        i, j, told = i[wanted], j[wanted], told[wanted]
        while len(i):
            score = _correlation(pieces[i[:_CHUNK]], pieces[j[:_CHUNK]])
            hit = score >= SIMILAR
            roots = _merge(roots, i[:_CHUNK][hit], j[:_CHUNK][hit])
            hit = told[:_CHUNK] & (score >= SAME)
            same.append((i[:_CHUNK][hit], j[:_CHUNK][hit], score[hit]))
            for each in partners:
                each.add(*same[-1][:2])
            i, j, told = i[_CHUNK:], j[_CHUNK:], told[_CHUNK:]
            told = told & _wanting(partners, i, j)
            apart = told | (roots[i] != roots[j])
            i, j, told = i[apart], j[apart], told[apart]
    pairs = sorted(pair for i, j, score in same for pair in zip(i.tolist(), j.tolist(), score.tolist(), strict=True))
    return roots, [(i, j) for i, j, _ in pairs], np.array([score for _, _, score in pairs], np.float32)


class _Partners:
    """Of how many pictures of another kind each image has been told."""

    def __init__(self, codes: Indices) -> None:
        self._codes, self._told = codes, np.zeros(len(codes), np.int64)

    def wanting(self, i: Indices, j: Indices) -> NDArray[np.bool_]:
        """Which pairs are of two kinds, and of too few such pairs on either side."""
        few = self._told < _PARTNERS
        return (self._codes[i] != self._codes[j]) & (few[i] | few[j])

    def add(self, i: Indices, j: Indices) -> None:
        apart = self._codes[i] != self._codes[j]
        self._told += np.bincount(np.concatenate([i[apart], j[apart]]), minlength=len(self._told))


def _wanting(partners: Sequence[_Partners], i: Indices, j: Indices) -> NDArray[np.bool_]:
    return np.any([each.wanting(i, j) for each in partners], axis=0)


def relation(a: Floats, b: Floats) -> tuple[float, int, bool]:
    """How thumbnail `b` becomes most like `a`: (correlation, quarter turns anticlockwise, mirrored before turning).

    Of ways that are as good within a thousandth, as for symmetrical heads, the plainest.
    """
    image = b.reshape(SIDE, SIDE)
    ways = [
        (float(np.rot90(image[:, ::-1] if mirrored else image, quarter).ravel() @ a), quarter, mirrored)
        for mirrored in (False, True)
        for quarter in (0, 2, 1, 3)
    ]
    best = max(ways)[0]
    return next(way for way in ways if way[0] >= best - 0.001)


@dataclass(frozen=True)
class _Axes:
    """Principal axes of the five kinds of pieces, and which coordinates a signature keeps."""

    rotations: tuple[Floats, ...]
    kept: Indices

    @classmethod
    def of(cls, pieces: Floats) -> "_Axes":
        sample = pieces[:: -(-len(pieces) // _SAMPLE)]
        *alone, one, other = np.split(sample, _PIECES, axis=1)
        alone[0] = alone[0] - alone[0].mean(axis=0)  # the others must turn about the origin, or signs would not cancel
        rotations = tuple(
            np.ascontiguousarray(np.linalg.eigh(piece.T @ piece)[1][:, ::-1])
            for piece in (*alone, np.concatenate([one, other]))
        )
        spread = cls(rotations, np.arange(pieces.shape[1])).signatures(sample).var(axis=0)
        return cls(rotations, np.sort(np.argsort(-spread, kind="stable")[:_SIGNATURE]))

    def signatures(self, pieces: Floats) -> Floats:
        """(n, 1024) -> (n, kept): the same for all flips and turns, and never further apart than the images."""
        done = []
        for rows in _chunks(len(pieces), _ROWS):
            *alone, one, other = np.split(pieces[rows], _PIECES, axis=1)
            turned = [piece @ axes for piece, axes in zip(alone, self.rotations, strict=False)]
            first, second = np.abs(one @ self.rotations[-1]), np.abs(other @ self.rotations[-1])
            columns = [turned[0], *map(np.abs, turned[1:]), np.maximum(first, second), np.minimum(first, second)]
            done.append(np.concatenate(columns, axis=1)[:, self.kept])
        return np.ascontiguousarray(np.concatenate(done), np.float32)


def _pieces(thumbnails: Floats) -> Floats:
    """An orthonormal change of basis, (n, 1024) -> (n, 1024), into the pieces that the symmetries do not mix.

    In order: even in both directions and symmetric about the diagonal (136 coordinates), even and antisymmetric (120),
    odd in both and symmetric (136), odd and antisymmetric (120), even-odd (256) and odd-even, transposed (256).
    """
    out = np.empty((len(thumbnails), SIDE * SIDE), np.float32)
    rows, columns = np.triu_indices(_HALF)
    above, below = np.triu_indices(_HALF, 1)
    weight = np.where(rows == columns, 1.0, np.sqrt(2)).astype(np.float32) / 2
    for some in _chunks(len(thumbnails), _ROWS):
        images = thumbnails[some].reshape(-1, SIDE, SIDE)
        top, bottom = images[:, :_HALF], images[:, : _HALF - 1 : -1]
        quadrants = []
        for half in (top + bottom, top - bottom):
            left, right = half[:, :, :_HALF], half[:, :, : _HALF - 1 : -1]
            quadrants += [(left + right) / 2, (left - right) / 2]
        even, even_odd, odd_even, odd = quadrants
        columns_of = [
            part
            for both in (even, odd)
            for part in (
                (both[:, rows, columns] + both[:, columns, rows]) * weight,
                (both[:, above, below] - both[:, below, above]) * np.float32(np.sqrt(0.5)),
            )
        ]
        columns_of += [even_odd.reshape(len(images), -1), odd_even.transpose(0, 2, 1).reshape(len(images), -1)]
        out[some] = np.concatenate(columns_of, axis=1)
    return out


def _correlation(a: Floats, b: Floats) -> Floats:
    """The best correlation over the eight symmetries of rows of pieces, (m, 1024) each -> (m,)."""

    def dot(x: Floats, y: Floats) -> Floats:
        return np.einsum("ij,ij->i", x, y)

    x, y = np.split(a, _PIECES, axis=1), np.split(b, _PIECES, axis=1)
    even, flat_even, odd, flat_odd = (dot(x[k], y[k]) for k in range(4))
    best = np.full(len(a), -np.inf, np.float32)
    for sign, first, second in ((1, dot(x[4], y[4]), dot(x[5], y[5])), (-1, dot(x[4], y[5]), dot(x[5], y[4]))):
        # sign: turned about the diagonal or not; then a flip of one axis changes two signs of three, and so on.
        corner = odd + sign * flat_odd
        flips = np.maximum(corner + np.abs(first + second), -corner + np.abs(first - second))
        best = np.maximum(best, even + sign * flat_even + flips)
    return best


def _near(a: Floats, b: Floats, threshold: float) -> Iterator[tuple[Indices, Indices, Floats]]:
    """Blocks of (index in a, index in b, squared distance of their signatures) that may reach the correlation."""
    index = faiss.IndexFlatL2(b.shape[1])
    index.add(b)
    for start in range(0, len(a), _BLOCK):
        yield _search(index, a[start : start + _BLOCK], start, 0, threshold)


def _near_one_another(signatures: Floats, threshold: float) -> Iterator[tuple[Indices, Indices, Floats]]:
    """The same within one set, each pair once, i < j.

    In the order of their widest coordinate, no signature is near one that is further off in that alone.
    """
    widest = int(signatures.var(axis=0).argmax())
    order = np.argsort(signatures[:, widest], kind="stable")
    signatures = signatures[order]
    line, reach = signatures[:, widest], np.sqrt(_radius(threshold))
    for start in range(0, len(signatures), _BLOCK):
        block = signatures[start : start + _BLOCK]
        index = faiss.IndexFlatL2(signatures.shape[1])
        index.add(signatures[start : int(np.searchsorted(line, block[-1, widest] + reach, "right"))])
        i, j, distance = _search(index, block, start, start, threshold)
        once = i < j
        one, other = order[i[once]], order[j[once]]
        yield np.minimum(one, other), np.maximum(one, other), distance[once]


def _search(
    index: faiss.IndexFlatL2, queries: Floats, start: int, offset: int, threshold: float
) -> tuple[Indices, Indices, Floats]:
    limits, distance, found = index.range_search(queries, _radius(threshold))
    return start + np.repeat(np.arange(len(queries)), np.diff(limits.astype(np.int64))), offset + found, distance


def _radius(threshold: float) -> float:
    # |a - b|^2 = 2 - 2 correlation for unit vectors
    return 2 - 2 * threshold + _SLACK


def _merge(roots: Indices, i: Indices, j: Indices) -> Indices:
    """The components after joining those of i and j; each named by its lowest index."""
    n = len(roots)
    ends = np.concatenate([i, np.arange(n)]), np.concatenate([j, roots])
    graph = coo_array((np.ones(len(ends[0]), bool), ends), shape=(n, n))
    component = connected_components(graph, directed=False)[1]
    return np.unique(component, return_index=True)[1][component]


def _codes(kinds: Sequence[object]) -> Indices:
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    return np.array([numbers[kind] for kind in kinds], np.int64)


def _chunks(length: int, step: int = _CHUNK) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, length, step))
