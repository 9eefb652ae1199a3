"""DICOM, by pydicom with GDCM, Pillow and OpenJPEG for compressed pixels."""

import io
import logging
import struct
import warnings
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from neuroloop.core.errors import InvalidImage, UnsupportedImage
from neuroloop.imaging.decode import colour, declared
from neuroloop.imaging.decode.bounds import Limits, check_size, choose, damaged, inflate
from neuroloop.imaging.decode.greys import eight_bits, luma, scaled, square

if TYPE_CHECKING:  # half a second that only those pay who read DICOM
    from pydicom import Dataset

_PALETTE = tuple(f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue"))
READ = (
    *("Modality", "BodyPartExamined", "BurnedInAnnotation"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelSpacing", "PixelAspectRatio"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
    *(f"{name}{part}" for name in _PALETTE for part in ("Descriptor", "Data")),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("PixelData", "FloatPixelData", "DoubleFloatPixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
)
"""The tags that are read, and no others: none names a person, a place or a time. None but the pixels is kept."""

_WINDOW = ("PhotometricInterpretation", "BitsStored", "PixelRepresentation", "WindowCenter", "WindowWidth",
           "VOILUTFunction")  # fmt: skip
_SENSELESS = (ValueError, TypeError, IndexError, AttributeError, KeyError, OverflowError)
_PREAMBLE, _MAGIC = 128, b"DICM"
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_EXPLICIT = b"1.2.840.10008.1.2.1\0"
_BIG_ENDIAN = b"1.2.840.10008.1.2.2"
_LONG = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_SHORT = frozenset(
    b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split()
)  # of the value representations, those whose length has two bytes
_UNDEFINED = 0xFFFFFFFF
_PIXELS, _ITEM, _ITEM_END, _SEQUENCE_END = 0x7FE00010, 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD


class Frame(NamedTuple):
    """One frame of a DICOM file, and what its header says of it."""

    pixels: NDArray[np.uint8]
    frames: int
    frame: int
    modality: str
    body_part: str
    colour: float


def is_dicom(data: bytes) -> bool:
    """Whether the bytes have DICOM's mark behind a preamble."""
    return data.startswith(_MAGIC, _PREAMBLE)


def read(data: bytes, frame: int | None, limits: Limits) -> Frame:
    """One frame as grey pixels: rescaled, in its own window (the first), upright as stored, pixels made square.

    Without a window the values are spread as `eight_bits` does. MONOCHROME1 is inverted, colour becomes luma. Raises
    `InvalidImage` for a header or pixels that contradict themselves, for a file without an image, and for one that
    says that it has text burned into its pixels.
    """
    import pydicom

    data = _inflated(data, limits)
    if _depth(data, limits.depth) > limits.depth:
        raise damaged(f"its sequences are nested deeper than {limits.depth} levels")
    with warnings.catch_warnings():  # warnings, and the lines that are logged with them, quote values
        warnings.simplefilter("ignore")
        logging.getLogger("pydicom").setLevel(logging.CRITICAL)
        try:
            header = pydicom.dcmread(io.BytesIO(data), specific_tags=list(READ))
            return _frame(header, frame, limits)
        except (InvalidImage, MemoryError):
            raise
        except NotImplementedError:
            raise UnsupportedImage(
                "The DICOM file is compressed in a way that is not read",
                why="no decoder for its transfer syntax is installed",
                fix="export it uncompressed, or as JPEG or PNG",
            ) from None
        except Exception:  # pydicom and the decoders raise a dozen types for a bad file, RecursionError among them
            raise damaged("its DICOM header or its pixel data end early or contradict themselves") from None


def _frame(header: "Dataset", frame: int | None, limits: Limits) -> Frame:
    if not any(name in header for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise InvalidImage(
            "The DICOM file holds no image",
            why="it has no pixel data, or was cut off before them",
            fix="upload an image of the series itself; if this is one, download it again",
        )
    if str(header.get("BurnedInAnnotation", "")).strip().upper() == "YES":
        raise InvalidImage(
            "The image may show who the patient is",
            why="its DICOM header says that text is burned into the pixels (Burned In Annotation: YES)",
            fix="remove the text from the pixels, or export the image without it",
        )
    rows, columns = int(header.Rows), int(header.Columns)
    check_size(columns, rows, limits)
    frames = int(header.get("NumberOfFrames") or 1)
    chosen = choose(frame, frames, limits)
    values = _stored(header, chosen - 1, frames)
    settings, coloured = _settings(header, chosen - 1), 0.0
    if header.PhotometricInterpretation == "PALETTE COLOR":
        pixels, coloured = _coloured(values, settings)
    elif values.ndim == 3:
        pixels, deeper = luma(values, bits=int(header.BitsStored)), max(int(header.BitsStored) - 8, 0)
        coloured = _share(values >> deeper)
    else:
        pixels = _window(_rescale(values, settings), settings, _padding(values, settings))
    return Frame(
        square(pixels, *_spacing(settings), limits),
        frames,
        chosen,
        declared.modality(header.get("Modality")),
        declared.body_part(header.get("BodyPartExamined")),
        coloured,
    )


def _stored(header: "Dataset", index: int, frames: int) -> NDArray[Any]:
    """The values of one frame as they are stored, unpacked: (rows, columns), or (rows, columns, 3) of colour."""
    from pydicom import uid
    from pydicom.pixels import pixel_array

    syntax = header.file_meta.TransferSyntaxUID
    if "PixelData" not in header or header.get("BitsStored") is None:  # real numbers
        return pixel_array(header, index=index)
    stored, high = int(header.BitsStored), header.get("HighBit")
    if syntax == uid.JPEGExtended12Bit and stored > 8:
        return _extended_jpeg(header, index, frames)
    if syntax.is_compressed or high is None or not stored <= int(high) < int(header.BitsAllocated):
        return pixel_array(header, index=index)
    # As in old files, the values begin above the lowest bit; unless the header only says so.
    header.BitsStored, unused = int(high) + 1, int(high) + 1 - stored
    values = pixel_array(header, index=index)
    header.BitsStored = stored
    return values >> unused if values.max(initial=0) >= 2**stored or not (values & (2**unused - 1)).any() else values


def _extended_jpeg(header: "Dataset", index: int, frames: int) -> NDArray[Any]:
    """Grey JPEG of 12 bits, which GDCM reads and pydicom does not ask it for."""
    import gdcm
    from pydicom.encaps import get_frame

    if int(header.SamplesPerPixel) != 1:
        raise NotImplementedError
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(get_frame(header.PixelData, index, number_of_frames=frames))
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((int(header.Columns), int(header.Rows), 1))
    image.SetDataElement(element)
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(gdcm.PhotometricInterpretation.MONOCHROME2))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGExtendedProcess2_4))
    signed = int(header.PixelRepresentation)
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, int(header.BitsStored), int(header.BitsStored) - 1, signed))
    data = image.GetBuffer().encode("utf-8", "surrogateescape")  # GDCM gives bytes as text
    return np.frombuffer(data, "<i2" if signed else "<u2").reshape(int(header.Rows), int(header.Columns))


