"""The frontend in this process (`AppTest`), against a real API, none, or one without a model."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from neuroloop.bootstrap import Services
from neuroloop.core.settings import Settings
from serving.running import KEY, Api, serving

FRONTEND = Path(__file__).parents[2] / "frontend"
sys.path.append(str(FRONTEND))  # as `streamlit run frontend/server.py` does

Open = Callable[..., AppTest]
PASSWORD = "the platform's own password"


def sign_in(app: AppTest, name: str, secret: str) -> AppTest:
    """Fill in the form and send it."""
    app.text_input[0].set_value(name)
    app.text_input[1].set_value(secret)
    return app.button[0].click().run()


@pytest.fixture(scope="module")
def bare_api(tmp_path_factory, postgres_server, free_port) -> Iterator[Api]:
    """An API whose database is empty and whose registry is out of reach, so that it has no model."""
    settings = Settings(
        home=tmp_path_factory.mktemp("bare-api"),
        database_url=postgres_server.new_database(),
        mlflow_tracking_uri=f"http://127.0.0.1:{free_port()}",
    )
    with serving(Services(settings), model=False) as running:
        yield running


@pytest.fixture
def open_page(tmp_path: Path, free_port, monkeypatch: pytest.MonkeyPatch) -> Open:
    """A function that signs in and opens a page of the app against an API.

    Without an API it is one at a port nobody listens on; `name` is None where nobody signs in.
    """
    monkeypatch.setenv("NEUROLOOP_HOME", str(tmp_path))
    monkeypatch.setenv("NEUROLOOP_ENV_FILE", str(tmp_path / "none"))

    monkeypatch.setenv("NEUROLOOP_UI_PASSWORD", PASSWORD)
    monkeypatch.setenv("NEUROLOOP_UI_API_KEY", KEY)

    def open_(view: str, api: Api | None = None, *, name: str | None = "Ann", secret: str = PASSWORD) -> AppTest:
        monkeypatch.setenv("NEUROLOOP_API_URL", f"http://127.0.0.1:{api.port if api else free_port()}")
        app = AppTest.from_file(str(FRONTEND / "app.py"), default_timeout=90).run()
        if name is not None:
            sign_in(app, name, secret)
        if view != "classify":
            app.switch_page(f"views/{view}.py").run()
        assert not app.exception, [fault.value for fault in app.exception]
        return app

    return open_
