"""Files of every format that is read, made of given pixels."""

import gzip
import io
from typing import Any

import gdcm
import nibabel
import numpy as np
import pydicom
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"


def picture(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    """A Pillow image, or pixels, as a file of this kind."""
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


def header(values: np.ndarray, **tags: Any) -> Dataset:
    """A DICOM data set of grey values (H, W) or frames (n, H, W), or colour (H, W, 3); further tags by keyword."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = MR_IMAGE
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = uid.generate_uid()
    colour = values.ndim == 3 and values.shape[-1] == 3
    dataset.Modality = "MR"
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        dataset.PlanarConfiguration = 0
    if values.ndim == 3 and not colour:
        dataset.NumberOfFrames = len(values)
    dataset.Rows, dataset.Columns = values.shape[:2] if colour else values.shape[-2:]
    dataset.BitsAllocated = dataset.BitsStored = values.dtype.itemsize * 8
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(values.dtype.kind == "i")
    dataset.PixelData = values.tobytes() + b"\0" * (values.nbytes % 2)
    dataset["PixelData"].VR = "OB" if values.dtype.itemsize == 1 else "OW"
    for name, value in tags.items():
        setattr(dataset, name, value)
    return dataset


def saved(dataset: Dataset) -> bytes:
    """A data set as the bytes of a DICOM file, in the transfer syntax that it names."""
    out = io.BytesIO()
    pydicom.dcmwrite(out, dataset, enforce_file_format=True)
    return out.getvalue()


def dicom(values: np.ndarray, **tags: Any) -> bytes:
    """An uncompressed DICOM file, see `header`."""
    return saved(header(values, **tags))


def compressed(values: np.ndarray, syntax: str, **tags: Any) -> bytes:
    """A DICOM file of one grey frame in a compressed transfer syntax, by its name in `pydicom.uid`."""
    target = getattr(uid, syntax)
    dataset = header(values, **tags)
    if syntax == "JPEGBaseline8Bit":
        dataset.PixelData = encapsulate([picture(values, "JPEG", quality=95)])
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = target
        return saved(dataset)
    if syntax in ("RLELossless", "JPEG2000Lossless"):
        dataset.compress(target)
        return saved(dataset)
    if syntax in ("DeflatedExplicitVRLittleEndian", "ImplicitVRLittleEndian"):
        dataset.file_meta.TransferSyntaxUID = target
        return saved(dataset)
    return _by_gdcm(saved(dataset), target)


def nifti(values: np.ndarray, affine: np.ndarray | None = None, *, zipped: bool = False, version: int = 1) -> bytes:
    """A NIfTI file of voxels as they lie in the file."""
    image = (nibabel.Nifti2Image if version == 2 else nibabel.Nifti1Image)(
        values, np.eye(4) if affine is None else affine
    )
    data = image.to_bytes()
    return gzip.compress(data, 1) if zipped else data


def axial(pixels: np.ndarray) -> np.ndarray:
    """The voxels (right, front, up) whose one axial slice looks like these pixels to a radiologist."""
    return np.ascontiguousarray(pixels.T[::-1, ::-1, None])


def _by_gdcm(data: bytes, target: str) -> bytes:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "a.dcm"), Path(folder, "b.dcm")
        source.write_bytes(data)
        reader = gdcm.ImageReader()
        reader.SetFileName(str(source))
        assert reader.Read()
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(target))))
        change.SetInput(reader.GetImage())
        assert change.Change(), target
        writer = gdcm.ImageWriter()
        writer.SetFileName(str(result))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        return result.read_bytes()
