"""The audit as one page a person reads, complete in itself, and as JSON a program reads."""

import base64
import importlib.resources
import io
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from neuroloop.data import shortcuts, similarity
from neuroloop.data.audit import Audit, Entry
from neuroloop.data.findings import GRADES, Finding
from neuroloop.data.shortcuts import Shortcuts
from neuroloop.imaging.decode import decode

FORMAT = 1
"""Of the JSON; changes when a field changes its meaning."""

DEFINITIONS: Mapping[str, str] = {
    "images": "all images looked at, quarantined ones included",
    "unreadable": "paths of files that are no image, damaged or cut off; quarantined",
    "tiny": "paths of images with a side of less than 32 pixels; quarantined",
    "blank": "paths of images that show one grey; quarantined",
    "wrong_modality": "paths of images that look like CT among MRI; quarantined",
    "label_conflicts": "pairs of paths: one picture (correlation 0.99 or more) under two classes, or neighbouring "
    "slices of a volume, which may be as much alike; quarantined",
    "parts": "the source's own parts. Those with a folder named train... (else the largest without one named test...) "
    "are trained on, the others are held out. twins: its images that stand in another part too, whatever their class; "
    "identical: byte for byte",
    "identical_across_parts": "images of held-out parts whose very bytes stand in another part as well",
    "twins_across_parts": "images of held-out parts that stand in another part as well: identical, re-encoded, "
    "mirrored or turned by quarters (correlation of 32x32 thumbnails of the whole image 0.99 or more)",
    "leak_rate": "twins_across_parts as a share of all readable images of held-out parts",
    "leaks": "image (of any part) -> its most alike twin in another part",
    "ignored": "what was not looked at, in words -> number of files",
    "groups": "connected components of correlation 0.95 or more between those thumbnails over flips and quarter turns, "
    "that hold an image which is not quarantined",
    "groups_of_all_readable": "the same, counted before anything readable was quarantined",
    "group_of": "path -> number of its group, for images that are not quarantined, or only for lying between two parts",
    "shortcuts": "name -> accuracy of a classifier that sees only this, trained and tested on the source's own parts "
    "(source) and on a split in which no group stands in two parts (grouped); null where there is no such split. "
    "majority: the share of the largest class of those tested on",
    "shortcuts_images": "split -> images that the shortcuts were trained and tested on",
    "shortcuts_left_out": "classes that are not in the grouped split, because they have too few groups of images",
}

_SIDE = 112  # pixels of a picture's longer side in the report
_PAIRS, _TILES, _GROUPS, _MEMBERS = 24, 160, 6, 8  # shown at most; the JSON lists all


