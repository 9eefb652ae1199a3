"""A reader in a real browser: upload, read, correct, and see the count of corrections rise."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2
import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright
from playwright.sync_api import TimeoutError as PlaywrightTimeout

from neuroloop.adapters.mlflow_registry import MlflowRegistry
from neuroloop.imaging import phantom
from neuroloop.imaging.decode import encode_png
from serving.running import Api, wait

ROOT = Path(__file__).parents[2]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

PASSWORD = "for the browser test"

pytestmark = pytest.mark.e2e


@pytest.fixture
def frontend_url(live_api, tmp_path: Path, free_port) -> Iterator[str]:
    """A real Streamlit server in a process of its own, in front of the live API."""
    port = free_port()
    log = tmp_path / "frontend.log"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("NEUROLOOP_")} | {
        "PYTHONPATH": str(ROOT / "src"),
        "NEUROLOOP_HOME": str(tmp_path),
        "NEUROLOOP_ENV_FILE": str(tmp_path / "none"),
        "NEUROLOOP_API_URL": f"http://127.0.0.1:{live_api.port}",
        "NEUROLOOP_UI_API_KEY": live_api.key,
        "NEUROLOOP_UI_PASSWORD": PASSWORD,
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "streamlit", "run", "frontend/server.py", "--server.port", str(port)],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=output,
        )

    def healthy() -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=2).status == 200
        except OSError:
            return False

    try:
        deadline = time.monotonic() + 60
        while not healthy():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def page() -> Iterator[Page]:
    """A tab of Debian's Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.fail("the browser test needs Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(60_000)
        yield tab
        browser.close()


def waiting(page: Page, frontend_url: str) -> int:
    """The corrections waiting, as Monitoring shows them."""
    page.goto(f"{frontend_url}/monitoring")
    shown = page.locator(".st-key-card-waiting").get_by_text(re.compile(r"^\d+ of 50$"))
    return int(shown.first.inner_text(timeout=60_000).split()[0])


def sign_in(page: Page, frontend_url: str) -> None:
    """Through the form, under the name of Ann."""
    page.goto(frontend_url)
    fill_in(page)


def fill_in(page: Page) -> None:
    """The form of the tab that is open."""
    page.get_by_label("Your name").fill("Ann")
    page.get_by_label("Password", exact=True).fill(PASSWORD)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="Classify a scan")).to_be_visible()


def sign_out(page: Page) -> None:
    """By the menu under the own name, which closes when the page is drawn anew meanwhile."""
    for _ in range(12):
        page.get_by_test_id("stTopNavSection").filter(has_text="Ann").click()
        try:
            page.get_by_test_id("stTopNavDropdownLink").click(timeout=5_000)
        except PlaywrightTimeout:
            page.keyboard.press("Escape")
        else:
            return
    pytest.fail("the menu under the name never stayed open")


def predictions(live_api: Api) -> list[str]:
    """The ids of all predictions."""
    return [Path(key).stem for key in live_api.stored() if "/ImageLogs/" in key]


def choose_first(page: Page, box: Locator) -> None:
    """The first entry of a select box; Streamlit closes an open list when the page is drawn anew meanwhile."""
    for _ in range(12):
        box.click()
        try:
            page.get_by_role("option").first.click(timeout=5_000)
        except PlaywrightTimeout:
            page.keyboard.press("Escape")
        else:
            return
    pytest.fail("the list of classes never stayed open")


def test_a_reader_uploads_a_scan_reads_the_result_corrects_it_and_sees_the_count_rise(page, frontend_url, live_api):
    expect.set_options(timeout=60_000)
    sign_in(page, frontend_url)
    before = waiting(page, frontend_url)  # a page that is loaded anew: the browser remembers who signed in
    scan = encode_png(phantom.scan("meningioma", 1).pixels)

    page.goto(frontend_url)
    expect(page.get_by_text("Not a medical device; not for diagnosis.")).to_be_visible()
    page.locator(".st-key-consent label").first.click()
    expect(page.get_by_text("Choose a scan to see its result here")).to_be_visible()
    page.locator(".st-key-retrain label").first.click()
    page.wait_for_timeout(1_000)  # until the tick has arrived
    page.locator("input[type=file]").set_input_files({"name": "scan.png", "mimeType": "image/png", "buffer": scan})
    verdict = page.locator(".nl-verdict")
    expect(verdict).to_contain_text("the model sees")
    expect(page.get_by_text("Result for scan.png")).to_be_visible()
    expect(page.get_by_text("The scan as it was read")).to_be_visible()

    expect(page.locator(".st-key-take-7 button").first).to_be_enabled()  # the whole page is drawn
    assert page.locator("[role=status] .nl-verdict[role=heading]").count() == 1
    assert page.locator("img").count() >= 10
    assert not page.locator("img:not([alt]), img[alt='']").count()
    names = page.locator("[class*=st-key-take-] button:visible").all_inner_texts()
    assert len(set(names)) == 8, names

    choose_first(page, page.locator(".st-key-card-feedback").get_by_role("combobox"))
    page.get_by_role("button", name="Send correction").click()
    expect(page.get_by_text(f"{before + 1} correction")).to_be_visible()

    assert waiting(page, frontend_url) == before + 1
    assert "Ann" in {one.reader for row in predictions(live_api) for one in live_api.services.log.feedback(row)}
    assert page.locator("[data-testid=stException]").count() == 0


