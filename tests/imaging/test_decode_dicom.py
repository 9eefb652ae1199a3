"""DICOM: its pixels as a viewer shows them, what its header declares, and its traps."""

import re
import struct

import numpy as np
import pytest
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset

from imaging.files import compressed, dicom, header, picture, saved
from neuroloop.core.errors import ImageTooLarge, InvalidImage
from neuroloop.imaging.decode import Limits, decode, objection, read


def smooth(height: int = 96, width: int = 120) -> np.ndarray:
    """Greys of 12 bits, uint16 (height, width)."""
    y, x = np.mgrid[0:height, 0:width]
    return ((np.sin(x / 15) + np.cos(y / 9) + 2) * 1000).astype(np.uint16)


DEEP = smooth()
GREY = (DEEP >> 4).astype(np.uint8)
AS_PNG = decode(picture(DEEP, "PNG"))


def apart(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other).max())


def test_eight_bits_come_back_pixel_by_pixel():
    found = read(dicom(GREY))
    assert (found.kind, found.frames, found.frame, found.modality, found.body_part) == ("DICOM", 1, 1, "MR", "")
    assert np.array_equal(found.pixels, GREY)


@pytest.mark.parametrize(
    "syntax",
    [
        *("ImplicitVRLittleEndian", "DeflatedExplicitVRLittleEndian", "RLELossless", "JPEGLossless"),
        *("JPEGLosslessSV1", "JPEGLSLossless", "JPEG2000Lossless"),
    ],
)
def test_twelve_bits_are_the_same_in_every_transfer_syntax_and_as_png(syntax: str):
    assert np.array_equal(decode(compressed(DEEP, syntax, BitsStored=12, HighBit=11)), AS_PNG)


def test_lossy_jpeg_is_nearly_the_same():
    assert apart(decode(compressed(GREY, "JPEGBaseline8Bit")), GREY) <= 6


def test_big_endian_is_read():
    dataset = header(DEEP)
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian
    dataset.PixelData = DEEP.byteswap().tobytes()
    assert np.array_equal(decode(saved(dataset)), AS_PNG)


def test_monochrome1_is_shown_with_its_bright_parts_bright():
    assert np.array_equal(decode(dicom(255 - GREY, PhotometricInterpretation="MONOCHROME1")), GREY)