def document(
    audit: Audit,
    found: Sequence[Finding],
    measured: Shortcuts | None = None,
    *,
    source: str = "",
    ignored: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The audit as JSON-ready values; `DEFINITIONS` says what each field means, and stands in it."""
    splits = {"source": measured.source if measured else {}, "grouped": measured.grouped if measured else {}}
    return {
        "format": FORMAT,
        "source": source,
        "version": audit.version,
        "images": audit.images,
        "ignored": dict(ignored or {}),
        "classes": audit.classes,
        **{kind: list(paths) for kind, paths in audit.faults.items()},
        "label_conflicts": [list(pair) for pair in audit.label_conflicts],
        "parts": [{**part.model_dump(), "leak_rate": round(part.leak_rate, 4)} for part in audit.source_parts],
        "identical_across_parts": audit.identical_across_parts,
        "twins_across_parts": audit.twins_across_parts,
        "leak_rate": round(audit.leak_rate, 4),
        "identical": audit.identical,
        "groups": len(set(audit.groups.values())),
        "groups_of_all_readable": audit.components,
        "largest_group": audit.largest_group,
        "mixed_groups": audit.mixed_groups,
        "quarantined": [each.model_dump() for each in audit.quarantined],
        "shortcuts": {
            name: {split: round(scores[name], 4) if name in scores else None for split, scores in splits.items()}
            for name in shortcuts.TRAITS
            if any(name in scores for scores in splits.values())
        },
        "shortcuts_images": {split: list(counts) for split, counts in measured.images.items()} if measured else {},
        "shortcuts_left_out": list(measured.left_out) if measured else [],
        "shortcuts_sampled": bool(measured and measured.sampled),
        "findings": [finding.model_dump() for finding in found],
        "leaks": audit.leaks,
        "group_of": audit.groups,
        "definitions": dict(DEFINITIONS),
    }


def to_json(report: Mapping[str, Any]) -> bytes:
    """The document as UTF-8 JSON."""
    return json.dumps(report, indent=1).encode()


def to_html(
    audit: Audit,
    found: Sequence[Finding],
    measured: Shortcuts | None = None,
    *,
    source: str,
    images: Sequence[Entry],
    read: Callable[[Entry], bytes],
    note: str = "",
) -> bytes:
    """The report as one HTML page without scripts and outside resources; every name in it is escaped.

    `images` and `read` give the pictures it shows; `note` stands under the title, such as that scans are simulated.
    """
    album = _Album(images, read)
    labels = {image.path: image.label for image in images}
    parts = {image.path: image.part for image in images}
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"percent": lambda share: f"{100 * share:.1f} %", "count": lambda number: f"{number:,}"}
    template = page.from_string(importlib.resources.files("neuroloop.data").joinpath("audit.html").read_text("utf-8"))
    held_out = {part.name for part in audit.held_out}
    leaked = [(one, other) for one, other in audit.leaks.items() if parts[one] in held_out]
    mixed, large = _groups(audit, labels)
    return template.render(
        audit=audit,
        source=source,
        note=note,
        grades=[(grade, [finding for finding in found if finding.grade == grade]) for grade in GRADES],
        group_count=len(set(audit.groups.values())),
        held_out=", ".join(part.name or "no part" for part in audit.held_out),
        pairs=[album.pair(one, other) for one, other in _spread(leaked, labels, _PAIRS)],
        conflicts=[album.pair(one, other) for one, other in audit.label_conflicts[:_PAIRS]],
        wrong=album.tiles(audit.faults["wrong_modality"][:_TILES]),
        blank=album.tiles(audit.faults["blank"][:_PAIRS]),
        mixed=[album.tiles(group) for group in mixed],
        large=[(size, album.tiles(group)) for size, group in large],
        shortcuts=_bars(measured),
        measured=measured,
        definitions=DEFINITIONS,
    ).encode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class _Tile:
    path: str
    label: str
    part: str
    picture: str  # data: URL


@dataclass(frozen=True)
class _Pair:
    one: _Tile
    other: _Tile
    relation: str
    correlation: float


class _Album(Generic[Entry]):
    """Small pictures of images that can be decoded, by their path."""

    def __init__(self, images: Sequence[Entry], read: Callable[[Entry], bytes]) -> None:
        self._images = {image.path: image for image in images}
        self._read = read

    def tile(self, path: str) -> _Tile:
        image = self._images[path]
        return _Tile(path, image.label, image.part, _picture(decode(self._read(image))))

    def tiles(self, paths: Iterable[str]) -> list[_Tile]:
        return [self.tile(path) for path in paths]

    def pair(self, one: str, other: str) -> _Pair:
        first, second = (self._read(self._images[path]) for path in (one, other))
        correlation, quarter, mirrored = similarity.relation(
            *(similarity.thumbnail(decode(d)) for d in (first, second))
        )
        words = "byte for byte the same" if first == second else _relation(quarter, mirrored)
        return _Pair(self.tile(one), self.tile(other), words, correlation)


def _picture(pixels: NDArray[np.uint8]) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _relation(quarter: int, mirrored: bool) -> str:
    turned = {0: "", 1: "turned by 90°", 2: "turned by 180°", 3: "turned by 270°"}[quarter]
    if mirrored and quarter == 2:
        return "upside down, mirrored"
    return " and ".join(word for word in ("mirrored" if mirrored else "", turned) if word) or "the same, stored anew"


def _spread(pairs: Sequence[tuple[str, str]], labels: Mapping[str, str], most: int) -> Iterable[tuple[str, str]]:
    """Some of the pairs, as many of each class, at even distances."""
    of: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for pair in pairs:
        of[labels[pair[0]]].append(pair)
    for label in sorted(of):
        each = max(most // len(of), 1)
        chosen = np.unique(np.linspace(0, len(of[label]) - 1, min(each, len(of[label]))).round().astype(int))
        yield from (of[label][index] for index in chosen)


def _groups(audit: Audit, labels: Mapping[str, str]) -> tuple[list[list[str]], list[tuple[int, list[str]]]]:
    """Members of groups with more than one class, each class in turn; and (size, members) of the largest groups."""
    members: dict[int, list[str]] = defaultdict(list)
    for path, group in audit.groups.items():
        members[group].append(path)

    def varied(group: Collection[str]) -> list[str]:
        seen: dict[str, int] = defaultdict(int)
        order = {}
        for path in group:
            order[path] = (seen[labels[path]], labels[path])
            seen[labels[path]] += 1
        return sorted(group, key=order.__getitem__)[:_MEMBERS]

    mixed = [varied(group) for group in members.values() if len({labels[path] for path in group}) > 1]
    largest = sorted((group for group in members.values() if len(group) > 1), key=len, reverse=True)[:_GROUPS]
    return mixed[: 2 * _GROUPS], [(len(group), group[:_MEMBERS]) for group in largest]


def _bars(measured: Shortcuts | None) -> list[dict[str, Any]]:
    if measured is None:
        return []
    return [
        {
            "name": name,
            "sees": sees,
            "source": measured.source.get(name),
            "grouped": measured.grouped.get(name),
            "tempting": name in measured.tempting(),
        }
        for name, sees in shortcuts.TRAITS.items()
        if name in measured.source or name in measured.grouped
    ]
