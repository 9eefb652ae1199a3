"""Where training images come from: simulated scans, or a folder or bucket of class folders."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from neuroloop.core.errors import InvalidSource, NotFound, Unavailable
from neuroloop.core.ports import ObjectStore
from neuroloop.core.schemas import LABELS, Label, SourceFile
from neuroloop.imaging.decode import encode_png
from neuroloop.imaging.phantom import SCANNERS, scan

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
"""The plain pictures among what `imaging.decode` reads, by the names such files have."""

MINIMUM_PER_CLASS = 10
"""Fewer images than this cannot be divided into four parts of which each knows every class."""

LAYOUT = "[part/]class/file with the class folders glioma, meningioma, notumor and pituitary"

_ALIASES: dict[str, Label] = {
    "glioma": "glioma",
    "gliomatumor": "glioma",
    "meningioma": "meningioma",
    "meningiomatumor": "meningioma",
    "notumor": "notumor",
    "no": "notumor",
    "none": "notumor",
    "healthy": "notumor",
    "normal": "notumor",
    "pituitary": "pituitary",
    "pituitarytumor": "pituitary",
}
_ANYBODYS = frozenset({"no", "none", "healthy", "normal"})  # what a class of any data set may be called
_PART = re.compile(r"(train|test|val)(ing|id|idation)?(set)?([\W_\d].*)?")  # a folder below a class that is a part


def label_of(folder: str, *, among_others: bool = False) -> Label | None:
    """The class that a folder name means, None for a name that is no class.

    Case, spaces, `_` and `-` do not matter, nor does British spelling: `No_Tumour`, `no tumor` and `notumor` are one.
    `among_others` says that there are classes that are none of ours: "normal" beside "pneumonia" is no brain.
    """
    name = "".join(character for character in folder.casefold() if character.isalnum())
    return None if among_others and name in _ANYBODYS else _ALIASES.get(name.replace("tumour", "tumor"))


@dataclass(frozen=True)
class Place:
    """What the folders of an image say of it."""

    part: str  # the source's own part, empty if it has none
    label: str  # a class of ours, or the name of a folder as it is first spelt
    below: tuple[str, ...]  # other folders between the class and the image


def places(folders: Sequence[Sequence[str]], ours: Callable[[str], Label | None] = label_of) -> list[Place]:
    """Part and class of each image from its folders, outermost first, at least one.

    The class is the deepest folder whose name is one of `ours`, else the deepest that is not named like a part. The
    part is what stands above it, and train, test or val folders below it, but for what all images share; where they
    share all of it, its last folder.
    """
    spelled: dict[str, str] = {}

    def one(names: Sequence[str]) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
        known = {depth: label for depth, name in enumerate(names) if (label := ours(name)) is not None}
        others = [depth for depth, name in enumerate(names) if not _is_part(name)] or [len(names) - 1]
        depth = max(known or others)
        first = spelled.setdefault(unicodedata.normalize("NFC", names[depth]).casefold(), names[depth])
        below = names[depth + 1 :]
        part = (*names[:depth], *filter(_is_part, below))
        return part, known.get(depth, first), tuple(name for name in below if not _is_part(name))

    found = [one(names) for names in folders]
    parts = {part for part, _, _ in found}
    shared = sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False)))
    if len(parts) == 1:
        shared -= 1
    return [Place("/".join(part[max(shared, 0) :]), label, below) for part, label, below in found]


def _is_part(name: str) -> bool:
    return _PART.fullmatch(name.casefold()) is not None


def is_training(part: str) -> bool:
    """Whether the name of a source's own part says that one trains on it: Training, site A/train, TRAIN_2."""
    return _starts(part, "train")


def is_test(part: str) -> bool:
    """Whether it says that one tests on it: Testing, site A/test, TEST_2."""
    return _starts(part, "test") and not is_training(part)


def _starts(part: str, word: str) -> bool:
    return any(name.startswith(word) for name in part.casefold().split("/"))


