"""Every format through HTTP: the same answer in another coding, frames to choose from, and what a header declares."""

from collections.abc import Callable

import cv2
import numpy as np
import pytest
from PIL import Image

from imaging.files import axial, compressed, dicom, nifti, picture
from neuroloop.core import keys
from neuroloop.core.schemas import LABELS
from serving.running import Api, head

DEEP = 16
"""What an 8-bit image is multiplied by to have 12 bits."""


def deep(grey: np.ndarray) -> np.ndarray:
    return grey.astype(np.uint16) * DEEP


def colour(grey: np.ndarray) -> Image.Image:
    return Image.fromarray(grey).convert("RGB")


def turned(grey: np.ndarray) -> bytes:
    """Stored on its side, with the EXIF tag that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(np.rot90(grey), "JPEG", exif=exif, quality=95)


CODINGS: dict[str, Callable[[np.ndarray], bytes]] = {
    "jpeg": lambda grey: picture(grey, "JPEG", quality=90),
    "jpeg, progressive": lambda grey: picture(grey, "JPEG", quality=90, progressive=True),
    "jpeg, colour": lambda grey: picture(colour(grey), "JPEG", quality=90),
    "jpeg, cmyk": lambda grey: picture(colour(grey).convert("CMYK"), "JPEG", quality=95),
    "jpeg, turned by exif": turned,
    "png, palette": lambda grey: picture(Image.fromarray(grey).convert("P"), "PNG"),
    "png, alpha": lambda grey: picture(colour(grey).convert("RGBA"), "PNG"),
    "png, 16 bit": lambda grey: picture(deep(grey) * 16, "PNG"),
    "png, 12 of 16 bit": lambda grey: picture(deep(grey), "PNG"),
    "png, 16 bit colour": lambda grey: cv2.imencode(".png", np.stack([deep(grey) * 16] * 3, axis=-1))[1].tobytes(),
    "bmp": lambda grey: picture(colour(grey), "BMP"),
    "webp": lambda grey: picture(colour(grey), "WEBP", quality=90),
    "webp, lossless": lambda grey: picture(colour(grey), "WEBP", lossless=True),
    "tiff": lambda grey: picture(grey, "TIFF"),
    "tiff, lzw": lambda grey: picture(colour(grey), "TIFF", compression="tiff_lzw"),
    "tiff, jpeg": lambda grey: picture(grey, "TIFF", compression="jpeg"),
    "tiff, 16 bit": lambda grey: picture(deep(grey), "TIFF"),
    "tiff, fractions": lambda grey: picture(grey.astype(np.float32) / 255, "TIFF"),
    "dicom": lambda grey: dicom(grey),
    "dicom, 12 bit": lambda grey: dicom(deep(grey), BitsStored=12, HighBit=11),
    "dicom, monochrome1": lambda grey: dicom(255 - grey, PhotometricInterpretation="MONOCHROME1"),
    "dicom, window": lambda grey: dicom(
        deep(grey), RescaleSlope=0.5, RescaleIntercept=-10, WindowCenter=1010, WindowWidth=2040
    ),
    "dicom, jpeg": lambda grey: compressed(grey, "JPEGBaseline8Bit"),
    **{
        f"dicom, {syntax}": lambda grey, syntax=syntax: compressed(deep(grey), syntax, BitsStored=12, HighBit=11)
        for syntax in (
            *("JPEGLosslessSV1", "JPEGLSLossless", "JPEG2000Lossless", "RLELossless"),
            "DeflatedExplicitVRLittleEndian",
        )
    },
    "nifti": lambda grey: nifti(axial(grey)),
    "nifti, zipped": lambda grey: nifti(axial(deep(grey).astype(np.int16)), zipped=True),
    "nifti, fractions": lambda grey: nifti(axial(grey.astype(np.float32) / 255), zipped=True, version=2),
}


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("label", ["glioma", "pituitary"])
def test_the_same_image_in_another_coding_gets_the_same_answer(api: Api, label: str, coding: str):
    plain, other = api.predict(head(label)), api.upload(CODINGS[coding](head(label)))
    assert other.status_code == 201, other.text
    one, two = plain.json(), other.json()
    assert two["label"] == one["label"] == label
    assert max(abs(one["probabilities"][name] - two["probabilities"][name]) for name in LABELS) <= 0.05
    assert (two["width"], two["height"], two["frames"], two["frame"]) == (240, 200, 1, 1)
    stored = api.client.get(f"/v1/predictions/{two['id']}/image")
    assert stored.headers["content-type"] == "image/png"
    assert stored.content.startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["dicom", "nifti", "tiff"])
def test_of_many_frames_the_middle_or_the_chosen_one_is_classified(api: Api, kind: str):
    frames = [head(label) for label in LABELS]
    pages = [Image.fromarray(frame) for frame in frames]
    data = {
        "dicom": dicom(np.stack(frames)),
        "nifti": nifti(np.concatenate([axial(frame) for frame in frames], axis=2), np.diag([1, 1, 5, 1])),
        "tiff": picture(pages[0], "TIFF", save_all=True, append_images=pages[1:]),
    }[kind]
    middle = api.upload(data).json()
    assert (middle["label"], middle["frames"], middle["frame"]) == (LABELS[1], 4, 2)
    for number, label in enumerate(LABELS, 1):
        answer = api.upload(data, frame=number).json()
        assert (answer["label"], answer["frames"], answer["frame"]) == (label, 4, number)
    problem = api.upload(data, frame=5)
    assert (problem.status_code, "frames 1 to 4" in problem.json()["detail"]) == (400, True)
    assert api.upload(data, frame=0).status_code == 422


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])  # read by the server itself, and by the decoding worker
def test_a_picture_in_colour_is_a_rejection_that_a_reader_can_contest(api: Api, kind: str):
    image = Image.fromarray((head("glioma")[..., None] * np.array([1.0, 0.4, 0.1])).astype(np.uint8))
    refused = api.upload(picture(image, kind))
    problem = refused.json()
    assert (refused.status_code, problem["type"]) == (422, "urn:neuroloop:problem:not-a-brain-mri")
    assert "in colour (100 % of what is lit)" in problem["detail"]
    assert api.feedback(problem["id"], "brain_mri").status_code == 200
    assert api.upload(picture(image.convert("L"), kind)).status_code == 201


@pytest.mark.parametrize("content_type", ["application/dicom", "application/octet-stream", "image/dicom-rle"])
def test_a_bare_body_is_read_whatever_image_its_type_says(api: Api, content_type: str):
    response = api.client.post("/v1/predictions", content=dicom(head("glioma")), headers={"Content-Type": content_type})
    assert (response.status_code, response.json()["label"]) == (201, "glioma")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"Modality": "CT"}, "modality CT, not MR"),
        ({"Modality": "SMITH^JOHN"[:16]}, "another modality than MR"),
        ({"BodyPartExamined": "KNEE"}, "another part of the body (KNEE)"),
    ],
)
def test_a_header_that_says_no_brain_mri_is_a_rejection_and_recorded_like_the_gates(api: Api, said, words):
    refused = api.upload(dicom(head("glioma"), **said))
    problem = refused.json()
    assert (refused.status_code, problem["type"]) == (422, "urn:neuroloop:problem:not-a-brain-mri")
    assert words in problem["detail"]
    assert (problem["gate"]["accepted"], problem["gate"]["score"]) == (False, 0)
    assert (problem["frames"], problem["frame"]) == (1, 1)
    row = api.client.get(f"/v1/predictions/{problem['id']}").json()
    assert (row["label"], row["probabilities"], row["object_key"]) == (None, {}, keys.invalid(problem["id"]))
    assert words in row["gate"]["reason"]
    assert api.feedback(problem["id"], "correct", "glioma").status_code == 200
    assert api.upload(dicom(head("glioma"), Modality="MR", BodyPartExamined="BRAIN")).status_code == 201
