"""The model being served: watched in the registry, loaded aside, swapped as one reference."""

import logging
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from neuroloop.bootstrap import Services
from neuroloop.core.errors import Busy, InvalidBundle, Unavailable
from neuroloop.core.schemas import ModelVersion, now
from neuroloop.model.bundle import BUNDLE_TAG, Bundle
from neuroloop.serving.metrics import Metrics

ALIAS = "champion"
_LOG = logging.getLogger(__name__)
_FIRST_PAUSE, _LONGEST_PAUSE = 10.0, 300.0  # seconds between attempts at a bundle that does not load


@dataclass(frozen=True)
class Served:
    """One loaded model. A request takes one and uses nothing else, so its answer names the model that made it."""

    version: ModelVersion
    bundle: Bundle
    loaded_at: datetime


@dataclass
class _Failure:
    """The version that would not load, and when to try it again."""

    identity: tuple[str, str]
    pause: float
    retry_at: float


class Champion:
    """Holds the served model and keeps it up to date.

    A version is known by its number and its run, so a registry that was emptied and begins again at 1 is noticed. The
    served model stays until its successor has been downloaded, verified and warmed; where any of that fails it goes on
    serving. It also stays where the alias disappears: taking the alias away is not a way to stop a server.
    """

    def __init__(self, services: Services, metrics: Metrics) -> None:
        self._services, self._metrics = services, metrics
        self._served: Served | None = None
        self._failure: _Failure | None = None
        self._told: set[tuple[str, str]] = set()
        self._reachable = True
        self._refreshing = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def served(self) -> Served | None:
        """The model being served, None before the first one."""
        return self._served

    def require(self) -> Served:
        """The model being served. Raises `Unavailable` before the first one."""
        served = self._served
        if served is None:
            raise Busy(
                "No model is being served yet",
                why="the registry has no champion, or it has not been loaded yet",
                fix="wait until the first build has promoted one, then try again",
            )
        return served

    def start(self) -> None:
        """Watch the registry from a thread, at once and then every `refresh_seconds`."""
        self._thread = threading.Thread(target=self._watch, name="champion", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; waits a few seconds for a poll in progress and leaves a longer one to the process' end."""
        self._stop.set()
        if self._thread:
            self._thread.join(timeout=3)

    def refresh(self) -> None:
        """Ask once for the champion and serve it if it is another one. Raises nothing; says what failed in the log."""
        with self._refreshing:
            try:
                version = self._services.registry.by_alias(ALIAS)
            except Exception as error:
                return self._unreachable(error)
            if not self._reachable:
                _LOG.info("the registry can be reached again")
            self._reachable = True
            if version is None or self._is_served(version) or self._pausing(version):
                return None
            try:
                served = self._load(version)
            except Unavailable as error:
                return self._unreachable(error)
            except Exception as error:
                return self._failed(version, error)
            self._served, self._failure = served, None
            self._told.discard(_identity(version))
            manifest = served.bundle.manifest
            self._metrics.serving(version.version, manifest.data_version, manifest.simulated)
            _LOG.info("serving version %s of the model", version.version)

    def _watch(self) -> None:
        self.refresh()
        while not self._stop.wait(self._services.settings.refresh_seconds):
            self.refresh()

    def _is_served(self, version: ModelVersion) -> bool:
        if self._served is None or _identity(self._served.version) != _identity(version):
            return False
        self._failure = None
        return True

    def _pausing(self, version: ModelVersion) -> bool:
        failure = self._failure
        return bool(failure and failure.identity == _identity(version) and time.monotonic() < failure.retry_at)

    def _load(self, version: ModelVersion) -> Served:
        with tempfile.TemporaryDirectory(prefix="neuroloop-bundle-") as folder:
            files = self._services.registry.download_bundle(version.version, Path(folder))
            bundle = Bundle.load(files, sha256=version.tags.get(BUNDLE_TAG))
        self._compare(bundle)
        return Served(version, bundle, now())

    def _compare(self, bundle: Bundle) -> None:
        """Ask a bundle the reference images of the served one. Raises `InvalidBundle`.

        One without its own must know every class. One that has answered its own at its load may be of other data, but
        must not exchange classes: its own came with it, from the same folders. Models for other images are not
        comparable.
        """
        served = self._served.bundle if self._served else None
        if served is None or served.canary is None:
            return
        manifest, other = bundle.manifest, served.manifest
        if (manifest.simulated, manifest.image_size) != (other.simulated, other.image_size):
            return
        canary, said = served.canary, bundle.predict(served.canary.images).probabilities
        unknown = canary.unknown_to(said) if bundle.canary is None else canary.exchanged_by(said)
        if unknown:
            raise InvalidBundle(
                f"the network does not know {', '.join(unknown)}",
                why="it names reference images wrong that the served model names right, as swapped classes would",
                fix="build the model again; or, if the served one is the one that is wrong, restart the servers",
            )

    def _unreachable(self, error: Exception) -> None:
        """A registry that is away for a while is no news: the served model goes on, the next poll asks again."""
        self._metrics.registry_unreachable.inc()
        if self._reachable:
            _LOG.warning("the registry cannot be reached, the served model stays: %s", error)
        self._reachable = False

    def _failed(self, version: ModelVersion, error: Exception) -> None:
        self._metrics.reload_failures.inc()
        identity = _identity(version)
        known = self._failure if self._failure and self._failure.identity == identity else None
        pause = min(known.pause * 2, _LONGEST_PAUSE) if known else _FIRST_PAUSE
        self._failure = _Failure(identity, pause, time.monotonic() + pause)
        _LOG.error("version %s does not load, next attempt in %.0f s", version.version, pause, exc_info=error)
        if identity in self._told:
            return
        stays = f"version {self._served.version.version} goes on serving" if self._served else "nothing is being served"
        try:
            self._services.notifier.send(
                f"NeuroLoop: model version {version.version} does not load",
                f"The alias {ALIAS} points to version {version.version}, but a server could not load it; {stays}.\n\n"
                f"{error}\n\nPoint the alias back to a sound version, or repair this one; the server tries it again by "
                "itself.",
            )
            self._told.add(identity)
        except Exception as mail_error:
            _LOG.warning("the mail about it could not be sent: %s", mail_error)


def _identity(version: ModelVersion) -> tuple[str, str]:
    return version.version, version.run_id
