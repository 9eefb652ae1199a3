"""The Data page: the audit of the data behind the serving model."""

import pytest

from data.drawn import four_classes, snapshot_of
from frontend.reading import labels, words
from neuroloop.core import keys
from neuroloop.data import audit_report
from neuroloop.data.audit import audit


@pytest.fixture
def audited(live_api):
    """The API's store with a real report of a small set with a leak; gone again after the test."""
    files = {f"Training/{path}": data for path, data in four_classes(4).items()}
    files["Testing/glioma/copy.png"] = files["Training/glioma/000.png"]
    snapshot = snapshot_of(files)
    found = audit(snapshot, lambda entry: files[entry.path])
    page = audit_report.to_html(found, (), source="drawn", images=snapshot.images, read=lambda entry: files[entry.path])
    version = live_api.client.get("/v1/model").json()["data_version"]
    store = live_api.services.store
    store.put(keys.audit_page(version), page)
    yield live_api
    store.delete(keys.audit_page(version))


def test_the_page_shows_the_whole_report_in_a_frame_and_to_download(open_page, audited):
    app = open_page("data", audited)
    frame = app.get("iframe")[0].proto
    assert "of the held-out images leak" in frame.srcdoc
    assert 'data-theme="light"' in frame.srcdoc
    assert "default-src 'none'" in frame.srcdoc
    assert app.get("download_button")[0].proto.label == "Download this report"


def test_what_was_audited_last_is_one_click_away(open_page, audited):
    store = audited.services.store
    store.put(keys.audit_page("stopped"), b"<!doctype html><html ><p>this one leaks badly</p></html>")
    store.put(keys.LATEST_AUDIT, b"stopped")
    app = open_page("data", audited)
    app.get("button_group")[0].set_value("Audited last").run()
    assert "this one leaks badly" in app.get("iframe")[0].proto.srcdoc
    store.delete(keys.LATEST_AUDIT)
    app.run()
    assert "No audit yet" in words(app)


def test_a_model_whose_data_was_never_audited_has_an_empty_state(open_page, live_api):
    app = open_page("data", live_api)
    assert "No audit yet" in words(app)
    assert "Build the model again" in words(app)


def test_without_the_api_the_page_says_what_is_wrong_and_offers_to_try_again(open_page):
    app = open_page("data")
    assert "The inference service cannot be reached" in words(app)
    assert "Try again" in labels(app)
