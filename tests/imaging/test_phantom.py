import subprocess
import sys
from hashlib import sha256
from itertools import chain

import numpy as np
import pytest

from neuroloop.core.errors import NeuroLoopError
from neuroloop.core.schemas import LABELS
from neuroloop.imaging.canonical import canonicalize
from neuroloop.imaging.phantom import PLANES, SCANNERS, scan

EACH = 12


@pytest.fixture(scope="module")
def scans():
    return {
        (s, label): [scan(label, i, scanner=s, size=160) for i in range(EACH)] for s in SCANNERS for label in LABELS
    }


def test_a_scan_is_grey_bytes_of_the_asked_size_and_names_itself():
    one = scan("glioma", 0, size=96)
    assert one.pixels.shape == one.lesion.shape == (96, 96)
    assert one.pixels.dtype == np.uint8
    assert one.lesion.dtype == np.bool_
    assert (one.label, one.scanner) == ("glioma", "A")
    assert one.plane in PLANES
    assert one.contrast in SCANNERS["A"].contrasts


def test_the_same_arguments_give_the_same_scan_in_another_process():
    code = (
        "from hashlib import sha256; from neuroloop.imaging.phantom import scan;"
        "print(sha256(scan('meningioma', 7, seed=3, scanner='B', size=128).pixels.tobytes()).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    here = scan("meningioma", 7, seed=3, scanner="B", size=128).pixels
    assert sha256(here.tobytes()).hexdigest() == there


def test_label_index_seed_and_scanner_each_change_the_scan():
    arguments = [("glioma", 0, 0, "A"), ("pituitary", 0, 0, "A"), ("glioma", 1, 0, "A"), ("glioma", 0, 1, "A")]
    arguments.append(("glioma", 0, 0, "B"))
    seen = {scan(label, i, seed=s, scanner=m, size=96).pixels.tobytes() for label, i, s, m in arguments}
    assert len(seen) == len(arguments)


def test_every_tumour_shows_in_its_slice_and_health_shows_none(scans):
    for (_, label), group in scans.items():
        areas = [one.lesion.sum() for one in group]
        if label == "notumor":
            assert max(areas) == 0
        else:
            assert min(areas) > 15
            assert max(areas) < 0.1 * 160 * 160


def test_tumours_are_bright_on_scanner_a_and_mostly_dark_on_scanner_b(scans):
    def bright(scanner):
        higher = []
        for label in ("meningioma", "pituitary"):
            for one in scans[scanner, label]:
                rest = one.pixels[(one.pixels > 40) & ~one.lesion]
                higher.append(one.pixels[one.lesion].mean() > rest.mean())
        return np.mean(higher)

    assert bright("A") > 0.9
    assert bright("B") < 0.65


def test_pituitary_tumours_lie_near_the_midline(scans):
    for one in scans["A", "pituitary"]:
        if one.plane != "sagittal":
            columns = np.flatnonzero(one.lesion.any(axis=0))
            head = np.flatnonzero((one.pixels > 60).sum(axis=0) > 5)
            assert abs(columns.mean() - head.mean()) < 0.16 * (head[-1] - head[0])


def test_plane_and_contrast_do_not_tell_the_class():
    small = {label: [scan(label, i, size=32) for i in range(90)] for label in ("notumor", "pituitary")}
    for name in ("plane", "contrast"):
        values = sorted({getattr(one, name) for group in small.values() for one in group})
        assert len(values) == 3
        for value in values:
            shares = [np.mean([getattr(one, name) == value for one in group]) for group in small.values()]
            assert abs(shares[0] - shares[1]) < 0.22


def test_scans_are_no_twins_of_one_another(scans):
    """The audit groups images whose 32 px thumbnails correlate by 0.95; simulated heads must stay apart."""
    blocks = [one.pixels.reshape(32, 5, 32, 5).mean(axis=(1, 3)).ravel() for one in chain.from_iterable(scans.values())]
    correlation = np.corrcoef(np.array(blocks))
    np.fill_diagonal(correlation, 0)
    assert (correlation >= 0.95).any(axis=1).mean() < 0.05


def test_the_head_is_found_in_every_scan(scans):
    for one in chain.from_iterable(scans.values()):
        assert 0.25 < (canonicalize(one.pixels, 64) > 0).mean() < 0.95


def test_few_pixels_saturate(scans):
    assert np.mean([(one.pixels == 255).mean() for one in chain.from_iterable(scans.values())]) < 0.02


@pytest.mark.parametrize(("label", "scanner"), [("cyst", "A"), ("glioma", "Z")])
def test_an_unknown_class_or_scanner_is_named(label, scanner):
    with pytest.raises(NeuroLoopError, match="glioma, meningioma, notumor, pituitary, scanners A, B"):
        scan(label, 0, scanner=scanner)
