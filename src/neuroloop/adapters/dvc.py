"""Data versions by DVC, with a folder or a bucket as its remote.

DVC runs as a command, because its Python interface is neither stable nor thread-safe. The workspace is a DVC
repository without git: a folder with `data/`, its `data.dvc` and a `.dvc/` that holds cache, lock and settings, so
that nothing of the user's own DVC is read or written.
"""

import contextlib
import fcntl
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from neuroloop.core.errors import InvalidSource, Unavailable
from neuroloop.core.settings import folder_of

_MINUTES = 60  # the longest push or pull
_VERSION = re.compile(r"md5: ([0-9a-f]{32})\.dir\b")


class DvcVersions:
    """`ports.DataVersions` by DVC. `remote_url` is `file:///folder`, or `gs://`, `s3://` or `az://bucket/prefix`.

    The remote has DVC's own layout, `files/md5/ab/cdef...`, which `keys.image` names too. For `gs://`, an emulator at
    `endpoint` or `STORAGE_EMULATOR_HOST` is asked instead of the cloud; the vendors' own variables are honoured;
    `s3://` takes the extra `aws` of this package.
    """

    def __init__(self, remote_url: str, endpoint: str = "") -> None:
        parts = urlsplit(remote_url)
        self._endpoint = endpoint
        self._remote = f"azure://{parts.netloc}{parts.path}" if parts.scheme == "az" else remote_url
        if parts.scheme == "file":
            self._remote = folder_of(remote_url)

    def commit(self, workspace: Path) -> tuple[str, bytes]:
        """Version `workspace/data` and push it; (version, bytes of `data.dvc`). The same files give the same version.

        Raises `InvalidSource` where there is no data, `Unavailable` where the remote cannot be reached.
        """
        data = workspace / "data"
        if not data.is_dir() or not any(data.iterdir()):
            raise InvalidSource(f"there is nothing to version in {data}", why="the folder is missing or empty")
        with self._prepared(workspace) as lock:
            self._dvc(workspace, lock, "add", "data")
            self._dvc(workspace, lock, "push", "--remote", "store", "data.dvc")
            data_dvc = (workspace / "data.dvc").read_bytes()
        return _version(data_dvc), data_dvc

    def restore(self, data_dvc: bytes, workspace: Path) -> None:
        """Bring back exactly the version that `data_dvc` names into `workspace/data`; other files there go.

        Raises `InvalidSource` where `data_dvc` names no version, `Unavailable` where the remote lacks some of it.
        """
        _version(data_dvc)
        workspace.mkdir(parents=True, exist_ok=True)
        with self._prepared(workspace) as lock:
            (workspace / "data.dvc").write_bytes(data_dvc)
            self._dvc(workspace, lock, "pull", "--remote", "store", "--force", "data.dvc")

    @contextlib.contextmanager
    def _prepared(self, workspace: Path) -> Iterator[int]:
        """Make `workspace` a DVC repository, with the settings of now: the emulator may have another port.

        Nobody else may use it until the end of the block. The lock is a descriptor that DVC inherits, so where a killed
        process leaves its DVC at work, the next one waits for that instead of being refused by DVC's own lock.
        """
        hidden = workspace / ".dvc"  # with its `config` this is all that `dvc init --no-scm` makes
        hidden.mkdir(exist_ok=True)
        with (hidden / "neuroloop.lock").open("a") as lock:
            deadline = time.monotonic() + _MINUTES * 60
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > deadline:
                        raise Unavailable(
                            f"{workspace} is in use",
                            why=f"another process has held it for more than {_MINUTES} minutes",
                            fix="look for a DVC that hangs there, and end it",
                        ) from error
                    time.sleep(0.1)
            self._configure(hidden)
            yield lock.fileno()

    def _configure(self, hidden: Path) -> None:
        settings = [
            "[core]",
            "no_scm = true",
            "analytics = false",
            "check_update = false",
            "remote = store",
            f'site_cache_dir = "{hidden.absolute() / "site"}"',
            "[cache]",
            "type = reflink, copy",  # a hard link would let a rewritten file damage the cache
            "['remote \"store\"']",
            f'url = "{self._remote}"',
        ]
        emulator = self._endpoint or os.environ.get("STORAGE_EMULATOR_HOST")
        if self._remote.startswith("gs://") and emulator:
            settings += [f'endpointurl = "{emulator}"', "allow_anonymous_login = true"]
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if self._remote.startswith("s3://") and endpoint:
            settings.append(f'endpointurl = "{endpoint}"')
        # What git tracks of a repository's settings stays as it is; these win, and git ignores them.
        (hidden / "config").touch()
        (hidden / "config.local").write_text("\n".join(settings) + "\n")

    def _dvc(self, workspace: Path, lock: int, *args: str) -> None:
        settings = workspace.absolute() / ".dvc"
        environment = os.environ | {
            "DVC_NO_ANALYTICS": "1",
            "DVC_GLOBAL_CONFIG_DIR": str(settings / "no-global"),
            "DVC_SYSTEM_CONFIG_DIR": str(settings / "no-system"),
            "DVC_SITE_CACHE_DIR": str(settings / "site"),
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else it waits for a gRPC look-up without end
        }
        what = f"dvc {args[0]} failed in {workspace}"
        try:
            done = subprocess.run(
                [sys.executable, "-m", "dvc", *args],
                cwd=workspace,
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=(lock,),
                capture_output=True,
                text=True,
                timeout=_MINUTES * 60,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise Unavailable(what, why=f"it took longer than {_MINUTES} minutes", fix="check the remote") from error
        if done.returncode:
            lines = [line.strip() for line in (done.stdout + done.stderr).splitlines()]
            last = [line for line in lines if line and "Having any troubles" not in line][-6:]
            why = " ".join(last) or f"it ended with status {done.returncode}"
            missing = "requires 'dvc-s3'" in why
            extra = "install the extra aws: uv pip install 'neuroloop[aws]' (docs/stores.md)"
            raise Unavailable(
                what, why=why, fix=extra if missing else f"check that the remote {self._remote} can be reached"
            )


def _version(data_dvc: bytes) -> str:
    found = _VERSION.search(data_dvc.decode(errors="replace"))
    if found is None:
        raise InvalidSource("this data.dvc names no version of a folder", why=repr(data_dvc[:200]))
    return found[1]
