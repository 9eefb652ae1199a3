import html.parser
import json

import numpy as np
import pytest

from neuroloop.data import audit_report, shortcuts
from neuroloop.data.audit import judge, look, own_split
from neuroloop.data.findings import findings
from neuroloop.imaging.decode import encode_png

from .drawn import ct, four_classes, picture, snapshot_of

EVIL = "\"><script>alert(1)<script> & '{{ 7*7 }}.png"


class Page(html.parser.HTMLParser):
    """What a browser would see: tags, addresses, and the text between."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attributes)

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def reported():
    """A set with everything in it: its audit, findings, shortcuts, files."""
    files = {f"Training/{path}": data for path, data in four_classes(20).items()}
    files |= {f"Testing/{path}": encode_png(picture(90_000 + n)) for n, path in enumerate(four_classes(5))}
    files["Testing/glioma/" + EVIL] = files["Training/glioma/000.png"]
    files["Testing/glioma/mirror.png"] = encode_png(np.ascontiguousarray(picture(1)[:, ::-1]))
    files["Testing/notumor/ct.png"] = encode_png(ct())
    files["Training/pituitary/conflict.png"] = encode_png(np.rot90(picture(3)))
    files["Training/glioma/text.jpg"] = b"no image"
    files["Training/glioma/tiny.png"] = encode_png(picture(1, 20))
    files["Training/glioma/blank.png"] = encode_png(np.full((64, 64), 9, np.uint8))
    snapshot = snapshot_of(files)
    looks = look(snapshot.images, lambda entry: files[entry.path])
    audit = judge(snapshot, looks)
    measured = shortcuts.measure(
        looks.traits,
        looks.thumbnails,
        [entry.label for entry in looks.images],
        {"source": own_split(audit, looks)},
        generator=np.random.default_rng(0),
    )
    return audit, findings(audit, measured), measured, snapshot, files


def page_of(reported, **options):
    audit, found, measured, snapshot, files = reported
    return audit_report.to_html(
        audit,
        found,
        measured,
        source="drawn & <b>bold</b>",
        images=snapshot.images,
        read=lambda entry: files[entry.path],
        **options,
    ).decode()


def test_the_json_has_every_figure_and_says_what_each_means(reported):
    audit, found, measured, snapshot, _ = reported
    report = json.loads(audit_report.to_json(audit_report.document(audit, found, measured, source="here")))
    assert report["images"] == len(snapshot.images)
    assert report["unreadable"] == ["Training/glioma/text.jpg"]
    assert report["tiny"] == ["Training/glioma/tiny.png"]
    assert report["blank"] == ["Training/glioma/blank.png"]
    assert report["wrong_modality"] == ["Testing/notumor/ct.png"]
    assert report["label_conflicts"] == [["Training/glioma/003.png", "Training/pituitary/conflict.png"]]
    assert (report["identical_across_parts"], report["twins_across_parts"]) == (1, 2)
    assert report["leak_rate"] == pytest.approx(2 / 23, abs=1e-4)
    assert report["groups"] == len(set(report["group_of"].values()))
    assert report["groups_of_all_readable"] == report["groups"] + 2  # the conflict, and the CT
    assert len(report["quarantined"]) == 6
    assert set(report["shortcuts"]) == set(shortcuts.TRAITS)
    assert report["shortcuts"]["border"]["grouped"] is None
    assert report["shortcuts_images"] == {"source": [81, 23]}
    assert report["shortcuts_left_out"] == []
    assert 0 <= report["shortcuts"]["border"]["source"] <= 1
    assert [part["name"] for part in report["parts"] if part["held_out"]] == ["Testing"]
    assert {"images", "groups", "twins_across_parts", "shortcuts"} <= set(report["definitions"])
    assert set(report["definitions"]) <= set(report)


def test_the_page_is_whole_in_itself_and_runs_nothing(reported):
    page = Page(page_of(reported))
    assert page.addresses
    assert all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "form"} & set(page.tags)
    assert "url(" not in page_of(reported)
    assert "default-src 'none'" in page_of(reported)


def test_names_from_outside_are_shown_letter_by_letter(reported):
    page = Page(page_of(reported, note="Simulated <scans>"))
    assert "<script>alert(1)<script> & '{{ 7*7 }}.png" in page.text
    assert "drawn & <b>bold</b>" in page.text
    assert "Simulated <scans>" in page.text
    assert "b" in page.tags  # ours


def test_the_page_tells_the_leak_first_then_findings_pictures_and_shortcuts(reported):
    text = " ".join(Page(page_of(reported)).text.split())
    places = [
        text.index(words)
        for words in (
            "8.7 % of the held-out images leak: 2 of 23 in Testing",
            "Findings",
            "The source's own parts",
            "byte for byte the same",
            "One picture, two classes",
            "CT among MRI",
            "Shortcuts",
            "The largest groups",
            "All of them with their reasons",
        )
    ]
    assert places == sorted(places)
    assert "mirrored r = 1.000" in text


@pytest.mark.parametrize(("copies", "says"), [(1, "On these, a score is memory."), (5, "mostly memory")])
def test_how_much_of_a_score_is_memory_is_said_by_the_rate(copies, says):
    training = four_classes(5)
    files = {f"Training/{path}": data for path, data in training.items()}
    files |= {f"Testing/glioma/{n}.png": encode_png(picture(80_000 + n)) for n in range(5)}
    files |= {f"Testing/glioma/copy {n}.png": files[f"Training/glioma/00{n}.png"] for n in range(copies)}
    snapshot = snapshot_of(files)
    audit = judge(snapshot, look(snapshot.images, lambda entry: files[entry.path]))
    page = audit_report.to_html(
        audit, (), source="here", images=snapshot.images, read=lambda entry: files[entry.path]
    ).decode()
    assert says in page
    assert page.count("memory") == 1


def test_a_clean_set_without_parts_has_a_page_too():
    files = four_classes(5)
    snapshot = snapshot_of(files)
    audit = judge(snapshot, look(snapshot.images, lambda entry: files[entry.path]))
    page = audit_report.to_html(
        audit, findings(audit), source="clean", images=snapshot.images, read=lambda entry: files[entry.path]
    )
    text = Page(page.decode()).text
    assert "groups of unlike pictures among 20 images" in text
    assert "Nothing was found." in text
    assert audit_report.document(audit, ())["shortcuts"] == {}
