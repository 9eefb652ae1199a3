"""MLflow's REST interface, as far as the model registry needs it: what a server that only serves asks of MLflow.

The mlflow package brings pandas, scikit-learn and SQLAlchemy with it: some 150 MB and several seconds at the start of
every server, for half a dozen requests.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from neuroloop.core.errors import NeuroLoopError, NotFound, Unavailable

ARTIFACTS = "mlflow-artifacts"
"""Scheme of artifacts that the tracking server itself hands out."""

_API = "/api/2.0/mlflow/"
_PROXY = "/api/2.0/mlflow-artifacts/artifacts"
_TIMEOUT = (5.0, 10.0)  # seconds to connect, and between two parts of an answer
_RETRIES = Retry(
    total=2,
    backoff_factor=1.0,
    status_forcelist=(429, 500, 502, 503, 504),
    allowed_methods=None,  # every request here gives the same result when repeated
    raise_on_status=False,
    respect_retry_after_header=False,  # it may name minutes
)
_CHUNK = 1 << 20


class Refused(NeuroLoopError):
    """The server understood a request and will not do it; `code` is MLflow's own name for why."""

    def __init__(self, code: str, what: str, *, why: str) -> None:
        super().__init__(what, why=why)
        self.code = code


class MlflowRest:
    """The REST interface of the server at `uri`. Thread-safe; keeps its connections.

    A request that finds no server is made twice more, within seconds. Raises `Unavailable` then, `NotFound` for what
    the server does not have, `Refused` for what it will not do.
    """

    def __init__(self, uri: str, *, user: str = "", password: str = "") -> None:
        """`password` is empty where the server asks for none; MLflow's own variables win, as with its client."""
        self._uri = uri.rstrip("/")
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=_RETRIES))
        name = os.environ.get("MLFLOW_TRACKING_USERNAME") or user
        word = os.environ.get("MLFLOW_TRACKING_PASSWORD") or password
        token = os.environ.get("MLFLOW_TRACKING_TOKEN")
        if word:
            self._session.auth = (name, word)
        elif token:
            self._session.headers["Authorization"] = f"Bearer {token}"

    def get(self, path: str, **params: Any) -> dict[str, Any]:
        """The answer to `GET path` below the interface's root."""
        return self._json("GET", _API + path, params=params)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """The answer to `POST path` with a JSON body."""
        return self._json("POST", _API + path, json=body)

    def pages(self, path: str, field: str, **asked: Any) -> Iterator[dict[str, Any]]:
        """All entries of `field` over all pages of a search by `GET`."""
        token = ""
        while True:
            page = self.get(path, **asked, **({"page_token": token} if token else {}))
            yield from page.get(field, [])
            token = page.get("next_page_token", "")
            if not token:
                return

    def download(self, artifacts: str, folder: Path) -> None:
        """Fetch the files right below `artifacts`, a path at the artifact proxy, into `folder`.

        Raises `NotFound` where there are none.
        """
        listed = self._json("GET", _PROXY, params={"path": artifacts}).get("files", [])
        names = [str(each["path"]).rpartition("/")[2] for each in listed if not each.get("is_dir")]
        if not names:
            raise NotFound(f"the MLflow server {self._uri} has no files under {artifacts!r}")
        for name in names:
            if name in ("", ".", ".."):
                raise self._unusable(f"it names an artifact {name!r}")
            self._fetch(f"{_PROXY}/{artifacts}/{name}", folder / name)

    def _fetch(self, path: str, file: Path) -> None:
        try:
            with self._send("GET", path, stream=True) as response, file.open("wb") as out:
                for part in response.iter_content(_CHUNK):
                    out.write(part)
        except requests.RequestException as error:  # cut off on the way
            raise self._unusable(str(error)) from error

    def _json(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        with self._send(method, path, **more) as response:
            try:
                found = response.json()
            except (ValueError, requests.RequestException) as error:
                raise self._unusable("its answer is no JSON") from error
        if not isinstance(found, dict):
            raise self._unusable("its answer is no JSON object")
        return found

    def _send(self, method: str, path: str, **more: Any) -> requests.Response:
        """The answer with a good status."""
        try:
            response = self._session.request(method, self._uri + path, timeout=_TIMEOUT, **more)
        except requests.RequestException as error:
            raise self._unusable(str(error)) from error
        if response.ok:
            return response
        with response:
            try:
                said = response.json()
                code, message = str(said.get("error_code", "")), str(said.get("message", ""))
            except (ValueError, AttributeError, requests.RequestException):
                code, message = "", ""
        why = " ".join((message or f"it answered {response.status_code}").split())[:500]
        # An answer without MLflow's own code is the page of whatever stands in front of it; but a refused login (401,
        # 403) is plain text from MLflow, too.
        if response.status_code >= 500 or not (code or response.status_code in (401, 403)):
            raise self._unusable(why)
        if code == "RESOURCE_DOES_NOT_EXIST":
            raise NotFound(f"the MLflow server {self._uri} does not have it", why=why)
        raise Refused(code, f"the MLflow server {self._uri} refused a request", why=why)

    def _unusable(self, why: str) -> Unavailable:
        return Unavailable(
            f"the MLflow server {self._uri} cannot be used",
            why=" ".join(why.split())[-500:],  # the cause stands at the end of a long chain
            fix="check that it runs and that NEUROLOOP_MLFLOW_TRACKING_URI names it",
        )
