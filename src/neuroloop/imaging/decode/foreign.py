"""What a scan has no business to carry: a second file behind it or within it, and scripts.

Nothing here makes an upload safe to keep: it is never kept, only its pixels are, encoded anew. A file that is two
things at once was made to deceive some program, though, and its sender should hear that it was seen.
"""

import re
import struct

from neuroloop.core.errors import InvalidImage

# Long enough not to turn up by chance in 20 MB of pixels. What begins with one character is one search.
_TAGS = re.compile(rb"<(?:script|iframe|html[> ]|!doctype html|\?php[ \n\r])")
_SCRIPTS = (b"www.w3.org/2000/svg", b"javascript:")
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # in a JPEG's coded data; the ones left out belong to it
_FILL = re.compile(rb"\xff+")
_MOST_MARKERS = 10_000  # of a JPEG; more are no image any more, and to follow them takes long
_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers of a JPEG that have no length
_FILLING = b"\0\xff\r\n\t "
_PROGRAMS = (b"MZ", b"\x7fELF", b"#!", b"\xca\xfe\xba\xbe", b"\xcf\xfa\xed\xfe", b"\x89PNG", b"\xff\xd8\xff", b"GIF8")


def check(data: bytes, kind: str) -> None:
    """Raise `InvalidImage` where a file of this kind is another thing besides, or carries a script."""
    found = _other(data, kind)
    if found:
        raise more_than_an_image(found)


def more_than_an_image(what: str) -> InvalidImage:
    """The error for a file that does, or has, this besides."""
    fix = "export the image again, without metadata or attachments"
    return InvalidImage("The file is more than an image", why=f"it {what}", fix=fix)


def jpeg_end(data: bytes) -> int:
    """The place behind a JPEG's end marker, or its length where there is none; behind so many others it is no image."""
    place = 2
    for _ in range(_MOST_MARKERS):
        fill = _FILL.match(data, place)
        if fill is None or fill.end() >= len(data):
            return len(data)
        place = fill.end() - 1  # any number of them may stand before a marker
        code = data[place + 1]
        if code == 0xD9:
            return place + 2
        if code in _ALONE:
            place += 2
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
            if code == 0xDA:  # the coded data follow; they last to the next marker
                found = _MARKER.search(data, place)
                place = found.start() if found else len(data)
    return place


def _other(data: bytes, kind: str) -> str:
    text = data.replace(b"\0", b"").lower()  # without NUL, UTF-16 reads like the rest
    if _TAGS.search(text) or any(word in text for word in _SCRIPTS):
        return "carries a script or a web page"
    if data.find(b"%PDF-", 0, 1024) >= 0:
        return "is a PDF as well"
    if _is_archive(data):
        return "is an archive as well"
    if kind == "DICOM" and data.startswith(_PROGRAMS):
        return "begins as a program or another image"
    end = _end(data, kind)
    if end is not None and data[end:].strip(_FILLING):
        return "has other data behind the end of the image"
    return ""


def _bmp_end(data: bytes) -> int:
    """Where the pixels of a BMP end, whatever it says of its size, which some programs get wrong; 0: not told."""
    if len(data) < 54 or int.from_bytes(data[14:18], "little") < 40:
        return 0
    start, _, width, height, _, bits, packed, size = struct.unpack_from("<IIiiHHII", data, 10)
    return int(start + (size if packed not in (0, 3) else (abs(width) * bits + 31) // 32 * 4 * abs(height)))


def _is_archive(data: bytes) -> bool:
    """Whether the end of a ZIP directory stands where a ZIP reader looks for it: in the last 64 KiB."""
    place = data.rfind(b"PK\x05\x06", -65_557)
    return place >= 0 and place + 22 <= len(data) and data[place + 4 : place + 8] == bytes(4)


def _end(data: bytes, kind: str) -> int | None:
    """Where the image ends by its own words; None where it does not say."""
    match kind:
        case "JPEG":
            return jpeg_end(data)
        case "PNG":
            place = 8
            while place + 12 <= len(data):
                name = data[place + 4 : place + 8]
                place += 12 + int.from_bytes(data[place : place + 4], "big")
                if name == b"IEND":
                    return place
        case "WEBP":
            return 8 + int.from_bytes(data[4:8], "little")
        case "BMP":
            return max(int.from_bytes(data[2:6], "little"), _bmp_end(data)) or None
    return None
