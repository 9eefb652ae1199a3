"""Names, dates, places and comments in an upload reach neither store, database, logs nor answers."""

import logging
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from imaging.files import axial, dicom, header, picture, saved
from serving.running import Api, head, noise, serving

MARK = "Zaphod-Beeblebrox"
PLACE = (48.0, 8.0, 15.5)


def exif() -> Image.Exif:
    tags = Image.Exif()
    tags[0x010E] = tags[0x013B] = tags[0x8298] = tags[0x0132] = MARK  # description, artist, copyright, time
    tags.get_ifd(0x8769).update({0x9003: MARK, 0x9286: MARK.encode(), 0xA420: MARK})
    tags.get_ifd(0x8825).update({1: "N", 2: PLACE, 29: MARK})
    return tags


def xmp() -> bytes:
    return f"<x:xmpmeta xmlns:x='adobe:ns:meta/'><p name='{MARK}'/></x:xmpmeta>".encode()


def png(grey: np.ndarray) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", MARK)
    info.add_text("Comment", MARK, zip=True)
    info.add_itxt("XML:com.adobe.xmp", xmp().decode())
    return picture(grey, "PNG", pnginfo=info, exif=exif())


def tiff(grey: np.ndarray) -> bytes:
    more = {270: MARK, 305: MARK, 306: MARK, 315: MARK, 33432: MARK, 65000: MARK}
    return picture(grey, "TIFF", tiffinfo=more)


def dicom_of(grey: np.ndarray) -> bytes:
    dataset = header(
        grey,
        PatientName=MARK,
        PatientID=MARK,
        PatientBirthDate="19790312",
        InstitutionName=MARK,
        InstitutionAddress=MARK,
        ReferringPhysicianName=MARK,
        StudyDescription=MARK,
        SeriesDescription=MARK,
        ProtocolName=MARK,
        ImageComments=MARK,
        StationName=MARK[:16],
        BodyPartExamined=MARK[:16],
        WindowCenterWidthExplanation=MARK,
    )
    dataset.private_block(0x0099, MARK, create=True).add_new(1, "LO", MARK)
    dataset.file_meta.SourceApplicationEntityTitle = MARK[:16]
    data = bytearray(saved(dataset))
    data[: len(MARK)] = MARK.encode()  # the preamble, too, has room for a name
    return bytes(data)


def nifti_of(grey: np.ndarray) -> bytes:
    image = nibabel.Nifti1Image(axial(grey), np.eye(4))
    image.header["descrip"], image.header["aux_file"], image.header["intent_name"] = MARK, MARK, MARK[:15]
    image.header["db_name"] = MARK
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", MARK.encode() * 4))
    return image.to_bytes()


def gzipped(grey: np.ndarray) -> bytes:
    import gzip
    import io

    out = io.BytesIO()
    with gzip.GzipFile(MARK, "wb", fileobj=out) as file:
        file.write(nifti_of(grey))
    return out.getvalue()


CARRIERS: dict[str, Callable[[np.ndarray], bytes]] = {
    "jpeg": lambda grey: picture(grey, "JPEG", exif=exif(), xmp=xmp(), comment=MARK.encode(), quality=95),
    "jpeg, progressive": lambda grey: picture(grey, "JPEG", exif=exif(), comment=MARK.encode(), progressive=True),
    "png": png,
    "webp": lambda grey: picture(grey, "WEBP", exif=exif(), xmp=xmp(), lossless=True),
    "tiff": tiff,
    "dicom": dicom_of,
    "nifti": nifti_of,
    "nifti, zipped": gzipped,
}


def marked(text: bytes) -> bool:
    return any(MARK[:12].lower().encode(code) in text.lower() for code in ("ascii", "utf-16-le", "utf-16-be"))


def test_every_carrier_does_carry_the_mark():
    for kind, make in CARRIERS.items():
        assert marked(make(head("glioma"))), kind


def test_no_mark_gets_beyond_the_reader(services, champion, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd):
    whole = [
        (make(grey), status) for make in CARRIERS.values() for grey, status in ((head("glioma"), 201), (noise(), 422))
    ]
    refused = dicom(head("glioma"), Modality=MARK[:16], PatientName=MARK)
    senseless = dicom(head("glioma"), PhotometricInterpretation=MARK[:16])
    capfd.readouterr()
    caplog.clear()  # making such files is no quiet business
    caplog.set_level(logging.DEBUG)
    answers: list[str] = []
    with serving(services) as api:
        for data, status in whole:
            answers.append(_kept(api, data, status))
            for broken in (data[: len(data) * 2 // 3], data[: len(data) // 2] + bytes(200)):
                answers.append(_kept(api, broken, None))
        answers += [_kept(api, refused, 422), _kept(api, senseless, 400)]
        prediction = api.upload(whole[10][0]).json()["id"]
        assert api.feedback(prediction, "correct", "pituitary").status_code == 200
        answers.append(api.client.get(f"/v1/predictions/{prediction}").text)
        rows = api.rows()
        stored = api.stored()
        metrics = api.client.get("/metrics").text
    assert len(stored) >= 2 * len(CARRIERS) + 3
    assert len(rows) >= len(stored)
    for key in stored:
        assert not marked(services.store.get(key))
        assert not marked(key.encode())
        assert Image.open(_path(services, key)).info == {}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if marked(path.read_bytes()) or marked(str(path).encode())]
    printed = capfd.readouterr()
    for text in (*answers, *rows, metrics, caplog.text, printed.out, printed.err):
        assert not marked(text.encode()), text[:500]
    assert "/v1/predictions" in caplog.text


def _kept(api: Api, data: bytes, status: int | None) -> str:
    """Upload under a name that is a mark as well; headers and body of the answer."""
    response = api.upload(data, f"{MARK}.dcm")
    assert response.status_code == status or (status is None and 400 <= response.status_code < 500), response.text
    return f"{response.headers} {response.text}"


def _path(services, key: str) -> Path:
    return Path(services.settings.store.removeprefix("file://")) / key
