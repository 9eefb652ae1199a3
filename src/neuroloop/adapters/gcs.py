"""An object store in a Google Cloud Storage bucket."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from google.api_core import exceptions
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import GoogleAuthError
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
from google.cloud.storage.retry import DEFAULT_RETRY
from requests.exceptions import RequestException

from neuroloop.core import keys
from neuroloop.core.errors import AlreadyExists, Forbidden, NotFound, Unavailable
from neuroloop.core.rights import Right

_TIMEOUT = (5, 15)  # seconds to connect, and between two packets: a storage that hangs must not hold threads for long
_RETRY = DEFAULT_RETRY.with_delay(initial=0.3, maximum=3).with_timeout(20)
_NO_BUCKET = "bucket does not exist"  # both a missing bucket and a missing object answer 404
ACTIONS = {
    Right.LIST: ("storage.objects.list",),
    Right.READ: ("storage.objects.get",),
    Right.WRITE: ("storage.objects.create", "storage.objects.delete"),  # replacing is deleting
    Right.DELETE: ("storage.objects.delete",),
}
"""Google's names of the rights."""
_TOKEN = "neuroloop-create"  # noqa: S105 the name of a metadata field


class GcsStore:
    """`ports.ObjectStore` in `bucket`; a key's object is named `prefix/key`. Thread-safe; connects at the first call.

    Credentials are Google's application default; an emulator at `endpoint` or `STORAGE_EMULATOR_HOST` is sent none.
    """

    def __init__(self, bucket: str, prefix: str = "", endpoint: str = "") -> None:
        self._name = bucket
        self._emulator = endpoint or os.environ.get("STORAGE_EMULATOR_HOST", "")
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""

    def put(self, key: str, data: bytes, *, content_type: str = "application/octet-stream") -> None:
        """Store `data` under `key`, replacing what was there. Raises `Unavailable`."""
        blob = self._blob(key)
        with self._errors(f"cannot store {key!r}", Right.WRITE, key):
            blob.upload_from_string(data, content_type=content_type, timeout=_TIMEOUT, retry=_RETRY)

    def create(self, key: str, data: bytes, *, content_type: str = "application/octet-stream") -> None:
        """Store `data` only if `key` is free. Raises `AlreadyExists`; of n concurrent calls one wins."""
        blob = self._blob(key)
        token = uuid.uuid4().hex
        blob.metadata = {_TOKEN: token}
        with self._errors(f"cannot create {key!r}", Right.WRITE, key):
            try:
                blob.upload_from_string(
                    data, content_type=content_type, if_generation_match=0, timeout=_TIMEOUT, retry=_RETRY
                )
            except exceptions.PreconditionFailed:
                # When the answer to a successful write is lost, the retry meets our own object.
                winner = self._bucket.get_blob(blob.name, timeout=_TIMEOUT, retry=_RETRY)
                if winner is None or (winner.metadata or {}).get(_TOKEN) != token:
                    raise AlreadyExists(f"{key!r} exists already in {self._url}") from None

    def get(self, key: str) -> bytes:
        """The bytes under `key`. Raises `NotFound`."""
        blob = self._blob(key)
        with self._reading(f"cannot read {key!r}", key):
            return blob.download_as_bytes(timeout=_TIMEOUT, retry=_RETRY)

    def exists(self, key: str) -> bool:
        """Whether `key` is taken."""
        blob = self._blob(key)
        try:
            with self._reading(f"cannot look up {key!r}", key):
                blob.reload(timeout=_TIMEOUT, retry=_RETRY)
        except NotFound:
            return False
        return True

    def list(self, prefix: str) -> list[str]:
        """All keys that start with `prefix`, sorted."""
        if "/" in prefix:
            keys.checked(prefix.rpartition("/")[0])
        with self._errors(f"cannot list {prefix!r}", Right.LIST, prefix):
            blobs = self._client.list_blobs(
                self._bucket,
                prefix=self._prefix + prefix,
                fields="items(name),nextPageToken",
                timeout=_TIMEOUT,
                retry=_RETRY,
            )
            names = [blob.name for blob in blobs]
        # The console marks a folder by an empty object whose name ends in a slash; that is no key.
        return sorted(name.removeprefix(self._prefix) for name in names if not name.endswith("/"))

    def delete(self, key: str) -> None:
        """Remove `key`, for good; nothing happens where it is not there.

        A bucket with versioning or soft deletion keeps a copy as long as it is told to.
        """
        blob = self._blob(key)
        with contextlib.suppress(NotFound), self._errors(f"cannot delete {key!r}", Right.DELETE, key):
            blob.delete(timeout=_TIMEOUT, retry=_RETRY)

    def modified(self, key: str) -> datetime:
        """When `key` was last written, UTC. Raises `NotFound`."""
        blob = self._blob(key)
        with self._reading(f"cannot look up {key!r}", key):
            blob.reload(timeout=_TIMEOUT, retry=_RETRY)
        at: datetime = blob.updated
        return at.astimezone(UTC)

    def discard_unfinished(self, before: datetime) -> int:
        """None: an upload that breaks off leaves no object."""
        return 0

    def check(self) -> None:
        """Raise `Unavailable` unless objects can be listed where all may; the bucket itself may be closed to us."""
        where = self._prefix + keys.PROBE
        with self._errors("the object store cannot be used", Right.LIST, keys.PROBE):
            list(
                self._client.list_blobs(
                    self._bucket, prefix=where, max_results=1, fields="items(name)", timeout=5, retry=None
                )
            )

    @property
    def _url(self) -> str:
        return f"gs://{self._name}/{self._prefix}".rstrip("/")

    @cached_property
    def _client(self) -> Any:
        if self._emulator:
            return storage.Client(
                project="emulator",
                credentials=AnonymousCredentials(),
                client_options={"api_endpoint": self._emulator},
            )
        return storage.Client()

    @cached_property
    def _bucket(self) -> Any:
        with self._errors("the object store cannot be used", Right.LIST, keys.PROBE):
            return self._client.bucket(self._name)

    def _blob(self, key: str) -> Any:
        return self._bucket.blob(self._prefix + keys.checked(key))

    @contextlib.contextmanager
    def _reading(self, what: str, key: str) -> Iterator[None]:
        """The same errors as `_errors`; a missing object is `NotFound` also where the answer is a refusal.

        Google answers 403 for an object that is not there, unless one may list the whole bucket.
        """
        try:
            with self._errors(what, Right.READ, key):
                yield
        except Forbidden:
            with contextlib.suppress(Unavailable):
                if key not in self.list(key):
                    raise NotFound(f"{what}, it is not in {self._url}") from None
            raise

    @contextlib.contextmanager
    def _errors(self, what: str, right: Right, key: str) -> Iterator[None]:
        """Google's errors as ours."""
        kind, fix = Unavailable, f"check the network and that gs://{self._name} can be reached"
        try:
            yield
            return
        except exceptions.NotFound as error:
            if _NO_BUCKET not in str(error):
                raise NotFound(f"{what}, it is not in {self._url}") from None
            cause: Exception = error
            fix = f"create it (gcloud storage buckets create gs://{self._name}) or correct the URL"
        except (exceptions.Forbidden, exceptions.Unauthorized) as error:
            cause = error
            kind = Forbidden
            fix = (
                f"this identity lacks the right to {right} {self._prefix + key!r}: grant it "
                f"{' and '.join(ACTIONS[right])} there if it is meant to have it (docs/stores.md)"
            )
        except GoogleAuthError as error:
            cause = error
            fix = "set GOOGLE_APPLICATION_CREDENTIALS, or run gcloud auth application-default login"
        except (
            exceptions.GoogleAPIError,
            InvalidResponse,
            DataCorruption,
            RequestException,
            ConnectionError,
            OSError,
        ) as error:
            cause = error
        raise kind(f"{what} in {self._url}", why=" ".join(str(cause).split())[:500], fix=fix) from cause
