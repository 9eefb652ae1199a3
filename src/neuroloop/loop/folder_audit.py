"""The audit of any folder of images, without the rest of the platform."""

import hashlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from pydantic import Field
from sklearn.model_selection import StratifiedGroupKFold

from neuroloop.core.errors import InvalidSource, NotFound
from neuroloop.core.ports import ObjectStore
from neuroloop.core.schemas import LABELS, NO_TUMOUR, Record
from neuroloop.data import audit_report, shortcuts
from neuroloop.data.audit import Audit, Looks, judge, look, own_split
from neuroloop.data.findings import Finding, findings
from neuroloop.data.source import IMAGE_SUFFIXES, Place, hidden, label_of, passed_over, places

FOLDS = 5
"""A folder has no frozen split; for its shortcuts one group in five is tested on."""

_LAYOUT = "part/class/image or class/image, say Training/glioma/1.jpg"


class FolderImage(Record):
    """One image of a folder. Unlike in a source for training, a class may have any name."""

    path: str
    key: str = Field(description="path as the store spells it; they differ where a name is no text")
    label: str
    part: str
    sha256: str
    size: int


class Folder(Record):
    """The images of a folder; `version` is a hash over their paths and bytes."""

    version: str
    images: tuple[FolderImage, ...]
    ignored: dict[str, int] = Field(description="what was not looked at, in words -> files")


class FolderAudit(Record):
    """What was found, and the two reports."""

    audit: Audit
    findings: tuple[Finding, ...]
    json_report: bytes
    html_report: bytes


def audit_folder(store: ObjectStore, name: str, *, say: Callable[[str], None] = lambda line: None) -> FolderAudit:
    """Audit the images of a store: list, look, judge, measure shortcuts, report. `say` gets lines of progress.

    Raises `InvalidSource` where there is nothing to audit, `Unavailable` where the folder cannot be read.
    """
    folder = list_folder(store, name)
    say(f"{len(folder.images):,} images in {len({image.label for image in folder.images})} classes")

    def read(image: FolderImage) -> bytes:
        return _get(store, image.key)

    def progress(done: int, total: int) -> None:
        if done == total or done % max(total // 10, 100) == 0:
            say(f"{done:,} of {total:,} images looked at")

    looks = look(folder.images, read, progress=progress)
    audit = judge(folder, looks)
    say(f"{len(set(audit.groups.values())):,} groups of similar images")
    splits, left_out = _splits(looks, audit)
    measured = shortcuts.measure(
        looks.traits,
        looks.thumbnails,
        [image.label for image in looks.images],
        splits,
        generator=np.random.default_rng(0),
        left_out=left_out,
    )
    say("shortcuts measured")
    found = findings(audit, measured, folder.ignored)
    return FolderAudit(
        audit=audit,
        findings=found,
        json_report=audit_report.to_json(
            audit_report.document(audit, found, measured, source=name, ignored=folder.ignored)
        ),
        html_report=audit_report.to_html(audit, found, measured, source=name, images=folder.images, read=read),
    )


def list_folder(store: ObjectStore, name: str) -> Folder:
    """The images below a folder, told by their suffix, each read once for its hash. Raises `InvalidSource`.

    Class and part are those of `source.places`; a class may have any name, whatever its case.
    """
    store.check()
    listed = store.list("")
    found = [key for key in listed if not hidden(key)]
    images = [key for key in found if key.lower().endswith(IMAGE_SUFFIXES)]
    if not images:
        kinds = Counter(key.rsplit(".", 1)[-1] if "." in key.rsplit("/", 1)[-1] else "no suffix" for key in found)
        seen = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) or "nothing"
        raise InvalidSource(
            f"{name} holds no images",
            why=f"expected {', '.join(IMAGE_SUFFIXES)} files as {_LAYOUT}; found {seen}",
            fix="name the folder that holds the class folders",
        )
    loose = [key for key in images if "/" not in key]
    images = [key for key in images if "/" in key]
    if not images:
        raise InvalidSource(
            f"{loose[0]} in {name} has no class",
            why=f"{len(loose)} images lie in no class folder; expected {_LAYOUT}",
            fix="name the folder above, or move them into class folders",
        )

    folders = [key.split("/")[:-1] for key in images]
    placed = places(folders)
    if not any(place.label in LABELS and place.label != NO_TUMOUR for place in placed):  # a set of something else
        placed = places(folders, partial(label_of, among_others=True))

    def one(key: str, place: Place) -> FolderImage:
        data = _get(store, key)
        return FolderImage(
            path=_text(key),
            key=key,
            label=_text(place.label),
            part=_text(place.part),
            sha256=hashlib.sha256(data).hexdigest(),
            size=len(data),
        )

    with ThreadPoolExecutor(4) as pool:
        entries = tuple(pool.map(one, images, placed))
    version = hashlib.sha256("\n".join(f"{image.sha256} {image.path}" for image in entries).encode()).hexdigest()
    ignored = passed_over(listed)
    if loose:
        ignored["images in no class folder"] = len(loose)
    return Folder(version=version, images=entries, ignored=dict(sorted(ignored.items())))


def _get(store: ObjectStore, key: str) -> bytes:
    """The bytes of an image; none of one that is listed and no file, such as a pipe or a link that leads nowhere."""
    try:
        return store.get(key)
    except NotFound:
        return b""


def _splits(looks: Looks[FolderImage], audit: Audit) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
    """The folder's own split and one by groups, where there are such; and the classes too small for the latter."""
    own = own_split(audit, looks)
    splits = {"source": own} if own else {}
    kept = looks.indices(audit.groups.keys())
    groups = np.array([audit.groups[looks.images[index].path] for index in kept])
    labels = np.array([looks.images[index].label for index in kept])
    # Of each class, that many groups at least, or a fold may have no image of it.
    many = Counter(label for label, _ in set(zip(labels.tolist(), groups.tolist(), strict=True)))
    large = [label for label, count in many.items() if count >= FOLDS]
    if len(large) > 1:
        within = np.isin(labels, large)
        folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
        train, test = next(folds.split(np.zeros(within.sum()), labels[within], groups[within]))
        splits["grouped"] = kept[within][train], kept[within][test]
    return splits, sorted({image.label for image in looks.images} - set(large))


def _text(name: str) -> str:
    # A file's name is bytes; those that are no UTF-8 could be written neither to JSON nor to HTML.
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