def _share(colours: NDArray[Any]) -> float:
    """How much is in colour of (rows, columns, 3), 0..255."""
    return colour.share(Image.fromarray(colours.astype(np.uint8)))


def _coloured(values: NDArray[Any], settings: "Dataset") -> tuple[NDArray[np.uint8], float]:
    """The greys of the colours that a palette has for the values (PS3.3, C.7.6.3.1.5 and C.7.6.3.1.6); how much is in
    colour.

    Colours have 8 bits where no entry needs more, whatever the palette says of itself: some say 16.
    """
    red, green, blue = (
        _table(settings[f"{name}Descriptor"].value, settings[f"{name}Data"].value, values, settings)
        for name in _PALETTE
    )
    first = min(red.first, green.first, blue.first)
    steps = np.arange(first, max(table.first + len(table.entries) for table in (red, green, blue)))
    colours = np.stack([table.of(steps) for table in (red, green, blue)], axis=-1)
    bits = 8 if colours.max() <= 255 else 16
    greys = luma(colours[None], bits=bits)[0]  # of the table: the pixels are many more
    some = values[:: -(-values.shape[0] // 128), :: -(-values.shape[1] // 128)]
    shown = np.stack([_Table(channel, first).of(some) for channel in (colours >> (bits - 8)).T], axis=-1)
    return _Table(greys, first).of(values), _share(shown)


def _settings(header: "Dataset", index: int) -> "Dataset":
    """The header with what the functional groups say of this frame: in enhanced objects it stands there."""
    from pydicom import Dataset

    settings = Dataset()
    settings.file_meta = header.file_meta  # says in which order the bytes of a table stand
    settings.update({element.tag: element for element in header if element.tag < _PIXELS and element.VR != "SQ"})
    for name in ("ModalityLUTSequence", "VOILUTSequence"):
        if header.get(name):
            settings[name] = header[name]
    shared = header.get("SharedFunctionalGroupsSequence") or []
    of_frames = header.get("PerFrameFunctionalGroupsSequence") or []
    for group in (*shared[:1], *of_frames[index : index + 1]):
        for name in ("PixelMeasuresSequence", "PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for item in (group.get(name) or [])[:1]:
                settings.update(item)
    return settings


def _padding(values: NDArray[Any], settings: "Dataset") -> NDArray[np.bool_] | None:
    """What only fills the frame up, by its stored value; None where that is nothing or all."""
    first = settings.get("PixelPaddingValue")
    if not isinstance(first, int):
        return None
    last = settings.get("PixelPaddingRangeLimit")
    low, high = sorted((first, last if isinstance(last, int) else first))
    padding = (values >= low) & (values <= high)
    return padding if padding.any() and not padding.all() else None


def _rescale(values: NDArray[Any], settings: "Dataset") -> NDArray[Any]:
    """The values in their own unit; as they are where that changes nothing, or makes no sense."""
    if settings.get("ModalityLUTSequence"):
        try:
            return _through(settings.ModalityLUTSequence[0], values, settings)
        except _SENSELESS:
            return values
    slope, intercept = (
        _number(settings.get(name), other) for name, other in (("RescaleSlope", 1), ("RescaleIntercept", 0))
    )
    return values if (slope, intercept) == (1, 0) or slope == 0 else values * slope + intercept


def _window(values: NDArray[Any], settings: "Dataset", padding: NDArray[np.bool_] | None) -> NDArray[np.uint8]:
    """The rescaled values as they are meant to look, in the window or through the table that the header names first."""
    from pydicom import Dataset
    from pydicom.pixels import apply_windowing

    turned = settings.PhotometricInterpretation == "MONOCHROME1"
    try:
        if settings.get("VOILUTSequence"):
            seen = _through(settings.VOILUTSequence[0], values, settings)
            return eight_bits(seen, turned=turned, padding=padding)
        if settings.get("WindowWidth") is not None and settings.get("WindowCenter") is not None:
            window = Dataset()  # without the rescaling, which is done: pydicom would take the result's range of it
            window.update({settings[name].tag: settings[name] for name in _WINDOW if name in settings})
            ends = apply_windowing(np.array([-1e30, 1e30]), window)  # what black and white become
            pixels = scaled(apply_windowing(values, window), float(ends[0]), float(ends[1]))
            pixels = 255 - pixels if turned else pixels
            return pixels if padding is None else np.where(padding, np.uint8(0), pixels)
    except _SENSELESS:
        pass  # a window that makes no sense is no reason to refuse sound pixels
    return eight_bits(values, turned=turned, padding=padding)


def _through(table: "Dataset", values: NDArray[Any], settings: "Dataset") -> NDArray[Any]:
    """What a table of greys makes of the values. Raises one of `_SENSELESS`, see `_table`."""
    return _table(table.LUTDescriptor, table.LUTData, values, settings).of(values)


class _Table(NamedTuple):
    entries: NDArray[Any]
    first: int
    """The value that the first entry is for."""

    def of(self, values: NDArray[Any]) -> NDArray[Any]:
        """The entries of the values; those beyond either end have the entry there."""
        if values.dtype.kind == "f":
            values = np.rint(np.clip(np.nan_to_num(values), self.first, self.first + len(self.entries) - 1))
        index = values.astype(np.intp)
        index -= self.first
        return np.take(self.entries, index, mode="clip")


def _table(descriptor: Any, data: Any, values: NDArray[Any], settings: "Dataset") -> _Table:
    """A table for the values, of words or packed two to a word (PS3.3, C.7.6.3.1.5, C.11.1 and C.11.2).

    Raises one of `_SENSELESS` for a table that contradicts itself.
    """
    entries, first, bits = (int(each) for each in descriptor)
    entries = entries % 65_536 or 65_536  # some read it as a signed number
    if isinstance(data, bytes):
        little = settings.file_meta.TransferSyntaxUID.is_little_endian
        words = np.frombuffer(data[: len(data) // 2 * 2], "<u2" if little else ">u2").astype(np.uint16)
    else:
        words = np.atleast_1d(np.asarray(data, np.uint16))
    if bits <= 8 and len(words) < entries <= 2 * len(words):  # the first of two is the lower byte
        words = words.astype("<u2").view(np.uint8).astype(np.uint16)
    if len(words) < entries:
        raise ValueError("the table is shorter than it says")
    if first > 32_767 and values.max() < first:
        first -= 65_536
    return _Table(words[:entries], first)


def _spacing(settings: "Dataset") -> tuple[float, float]:
    """Distance of rows, and of columns, in any one unit."""
    for name in ("PixelSpacing", "PixelAspectRatio"):
        pair = settings.get(name)
        if pair is not None and len(pair) == 2:
            return _number(pair[0], 1), _number(pair[1], 1)
    return 1.0, 1.0


def _number(value: object, other: float) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return other
    return number if np.isfinite(number) else other


def _inflated(data: bytes, limits: Limits) -> bytes:
    """The file with its data set unpacked, where it is deflated: pydicom would unpack without bound."""
    start, syntax = _meta(data)
    if syntax != _DEFLATED:
        return data
    unpacked, _ = inflate(data[start:], -zlib.MAX_WBITS, limits)
    return data[:start].replace(_DEFLATED, _EXPLICIT.ljust(len(_DEFLATED), b"\0"), 1) + unpacked


def _meta(data: bytes) -> tuple[int, bytes]:
    """Where the data set begins, and the transfer syntax that the elements before it name."""
    place, syntax = _PREAMBLE + len(_MAGIC), b""
    while place + 8 <= len(data) and data[place : place + 2] == b"\x02\0":
        vr = data[place + 4 : place + 6]
        at, length = (
            (place + 12, int.from_bytes(data[place + 8 : place + 12], "little"))
            if vr in _LONG
            else (place + 8, int.from_bytes(data[place + 6 : place + 8], "little"))
        )
        if data[place + 2 : place + 4] == b"\x10\0":
            syntax = data[at : at + length].rstrip(b"\0 ")
        place = at + length
    return place, syntax


def _depth(data: bytes, enough: int) -> int:
    """How deep sequences are nested, counted up to one more than `enough`.

    Walks over the elements without recursion, which is what pydicom does not. Every element may be of explicit or
    implicit representation, as pydicom allows; what is neither ends the walk, and pydicom then refuses it.
    """
    place, syntax = _meta(data)
    order = ">" if syntax == _BIG_ENDIAN else "<"
    head, long = struct.Struct(f"{order}HH2sH"), struct.Struct(f"{order}L")
    open_until: list[float] = []  # where each open sequence ends; infinity where a mark will say so
    deepest, end = 0, len(data)
    while place + 8 <= end and deepest <= enough:
        while open_until and place >= open_until[-1]:
            open_until.pop()
        group, element, vr, length = head.unpack_from(data, place)
        tag = group << 16 | element
        place += 8
        if tag in (_ITEM, _ITEM_END):
            continue  # an item's elements follow
        if tag == _SEQUENCE_END:
            if open_until:
                open_until.pop()
            continue
        if vr in _LONG:
            if place + 4 > end:
                break
            (length,) = long.unpack_from(data, place)
            place += 4
        elif vr not in _SHORT:
            vr = b""
            (length,) = long.unpack_from(data, place - 4)
        if tag == _PIXELS and not open_until:
            break  # nothing that is read stands behind the pixels
        if vr == b"SQ" or (length == _UNDEFINED and tag != _PIXELS):
            open_until.append(float("inf") if length == _UNDEFINED else place + length)
            deepest = max(deepest, len(open_until))
        elif length == _UNDEFINED:
            break
        else:
            place += length
    return deepest
