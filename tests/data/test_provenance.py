import csv
import io
import os

import numpy as np
import pytest
from PIL import Image

from neuroloop.adapters.folder import FolderStore
from neuroloop.core.schemas import ImageEntry
from neuroloop.data.provenance import licence_of, provenance_csv, recover_source
from neuroloop.data.source import ObjectSource
from neuroloop.imaging.decode import encode_png

from .drawn import picture


def jpeg(mode="L", **options):
    out = io.BytesIO()
    Image.fromarray(picture(1)).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("label", "name", "origin"),
    [
        ("glioma", "sim-000012.png", "phantom"),
        ("glioma", "gg (12).jpg", "sartaj"),
        ("meningioma", "m1(3).jpg", "sartaj"),
        ("pituitary", "p (7).JPG", "sartaj"),
        ("notumor", "no123.jpg", "br35h"),
    ],
)
def test_a_set_is_told_by_how_it_numbers_its_files_whatever_is_in_them(label, name, origin):
    assert recover_source(f"Training/{label}/{name}", label, b"anything") == origin


@pytest.mark.parametrize(
    ("label", "name"), [("glioma", "image (1).jpg"), ("glioma", "y12.jpg"), ("pituitary", "m (12).jpg")]
)
def test_a_name_that_anybody_may_give_names_no_set(label, name):
    assert recover_source(f"{label}/{name}", label, jpeg(quality=90)) == "jpeg-grey-q90"


def test_in_the_public_merge_grey_tumours_are_figshares_and_colour_ones_sartajs():
    assert recover_source("Training/glioma/Tr-gl_0500.jpg", "glioma", jpeg()) == "figshare"
    assert recover_source("Testing/pituitary/Te-piTr_0003.jpg", "pituitary", jpeg("RGB")) == "sartaj"
    assert recover_source("Training/glioma/Tr-gl_0500.jpg", "glioma", b"broken") == "unreadable"


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("Tr-noTr_0009.jpg", "sartaj"),
        ("Tr-no_0394.jpg", "sartaj"),
        ("Tr-no_0395.jpg", "br35h"),
        ("Te-no_0104.jpg", "sartaj"),
        ("Te-no_0105.jpg", "br35h"),
    ],
)
def test_in_the_public_merge_scans_without_a_tumour_are_numbered_set_by_set(name, origin):
    assert recover_source(f"x/notumor/{name}", "notumor", jpeg("RGB")) == origin


@pytest.mark.parametrize(
    ("data", "origin"),
    [
        (jpeg(quality=75), "jpeg-grey-q75"),
        (jpeg("RGB", quality=90), "jpeg-colour-420-q90"),
        (jpeg("RGB", quality=90, subsampling=0), "jpeg-colour-444-q90"),
        (jpeg(qtables=[[17] * 64]), "jpeg-grey-q?"),
        (encode_png(picture(1)), "png-grey"),
        (encode_png(np.stack([picture(1)] * 3, axis=-1)), "png-colour"),
        (b"no image", "unreadable"),
    ],
)
def test_files_that_no_rule_knows_are_told_apart_by_how_they_were_written(data, origin):
    assert recover_source("glioma/patient-7.img", "glioma", data) == origin


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ("", {"figshare": "", "br35h": ""}),
        ("CC0-1.0", {"figshare": "CC0-1.0", "br35h": "CC0-1.0"}),
        ("CC0-1.0, figshare=CC-BY-4.0", {"figshare": "CC-BY-4.0", "br35h": "CC0-1.0"}),
        ("figshare = CC-BY-4.0", {"figshare": "CC-BY-4.0", "br35h": ""}),
    ],
)
def test_a_licence_is_declared_for_all_images_or_by_origin(declared, expected):
    assert {origin: licence_of(origin, declared) for origin in expected} == expected


def test_the_provenance_table_has_a_line_for_each_image_as_the_source_spells_it():
    image = ImageEntry(
        path="Training/notumor/a, b.jpg",
        label="notumor",
        part="Training",
        md5="m",
        sha256="s",
        size=7,
        source_path="Training/No Tumor/a, b.jpg",
        licence="CC0-1.0",
        origin="br35h",
    )
    (row,) = csv.DictReader(io.StringIO(provenance_csv([image]).decode()))
    assert row == {
        "path": "Training/notumor/a, b.jpg",
        "label": "notumor",
        "source_path": "Training/No Tumor/a, b.jpg",
        "source_part": "Training",
        "origin": "br35h",
        "licence": "CC0-1.0",
        "sha256": "s",
        "md5": "m",
        "bytes": "7",
    }


def test_the_public_sets_sources_have_the_sizes_they_were_published_with():
    folder = os.environ.get("NEUROLOOP_REAL_DATA")
    if not folder:
        pytest.skip("NEUROLOOP_REAL_DATA names no folder of real scans")
    source = ObjectSource(folder, FolderStore(folder))
    found: dict[tuple[str, str], int] = {}
    for file in source.files():
        key = file.label, recover_source(file.path, file.label, source.read(file))
        found[key] = found.get(key, 0) + 1
    assert found == {
        ("glioma", "figshare"): 1426,
        ("glioma", "sartaj"): 195,
        ("meningioma", "figshare"): 708,
        ("meningioma", "sartaj"): 822 + 115,
        ("notumor", "sartaj"): 395 + 105,
        ("notumor", "br35h"): 1500 - 4,  # four files are absent from this edition
        ("pituitary", "figshare"): 930,
        ("pituitary", "sartaj"): 827,
    }
