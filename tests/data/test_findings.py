import numpy as np
import pytest

from neuroloop.core.errors import InvalidSource
from neuroloop.core.schemas import Quarantined
from neuroloop.core.settings import AUDIT_FINDINGS
from neuroloop.data.audit import audit
from neuroloop.data.findings import GRADES, findings, refuse
from neuroloop.data.shortcuts import Shortcuts
from neuroloop.imaging.decode import encode_png

from .drawn import ct, four_classes, picture, snapshot_of


@pytest.fixture(scope="module")
def faulty():
    """One of every fault, in a source with two parts."""
    files = {f"Training/{path}": data for path, data in four_classes(30).items()}
    files |= {f"Testing/{path}": encode_png(np.flipud(picture(90_000 + n))) for n, path in enumerate(four_classes(10))}
    files["Testing/glioma/leak.png"] = files["Training/glioma/000.png"]
    files["Testing/notumor/ct.png"] = encode_png(ct())
    files["Testing/pituitary/conflict.png"] = encode_png(np.rot90(picture(3)))
    mixed = np.clip(picture(5).astype(float) + 0.25 * picture(6), 0, 255).astype(np.uint8)
    files["Training/meningioma/mixed.png"] = encode_png(mixed)
    files["Training/glioma/text.jpg"] = b"no image"
    files["Training/glioma/tiny.png"] = encode_png(picture(1, 20))
    files["Training/glioma/blank.png"] = encode_png(np.full((64, 64), 9, np.uint8))
    return audit(snapshot_of(files), lambda entry: files[entry.path])


IMAGES = {"source": (800, 200), "grouped": (800, 200)}
SHORTCUTS = Shortcuts(
    source={"majority": 0.3, "border": 0.9}, grouped={"majority": 0.3, "border": 0.8}, images=IMAGES, sampled=False
)


def test_every_kind_of_fault_is_a_finding_that_says_what_why_and_how_to_mend_it(faulty):
    between = Quarantined(path=min(faulty.groups), reason="similar to images of both test and train")
    faulty = faulty.model_copy(update={"quarantined": (*faulty.quarantined, between)})
    found = findings(faulty, SHORTCUTS, {".dcm files": 3})
    assert {finding.name for finding in found} == set(AUDIT_FINDINGS)
    assert all(finding.what and finding.why and finding.fix for finding in found)
    counts = {finding.name: finding.images for finding in found}
    assert counts["source_leak"] == 2  # the copy, and the picture that stands under another class in the other part
    assert counts["label_conflicts"] == 2
    assert (counts["unreadable"], counts["tiny"], counts["blank"], counts["wrong_modality"]) == (1, 1, 1, 1)
    assert (counts["ignored"], counts["between_parts"]) == (3, 1)


def test_a_label_conflict_is_not_said_to_be_a_wrong_label_where_it_may_be_a_neighbouring_slice(faulty):
    (found,) = (each for each in findings(faulty) if each.name == "label_conflicts")
    assert "or neighbouring slices" in found.what
    assert "slice by slice both may be right" in found.fix
    assert any("or a neighbouring slice, stands as glioma in" in each.reason for each in faulty.quarantined)


def test_the_gravest_findings_come_first(faulty):
    grades = [GRADES.index(finding.grade) for finding in findings(faulty, SHORTCUTS)]
    assert grades == sorted(grades)
    assert findings(faulty)[0].name == "source_leak"
    assert findings(faulty)[0].what.startswith("4.7% of Testing (2 of 43 images)")


def test_a_clean_set_has_no_findings():
    files = four_classes(5)
    assert findings(audit(snapshot_of(files), lambda entry: files[entry.path])) == ()


def test_a_build_goes_on_unless_the_settings_name_what_was_found(faulty):
    found = findings(faulty, SHORTCUTS)
    refuse(found)
    refuse([finding for finding in found if finding.name != "tiny"], ["tiny"])
    with pytest.raises(
        InvalidSource, match=r"2 images show one picture.*NEUROLOOP_AUDIT_STOP_ON names label_conflicts"
    ):
        refuse(found, ["label_conflicts"])
    with pytest.raises(InvalidSource, match="border"):
        refuse(found, ["shortcuts"])


def test_a_class_that_is_mostly_unusable_always_stops_and_names_its_files():
    files = four_classes(10)
    for number in range(3):
        files[f"pituitary/{number:03d}.png"] = b"broken"
    found = findings(audit(snapshot_of(files), lambda entry: files[entry.path]))
    with pytest.raises(InvalidSource, match=r"3 of 10 pituitary images cannot be used.*20%.*pituitary/000\.png"):
        refuse(found)


def test_a_shortcut_is_quoted_on_the_split_that_it_tells_most_on(faulty):
    measured = Shortcuts(
        source={"majority": 0.3, "border": 0.3, "nearest": 0.9},
        grouped={"majority": 0.25, "border": 0.75, "nearest": 0.3},
        images=IMAGES,
        sampled=False,
    )
    (found,) = (each for each in findings(faulty, measured) if each.name == "shortcuts")
    assert "nearest 90.0% on the source's split, border 75.0% on the grouped split" in found.what
    assert "the largest class of those tested on: 30.0% on the source's and 25.0% on the grouped" in found.what