def snapshot_path(file: SourceFile) -> str:
    """Where the file stands in a snapshot: `[part/]class/name`, with our class names."""
    name = file.path.rsplit("/", 1)[-1]
    return "/".join(piece for piece in (file.part, file.label, name) if piece)


def check(files: Iterable[SourceFile]) -> dict[str, Any]:
    """Whether a source can be trained on: `{"images": n, "classes": {label: n}, "parts": {part: n}}`.

    Raises `InvalidSource` where a class is missing or has fewer than `MINIMUM_PER_CLASS` images.
    """
    found = list(files)
    classes: Counter[str] = Counter(file.label for file in found)
    parts = Counter(file.part for file in found if file.part)
    short = [label for label in LABELS if classes[label] < MINIMUM_PER_CLASS]
    if short:
        raise InvalidSource(
            f"The source has too few images of {', '.join(short)}",
            why=f"expected at least {MINIMUM_PER_CLASS} of each class, "
            f"found {', '.join(f'{classes[label]} {label}' for label in LABELS)}",
            fix=f"add the missing images; the layout is {LAYOUT}",
        )
    return {
        "images": len(found),
        "classes": {label: classes[label] for label in LABELS},
        "parts": dict(sorted(parts.items())),
    }


class PhantomSource:
    """Simulated scans, the classes in equal numbers, rendered when they are read; the same for the same seed."""

    simulated = True
    licence = "CC0-1.0"
    """Nobody's scans, made from numbers: free for any use."""

    def __init__(self, images: int, seed: int, scanner: str = "A") -> None:
        if images < MINIMUM_PER_CLASS * len(LABELS):
            raise InvalidSource(
                f"{images} simulated scans are too few",
                why=f"each of the {len(LABELS)} classes needs at least {MINIMUM_PER_CLASS}",
                fix=f"ask for {MINIMUM_PER_CLASS * len(LABELS)} or more",
            )
        if scanner not in SCANNERS:
            raise InvalidSource(
                f"There is no simulated scanner {scanner!r}", fix=f"choose one of {', '.join(sorted(SCANNERS))}"
            )
        self.images, self.seed, self.scanner = images, seed, scanner
        self.ignored: dict[str, int] = {}
        self.url = f"phantom://?images={images}&seed={seed}&scanner={scanner}"

    def files(self) -> list[SourceFile]:
        """`class/sim-000000.png` and so on, sorted by path; the number is the scan's index within its class."""
        each, rest = divmod(self.images, len(LABELS))
        return [
            SourceFile(path=f"{label}/sim-{index:06d}.png", label=label)  # type: ignore[arg-type]
            for order, label in enumerate(LABELS)
            for index in range(each + (order < rest))
        ]

    def read(self, file: SourceFile) -> bytes:
        """Render one scan as PNG bytes. Raises `InvalidSource` for a path that `files()` does not list."""
        stem = file.path.removeprefix(f"{file.label}/sim-").removesuffix(".png")
        if not stem.isdecimal() or file.path != f"{file.label}/sim-{int(stem):06d}.png":
            raise InvalidSource(f"{file.path!r} is no simulated scan", why="they are named class/sim-000012.png")
        return encode_png(scan(file.label, int(stem), seed=self.seed, scanner=self.scanner).pixels)