@pytest.mark.parametrize("brightest", [300, 4000])
def test_neither_an_inversion_nor_an_offset_costs_grey_levels(brightest: int):
    deep = (DEEP.astype(int) * brightest // 4000).astype(np.uint16)
    reference = decode(picture(deep, "PNG"))
    assert len(np.unique(reference)) > 150
    turned = {"PhotometricInterpretation": "MONOCHROME1"}
    assert apart(decode(dicom(65535 - deep, **turned)), reference) <= 1
    assert apart(decode(dicom(4095 - deep, BitsStored=12, HighBit=11, **turned)), reference) <= 1
    dark = deep // 20
    assert apart(decode(dicom(4095 - dark, BitsStored=12, HighBit=11, **turned)), decode(picture(dark, "PNG"))) <= 1
    assert apart(decode(dicom(deep + 30000)), reference) <= 1


def test_a_falling_slope_turns_the_window_s_values_but_not_the_window():
    rescaled = dicom(4095 - DEEP, RescaleSlope=-1, RescaleIntercept=4095, WindowCenter=2000, WindowWidth=1000)
    assert apart(decode(rescaled), decode(dicom(DEEP, WindowCenter=2000, WindowWidth=1000))) <= 1
    flat = dicom(DEEP, RescaleSlope=0, RescaleIntercept=0, WindowCenter=2000, WindowWidth=1000)
    assert apart(decode(flat), decode(dicom(DEEP, WindowCenter=2000, WindowWidth=1000))) <= 1


@pytest.mark.parametrize(
    ("limit", "photometric"), [(None, "MONOCHROME2"), (-31000, "MONOCHROME2"), (None, "MONOCHROME1")]
)
def test_padding_is_dark_and_takes_no_grey_levels(limit: int | None, photometric: str):
    image = DEEP.astype(np.int16) if photometric == "MONOCHROME2" else 4000 - DEEP.astype(np.int16)
    padded = image.copy()
    padded[:20] = -32768
    padded[0] = -32768 if limit is None else limit
    tags = {"PixelPaddingValue": -32768} | ({} if limit is None else {"PixelPaddingRangeLimit": limit})
    pixels = decode(dicom(padded, PhotometricInterpretation=photometric, **tags))
    assert pixels[:20].max() == 0
    assert apart(pixels[20:], decode(dicom(image[20:], PhotometricInterpretation=photometric))) <= 1


@pytest.mark.parametrize("window", [{}, {"WindowCenter": 600, "WindowWidth": 1200}])
@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_padding_is_black_though_nothing_else_is_dark(window: dict, photometric: str):
    head = (DEEP.astype(int) * 700 // 4000 + 300).astype(np.uint16)  # 300 to 1000
    padding = 0 if photometric == "MONOCHROME2" else 1200
    if photometric == "MONOCHROME1":
        head = 1200 - head
    head[:30] = padding
    tags = {"PhotometricInterpretation": photometric, "PixelPaddingValue": padding, **window}
    pixels = decode(dicom(head, **tags))
    assert pixels[:30].max() == 0
    assert pixels[30:].max() > 200
    small = (head // 8).astype(np.uint8)
    tags = {"PhotometricInterpretation": photometric, "PixelPaddingValue": padding // 8}
    assert decode(dicom(small, **tags))[:30].max() == 0


def test_colour_becomes_luma_and_palettes_show_their_colours():
    red = np.zeros((40, 40, 3), np.uint8)
    red[..., 0] = 255
    assert decode(dicom(red))[0, 0] == 76
    ramp = (np.arange(256, dtype=np.uint16) * 257)[::-1].tobytes()
    table = {}
    for colour in ("Red", "Green", "Blue"):
        table[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        table[f"{colour}PaletteColorLookupTableData"] = ramp
    assert apart(decode(dicom(GREY, PhotometricInterpretation="PALETTE COLOR", **table)), 255 - GREY) <= 1


def coloured(values: np.ndarray, descriptor: list[int], entries: np.ndarray, **tags) -> np.ndarray:
    """The greys of values with one table for all three colours."""
    dataset = header(values, PhotometricInterpretation="PALETTE COLOR", **tags)
    for colour in ("Red", "Green", "Blue"):
        setattr(dataset, f"{colour}PaletteColorLookupTableDescriptor", descriptor)
        setattr(dataset, f"{colour}PaletteColorLookupTableData", entries.tobytes())
    return decode(saved(dataset))


TWELVE = {"BitsStored": 12, "HighBit": 11}
RAMP = np.arange(256, dtype=np.uint8)


@pytest.mark.parametrize("bits", [8, 16])
def test_entries_of_8_bits_in_words_keep_their_steps_whatever_the_palette_says(bits: int):
    assert np.array_equal(coloured(GREY, [256, 0, bits], RAMP[::-1].astype(np.uint16)), 255 - GREY)


@pytest.mark.parametrize("first", [0, 1000])
def test_values_beyond_a_palette_have_its_last_colours(first: int):
    expected = np.clip(DEEP.astype(int) - first, 0, 255)
    assert np.array_equal(coloured(DEEP, [256, first, 8], RAMP, **TWELVE), expected)


@pytest.mark.parametrize("first", [0, -1000, 65536 - 1000])
@pytest.mark.parametrize("syntax", ["ExplicitVRLittleEndian", "ImplicitVRLittleEndian"])
def test_a_palette_may_have_thousands_of_entries_of_a_byte_and_begin_below_zero(first: int, syntax: str):
    values = DEEP.astype(np.int16) - 1000 if first else DEEP
    dataset = header(values, PhotometricInterpretation="PALETTE COLOR", **({} if first else TWELVE))
    dataset.file_meta.TransferSyntaxUID = getattr(uid, syntax)
    for colour in ("Red", "Green", "Blue"):
        setattr(dataset, f"{colour}PaletteColorLookupTableDescriptor", [4096, first, 8])
        dataset[f"{colour}PaletteColorLookupTableDescriptor"].VR = "SS" if first < 0 else "US"
        setattr(dataset, f"{colour}PaletteColorLookupTableData", (np.arange(4096) >> 4).astype(np.uint8).tobytes())
    assert np.array_equal(decode(saved(dataset)), DEEP >> 4)


def test_a_palette_that_is_shorter_than_it_says_is_refused():
    with pytest.raises(InvalidImage, match="contradict"):
        coloured(GREY, [256, 0, 16], RAMP[:100])


def test_the_window_decides_what_is_black_and_what_is_white():
    pixels = decode(dicom(DEEP, WindowCenter=2000.5, WindowWidth=1001))
    expected = np.clip((DEEP.astype(float) - 1500) / 1000 * 255, 0, 255)
    assert np.abs(pixels - expected).max() <= 1


def test_of_several_windows_the_first_is_used_and_a_senseless_one_is_not():
    one = decode(dicom(DEEP, WindowCenter=2000, WindowWidth=1000))
    assert np.array_equal(decode(dicom(DEEP, WindowCenter=[2000, 9], WindowWidth=[1000, 9])), one)
    assert np.array_equal(decode(dicom(DEEP, WindowCenter=2000, WindowWidth=0)), AS_PNG)


def test_the_window_applies_to_rescaled_values():
    rescaled = dicom(DEEP, RescaleSlope=0.5, RescaleIntercept=-200, WindowCenter=800, WindowWidth=1000)
    assert apart(decode(rescaled), decode(dicom(DEEP, WindowCenter=2000, WindowWidth=2000))) <= 1


def test_a_table_of_greys_is_applied():
    table = Dataset()
    table.LUTDescriptor = [4096, 0, 12]
    table.LUTData = (4095 - np.arange(4096)).astype(np.uint16).tobytes()
    table["LUTData"].VR = "OW"
    pixels = decode(dicom(DEEP, BitsStored=12, HighBit=11, VOILUTSequence=[table]))
    assert apart(pixels, decode(picture(4095 - DEEP, "PNG"))) == 0


INVERSE = 4095 - np.arange(4096)


@pytest.mark.parametrize("sequence", ["VOILUTSequence", "ModalityLUTSequence"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_table_of_8_bit_greys_is_applied_whether_an_entry_has_a_byte_or_a_word(sequence: str, packed: bool):
    table = Dataset()
    table.LUTDescriptor = [4096, 0, 8]
    table.LUTData = (INVERSE >> 4).astype(np.uint8 if packed else np.uint16).tobytes()
    table["LUTData"].VR = "OW"
    pixels = decode(dicom(DEEP, BitsStored=12, HighBit=11, **{sequence: [table]}))
    assert np.array_equal(pixels, INVERSE[DEEP] >> 4)


@pytest.mark.parametrize(("first", "kind"), [(-1000, "SS"), (65536 - 1000, "US")])
def test_a_table_begins_at_its_first_value_below_zero_too(first: int, kind: str):
    table = Dataset()
    table.LUTDescriptor = [4096, first, 12]
    table["LUTDescriptor"].VR = kind
    table.LUTData = INVERSE.astype(np.uint16).tobytes()
    table["LUTData"].VR = "OW"
    pixels = decode(dicom(DEEP.astype(np.int16) - 1000, VOILUTSequence=[table]))
    assert np.array_equal(pixels, decode(picture(4095 - DEEP, "PNG")))
    above = decode(dicom(DEEP[DEEP > 1500].reshape(1, -1)[:, :4096].reshape(64, 64).astype(np.int16) - 1000,
                         VOILUTSequence=[table]))  # fmt: skip
    assert above.std() > 0


@pytest.mark.parametrize("descriptor", [[4096, 0, 0], [4096, 0, 12], [4096]])
@pytest.mark.parametrize("sequence", ["VOILUTSequence", "ModalityLUTSequence"])
def test_a_table_that_makes_no_sense_is_no_reason_to_refuse_sound_pixels(sequence: str, descriptor: list[int]):
    table = Dataset()
    table.LUTDescriptor = descriptor
    table.LUTData = bytes(200)
    table["LUTData"].VR = "OW"
    assert np.array_equal(decode(dicom(DEEP, **{sequence: [table]})), AS_PNG)


def test_twelve_bits_of_lossy_jpeg_are_nearly_the_same():
    data = compressed(DEEP, "JPEGExtended12Bit", BitsStored=12, HighBit=11)
    assert apart(decode(data), AS_PNG) <= 2
    with pytest.raises(InvalidImage, match="cut off"):
        decode(data[: len(data) * 2 // 3])


def test_values_may_stand_in_the_upper_bits_as_in_old_files():
    assert np.array_equal(decode(dicom(DEEP << 4, BitsStored=12, HighBit=15)), AS_PNG)
    signed = DEEP.astype(np.int16) - 1000
    here, there = dicom(signed << 3, BitsStored=13, HighBit=15), dicom(signed, BitsStored=13, HighBit=12)
    assert np.array_equal(decode(here), decode(there))


def test_a_high_bit_that_is_wrong_darkens_nothing():
    dim = DEEP // 8
    assert np.array_equal(decode(dicom(dim, BitsStored=12, HighBit=15)), decode(dicom(dim)))
    packed = compressed(dim, "JPEG2000Lossless", BitsStored=12, HighBit=11)
    assert packed.count(b"\x28\0\x02\x01US\x02\0\x0b\0") == 1
    wrong = packed.replace(b"\x28\0\x02\x01US\x02\0\x0b\0", b"\x28\0\x02\x01US\x02\0\x0f\0")
    assert np.array_equal(decode(wrong), decode(dicom(dim)))


def test_real_numbers_have_no_bits():
    dataset = header(DEEP.astype(np.float32))
    dataset.FloatPixelData = dataset.PixelData
    for name in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
        del dataset[name]
    assert apart(decode(saved(dataset)), AS_PNG) <= 4


@pytest.mark.parametrize("high_bit", [11, 15])
def test_colours_of_12_bits_keep_their_levels(high_bit: int):
    colour = np.stack([DEEP] * 3, axis=-1) << high_bit - 11
    pixels = decode(dicom(colour, BitsStored=12, HighBit=high_bit))
    assert len(np.unique(pixels)) > 150
    assert pixels.max() > 240


def test_signed_values_keep_their_order():
    pixels = decode(dicom(DEEP.astype(np.int16) - 1000))
    assert apart(pixels, AS_PNG) <= 4


def test_the_middle_or_the_chosen_frame_is_read():
    frames = np.stack([np.full((40, 50), 10 * n, np.uint8) for n in range(1, 8)])
    data = dicom(frames)
    middle = read(data)
    assert (middle.frames, middle.frame, middle.pixels[0, 0]) == (7, 4, 40)
    assert [int(read(data, frame=n).pixels[0, 0]) for n in (1, 2, 7)] == [10, 20, 70]
    with pytest.raises(InvalidImage, match="frames 1 to 7"):
        read(data, frame=8)
    with pytest.raises(ImageTooLarge, match="at most 6"):
        read(data, limits=Limits(frames=6))


def test_frames_have_the_window_that_their_own_groups_name():
    groups = []
    for centre in (1000, 2000):
        window, group = Dataset(), Dataset()
        window.WindowCenter, window.WindowWidth = centre, 1000
        group.FrameVOILUTSequence = [window]
        groups.append(group)
    data = dicom(np.stack([DEEP, DEEP]), PerFrameFunctionalGroupsSequence=groups)
    for frame, centre in ((1, 1000), (2, 2000)):
        expected = decode(dicom(DEEP, WindowCenter=centre, WindowWidth=1000))
        assert np.array_equal(read(data, frame=frame).pixels, expected)


def test_pixels_that_are_higher_than_wide_are_made_square():
    found = read(dicom(GREY, PixelSpacing=[2.0, 1.0])).pixels
    assert found.shape == (192, 120)
    assert apart(found, np.asarray(Image.fromarray(GREY).resize((120, 192), Image.Resampling.BILINEAR))) == 0
    assert read(dicom(GREY, PixelSpacing=[1.0, 1000.0])).pixels.shape == GREY.shape


@pytest.mark.parametrize(
    ("said", "modality", "part", "why"),
    [
        ({"Modality": "MR"}, "MR", "", ""),
        ({"Modality": ""}, "", "", ""),
        ({"Modality": "CT"}, "CT", "", "modality CT, not MR"),
        ({"Modality": "US"}, "US", "", "modality US, not MR"),
        ({"Modality": "SMITH"}, "another modality", "", "another modality than MR"),
        ({"BodyPartExamined": "BRAIN"}, "MR", "", ""),
        ({"BodyPartExamined": "HEAD"}, "MR", "", ""),
        ({"BodyPartExamined": "JOHN SMITH"}, "MR", "", ""),
        ({"BodyPartExamined": "KNEE"}, "MR", "KNEE", r"another part of the body \(KNEE\)"),
        ({"BodyPartExamined": "c-spine"}, "MR", "CSPINE", "CSPINE"),
    ],
)
def test_modality_and_body_part_are_evidence_in_words_of_the_standard_only(said, modality, part, why):
    found = read(dicom(GREY, **said))
    assert (found.modality, found.body_part) == (modality, part)
    reason = objection(found)
    assert bool(reason) == bool(why)
    assert "SMITH" not in reason
    assert re.search(why, reason)


def test_a_file_without_an_image_is_refused():
    dataset = header(GREY)
    del dataset.PixelData
    with pytest.raises(InvalidImage, match="holds no image"):
        decode(saved(dataset))


def test_text_that_is_burned_into_the_pixels_is_refused():
    with pytest.raises(InvalidImage, match="who the patient is"):
        decode(dicom(GREY, BurnedInAnnotation="YES"))
    assert decode(dicom(GREY, BurnedInAnnotation="NO")).shape == GREY.shape


def nested(levels: int, *, defined: bool = False) -> bytes:
    """A DICOM file with sequences in sequences, written by hand: pydicom's own writer recurses."""
    file = dicom(GREY)
    start = 132 + 12 + struct.unpack_from("<L", file, 140)[0]
    sequence = struct.pack("<HH2sHL", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF)
    item = struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)
    ends = struct.pack("<HHL", 0xFFFE, 0xE00D, 0) + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    body = (sequence + item) * levels + ends * levels
    if defined:
        body = b""
        for _ in range(levels):
            body = struct.pack("<HHL", 0xFFFE, 0xE000, len(body)) + body
            body = struct.pack("<HH2sHL", 0x0008, 0x1140, b"SQ", 0, len(body)) + body
    first = file.index(struct.pack("<HH", 0x0008, 0x0060))  # Modality; tags ascend
    assert first > start
    return file[:first] + file[first : first + 10] + body + file[first + 10 :]


@pytest.mark.parametrize("defined", [True, False])
def test_sequences_may_be_nested_so_deep_and_no_deeper(defined: bool):
    assert decode(nested(16, defined=defined)).shape == GREY.shape
    for levels in (17, 200, 20_000 if defined else 200_000):
        with pytest.raises(InvalidImage, match="deeper than 16"):
            decode(nested(levels, defined=defined))


def test_a_deflated_bomb_is_refused_while_it_unpacks():
    dataset = header(np.zeros((3000, 3000), np.uint8))
    dataset.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    data = saved(dataset)
    assert len(data) < 100_000
    with pytest.raises(ImageTooLarge, match="1,000,000 bytes"):
        read(data, limits=Limits(unpacked=1_000_000))


@pytest.mark.parametrize(
    "tags",
    [
        {"Rows": 60_000, "Columns": 60_000},
        {"Rows": 0},
        {"Rows": 10},
        {"NumberOfFrames": 10_000_000},
        {"NumberOfFrames": -3},
        {"NumberOfFrames": 2},
        {"BitsAllocated": 7},
        {"SamplesPerPixel": 200},
        {"PhotometricInterpretation": "NONSENSE"},
        {"PixelData": b""},
    ],
    ids=str,
)
def test_a_header_that_contradicts_its_pixels_is_refused(tags):
    with pytest.raises(InvalidImage):
        decode(dicom(GREY, **tags))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_refused(share: float):
    data = compressed(DEEP, "JPEG2000Lossless") if share < 0.5 else dicom(DEEP)
    with pytest.raises(InvalidImage):
        decode(data[: int(len(data) * share)])


def test_errors_repeat_nothing_of_the_file():
    with pytest.raises(InvalidImage) as error:
        decode(dicom(GREY, PhotometricInterpretation="SMITH JOHN", PatientName="SMITH^JOHN", Rows=97))
    assert "SMITH" not in str(error.value)


def test_a_preamble_that_is_a_program_is_refused_and_one_of_a_tiff_is_not():
    data = dicom(GREY)
    with pytest.raises(InvalidImage, match="more than an image"):
        read(b"MZ\x90\x00" + data[4:])
    assert np.array_equal(decode(b"II*\0" + data[4:]), GREY)