@contextlib.contextmanager
def held(live_api: Api, table: str) -> Iterator[Callable[[], bool]]:
    """Until the end of the block the API waits as soon as it needs this table; the function says whether it does."""
    with contextlib.closing(psycopg2.connect(live_api.services.settings.database_url)) as connection:
        cursor = connection.cursor()
        cursor.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")

        def waited_for() -> bool:
            cursor.execute("SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = %s::regclass", (table,))
            return cursor.fetchone()[0] > 0

        yield waited_for
        connection.rollback()


def choose(page: Page, name: str) -> None:
    scan = encode_png(phantom.scan("meningioma", 1).pixels)
    page.locator("input[type=file]").set_input_files({"name": name, "mimeType": "image/png", "buffer": scan})


def test_what_waits_for_the_api_shows_nothing_of_the_scan_before_and_loses_no_verdict(page, frontend_url, live_api):
    expect.set_options(timeout=60_000)
    sign_in(page, frontend_url)
    page.locator(".st-key-consent label").first.click()
    expect(page.get_by_text("Choose a scan to see its result here")).to_be_visible()
    choose(page, "first.png")
    expect(page.get_by_role("button", name="Agree")).to_be_visible()
    expect(page.locator(".st-key-take-7 button").first).to_be_enabled()  # the whole page is drawn

    with held(live_api, "requests") as waited_for:
        choose(page, "second.png")
        wait(waited_for)
        expect(page.get_by_text("Reading the scan")).to_be_visible()
        assert not page.get_by_text("Result for first.png").count()
        assert not page.get_by_text("What speaks for").count()
        assert not page.get_by_role("button", name="Agree").count()
    expect(page.get_by_text("Result for second.png")).to_be_visible()
    expect(page.get_by_role("button", name="Agree")).to_be_visible()

    with held(live_api, "feedback") as waited_for:
        page.get_by_role("button", name="Not sure").click()
        wait(waited_for)
        page.get_by_role("slider").first.focus()
        page.keyboard.press("ArrowLeft")  # the reader goes on meanwhile
        page.wait_for_timeout(1_000)
    expect(page.get_by_text("You are not sure.")).to_be_visible()


COVERED = """() => {
    const focused = document.activeElement.getBoundingClientRect()
    const notice = document.querySelector('.st-key-notice').getBoundingClientRect()
    return document.activeElement !== document.body && focused.height > 0 && focused.top >= notice.top
}"""


def test_on_a_small_screen_nothing_has_the_focus_under_the_notice(page, frontend_url):
    expect.set_options(timeout=60_000)
    sign_in(page, frontend_url)
    page.set_viewport_size({"width": 360, "height": 640})
    page.locator(".st-key-consent label").first.click()
    expect(page.locator(".st-key-take-7 button").first).to_be_enabled()
    for _ in range(30):
        page.keyboard.press("Tab")
        page.wait_for_timeout(60)
        assert not page.evaluate(COVERED), page.evaluate("document.activeElement.innerText")


UPLOAD = """async tab => {
    const form = new FormData()
    form.append('file', new Blob(['abc']), 'scan.png')
    const token = decodeURIComponent(document.cookie.match(/_streamlit_xsrf=([^;]+)/)[1])
    const how = {method: 'PUT', body: form, headers: {'X-Xsrftoken': token}}
    return (await fetch(`/_stcore/upload_file/${tab}/an-id`, how)).status
}"""


def test_a_tab_uploads_nothing_before_somebody_has_signed_in(page, frontend_url, live_api):
    expect.set_options(timeout=60_000)
    heard: list[bytes] = []
    page.on("websocket", lambda socket: socket.on("framereceived", lambda said: heard.append(said)))
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text) if "Security Policy" in message.text else None)
    page.goto(frontend_url)
    expect(page.get_by_role("button", name="Sign in")).to_be_visible()
    names = {name.decode() for name in re.findall(rb"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}", b"".join(heard))}
    assert names, "the server names the tab, and itself"
    assert {page.evaluate(UPLOAD, name) for name in names} == {401}
    fill_in(page)
    assert 204 in {page.evaluate(UPLOAD, name) for name in names}
    assert page.evaluate("async () => (await fetch('/_stcore/metrics')).status") == 404
    answer = page.request.get(frontend_url)
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not refused


def test_signing_out_in_a_browser_closes_every_page(page, frontend_url, live_api):
    expect.set_options(timeout=60_000)
    sign_in(page, frontend_url)
    page.goto(f"{frontend_url}/mail")
    expect(page.get_by_role("heading", name="Mail")).to_be_visible()
    sign_out(page)
    expect(page.get_by_role("button", name="Sign in")).to_be_visible()
    for view in ("", "monitoring", "mail"):
        page.goto(f"{frontend_url}/{view}")
        expect(page.get_by_role("button", name="Sign in")).to_be_visible()
        expect(page.get_by_role("heading", name="Sign in")).to_be_visible()


def test_the_link_in_a_mail_leads_to_the_runs_and_not_to_pages_for_language_models(page, mlflow_uri):
    registry = MlflowRegistry(mlflow_uri)
    run = registry.open_run("a-run-to-compare", experiment="browser")

    page.goto(f"{mlflow_uri}/{registry.runs_page(run)}")

    page.get_by_text("a-run-to-compare").first.wait_for(timeout=60_000)