class ObjectSource:
    """Real images in an object store (a folder or a bucket), laid out as `class/file` or `part/class/file`.

    `licence` is what the operator declares, as the files themselves do not say.
    `ignored` counts what the last `files()` passed over (see `passed_over`).
    """

    simulated = False

    def __init__(self, url: str, store: ObjectStore, licence: str = "") -> None:
        self.url, self.store, self.licence = url, store, licence
        self.ignored: dict[str, int] = {}

    def files(self) -> list[SourceFile]:
        """All image files, told by their suffix, sorted by path.

        Raises `InvalidSource` where the source is out of reach, empty, holds no image, an image outside a class folder,
        or two images that would take the same place in a snapshot.
        """
        try:
            self.store.check()
            found = self.store.list("")
        except (Unavailable, NotFound) as error:
            raise InvalidSource(
                f"The source {self.url} cannot be read",
                why=str(error),
                fix=f"expected {LAYOUT}; check NEUROLOOP_DATA_URL",
            ) from error
        keys = [key for key in found if not hidden(key)]
        if not keys:
            raise InvalidSource(
                f"The source {self.url} holds no files",
                why=f"it does not exist or is empty; expected {LAYOUT}",
                fix="check NEUROLOOP_DATA_URL",
            )
        images = sorted(key for key in keys if key.lower().endswith(IMAGE_SUFFIXES))
        self.ignored = passed_over(found)
        if not images:
            others = ", ".join(f"{count} {what}" for what, count in self.ignored.items())
            raise InvalidSource(
                f"The source {self.url} holds no images",
                why=f"expected {', '.join(IMAGE_SUFFIXES)} files as {LAYOUT}, found only {others}",
                fix="check NEUROLOOP_DATA_URL",
            )
        named = places([key.split("/")[:-1] or [""] for key in images])
        files = [self._file(key, place) for key, place in zip(images, named, strict=True)]
        taken: dict[str, str] = {}
        for file in files:
            other = taken.setdefault(snapshot_path(file), file.path)
            if other != file.path:
                raise InvalidSource(
                    f"{other} and {file.path} are both {snapshot_path(file)} to us",
                    why="part, class and file name together must be unique",
                    fix="rename one of them",
                )
        return files

    def _file(self, key: str, place: Place) -> SourceFile:
        try:
            key.encode()
        except UnicodeEncodeError:
            name = key.encode(errors="backslashreplace").decode()
            raise InvalidSource(
                f"The name {name} in {self.url} is no text", why="it is not written in UTF-8", fix="rename the file"
            ) from None
        label = None if place.below else label_of(place.label)
        if label is None:
            where = f"the folder {key.split('/')[-2]!r}" if "/" in key else "no folder at all"
            raise InvalidSource(
                f"The class of {key} in {self.url} is unknown",
                why=f"expected {LAYOUT} (no_tumor, glioma_tumor and the like will do), found it in {where}",
                fix="rename the folder to its class, or take it out of the source",
            )
        return SourceFile(path=key, label=label, part=place.part)

    def read(self, file: SourceFile) -> bytes:
        """The bytes of one file. Raises `InvalidSource` where it has gone, `Unavailable` for a fault that may pass."""
        try:
            return self.store.get(file.path)
        except NotFound as error:
            raise InvalidSource(
                f"{file.path} is no longer in {self.url}", why="the source changed while it was read", fix="start again"
            ) from error


def hidden(key: str) -> bool:
    """Whether a file is no part of a source: its name or a folder above is hidden, or a Mac archive's shadow."""
    # Archives unpacked on a Mac bring "__MACOSX/glioma/._image.jpg", which is no image whatever its name says.
    return any(piece.startswith(".") or piece == "__MACOSX" for piece in key.split("/"))


def passed_over(keys: Iterable[str]) -> dict[str, int]:
    """In words, what is not looked at of all files of a source: what is no image, and images that are hidden."""
    found = Counter[str]()
    for key in keys:
        image, pieces = key.lower().endswith(IMAGE_SUFFIXES), key.split("/")
        shadow = "__MACOSX" in pieces or pieces[-1].startswith(
            "._"
        )  # of a Mac archive: no image whatever its name says
        if not image and not hidden(key):
            found[f"{suffix_of(key)} files"] += 1
        elif image and hidden(key) and not shadow:
            found["hidden images"] += 1
    return dict(sorted(found.items()))


def suffix_of(key: str) -> str:
    """`.jpg` of a key, in lower case, or `(no suffix)`."""
    name = key.rsplit("/", 1)[-1]
    return f".{name.rsplit('.', 1)[1].lower()}" if "." in name else "(no suffix)"
