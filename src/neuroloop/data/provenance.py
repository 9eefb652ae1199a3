"""Where each image comes from: the set it was first published in, the path it had, and its licence.

Public brain-MRI sets are merges, and each merged set brings its own scanners, patients and mistakes. What a merge no
longer says can often be told from its files' names and from how the files were written.
"""

import csv
import io
import re
from collections.abc import Iterable
from functools import lru_cache

from PIL import Image, JpegImagePlugin

from neuroloop.core.schemas import LABELS, NO_TUMOUR, ImageEntry, Label
from neuroloop.imaging.decode import FORMATS

UNREADABLE = "unreadable"

# Names as the sets themselves number their files, as far as a name and its class say more than chance: `image (1).jpg`
# is what Windows calls the files of any folder, `y12.jpg` what anybody may. (Br35H does not say what its tumours are.)
_OWN_NAMES: tuple[tuple[str, frozenset[str], re.Pattern[str]], ...] = (
    ("phantom", frozenset(LABELS), re.compile(r"sim-\d{6}\.png")),
    ("sartaj", frozenset({"glioma"}), re.compile(r"gg ?\(\d+\)\.jpe?g", re.IGNORECASE)),
    ("sartaj", frozenset({"meningioma"}), re.compile(r"m[123]? ?\(\d+\)\.jpe?g", re.IGNORECASE)),
    ("sartaj", frozenset({"pituitary"}), re.compile(r"p ?\(\d+\)\.jpe?g", re.IGNORECASE)),
    ("br35h", frozenset({NO_TUMOUR}), re.compile(r"no ?\d+\.jpe?g", re.IGNORECASE)),
)

# The merge "Brain Tumor MRI Dataset" renames its files to Tr-me_0010.jpg, Te-noTr_0003.jpg and the like, and numbers
# them set by set. It is 3,064 figshare slices (doi 10.6084/m9.figshare.1512427), which came as bare matrices and so
# became grey JPEGs, and the SARTAJ and Br35H sets, which are colour JPEGs. Grey ones number exactly as many as figshare
# published (708 meningioma, 1,426 glioma, 930 pituitary), colour ones of meningioma as SARTAJ's training and testing
# folders together (822 + 115), of pituitary as its training folder (827). Of `notumor`, SARTAJ published 395 and 105;
# below these numbers no file has a trace of colour, a comment or a single channel, above them one in eleven has, and
# the rest is Br35H's 1,500. The 195 colour gliomas are taken for SARTAJ's by the same rule; nothing else supports it.
_MERGED = re.compile(r"(?P<part>Tr|Te)-(gl|me|no|pi)(Tr)?_(?P<number>\d{4})\.jpe?g")
_SARTAJ_NO_TUMOUR = {"Tr": 395, "Te": 105}

_SUBSAMPLING = {0: "444", 1: "422", 2: "420"}


def recover_source(path: str, label: Label, data: bytes) -> str:
    """The set that an image was first published in: `figshare`, `sartaj`, `br35h`, `phantom`, or how it was written.

    Told by the file's name where it fits its class, then by colour mode. Where both say nothing, the encoding's name
    stands for the source, such as `jpeg-grey-q75`, `jpeg-colour-420-q90` (quality from the quantisation table; `q?` for
    a table that is not the standard's) or `png-grey`: files of one source were mostly written by one program. Never by
    pixels: the answer must not depend on what is shown. `unreadable` where the bytes are no image. Reads the header
    only.
    """
    name = path.rsplit("/", 1)[-1]
    for origin, labels, pattern in _OWN_NAMES:
        if label in labels and pattern.fullmatch(name):
            return origin
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            merged = _MERGED.fullmatch(name)
            if merged and label == NO_TUMOUR:
                return "sartaj" if int(merged["number"]) < _SARTAJ_NO_TUMOUR[merged["part"]] else "br35h"
            if merged:
                return "figshare" if image.mode == "L" else "sartaj"
            return _encoding(image)
    except Exception:  # damaged headers make Pillow raise OSError, SyntaxError, ValueError, struct.error, ...
        return UNREADABLE


def licence_of(origin: str, declared: str) -> str:
    """The licence of an image from `origin`, out of `CC0-1.0` or `CC0-1.0, figshare=CC-BY-4.0`; empty: unknown."""
    general = ""
    for piece in declared.split(","):
        name, separator, licence = piece.partition("=")
        if not separator:
            general = general or piece.strip()
        elif name.strip() == origin:
            return licence.strip()
    return general


def provenance_csv(images: Iterable[ImageEntry]) -> bytes:
    """One line an image, in their order: path, class, source path and part, origin, licence, hashes, bytes."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(("path", "label", "source_path", "source_part", "origin", "licence", "sha256", "md5", "bytes"))
    for e in images:
        table.writerow((e.path, e.label, e.source_path, e.part, e.origin, e.licence, e.sha256, e.md5, e.size))
    return out.getvalue().encode()


def _encoding(image: Image.Image) -> str:
    colour = "grey" if image.mode in ("1", "L", "LA") or image.mode.startswith("I") else "colour"
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return f"{(image.format or 'image').lower()}-{colour}"
    quality = _qualities().get(tuple(image.quantization[0]), "?")
    sampling = _SUBSAMPLING.get(JpegImagePlugin.get_sampling(image), "other")
    return "-".join(("jpeg", colour, *([sampling] if colour == "colour" else []), f"q{quality}"))


@lru_cache(1)
def _qualities() -> dict[tuple[int, ...], int]:
    """Luminance table -> quality, 1 to 100: the tables of the JPEG standard as libjpeg scales them."""
    tables = {}
    for quality in range(100, 0, -1):
        out = io.BytesIO()
        Image.new("L", (8, 8)).save(out, "JPEG", quality=quality)
        with Image.open(out, formats=["JPEG"]) as image:
            assert isinstance(image, JpegImagePlugin.JpegImageFile)
            tables[tuple(image.quantization[0])] = quality
    return tables
