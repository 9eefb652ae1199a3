"""An object store in an Amazon S3 bucket (or one that speaks its protocol) or an Azure Blob container, by obstore.

Credentials and endpoints are those of the vendors' own variables (`AWS_*`, `AZURE_*`) or of the machine's workload
identity; docs/stores.md lists them. An endpoint may be plain HTTP only where such a variable says so itself.
"""

import contextlib
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any

import obstore
from obstore import exceptions
from obstore.store import AzureStore, S3Store

from neuroloop.core import keys
from neuroloop.core.errors import AlreadyExists, Forbidden, NotFound, Unavailable
from neuroloop.core.rights import Right

# A silent server is given up after 15 s, and nothing is begun again after 20 s, so that no thread is held for long; a
# long body may take longer, as long as it flows.
_CLIENT: dict[str, Any] = {"connect_timeout": "5s", "read_timeout": "15s", "timeout": "15m"}
_RETRY: dict[str, Any] = {
    "max_retries": 6,
    "retry_timeout": timedelta(seconds=20),
    "backoff": {"init_backoff": timedelta(seconds=0.3), "max_backoff": timedelta(seconds=3), "base": 2},
}
_AT_ONCE = {"max_retries": 0, "retry_timeout": timedelta(seconds=5)}
_CHUNK = 8 << 20  # each part of a large upload is a request of its own and so has those 15 s
_PARTS = 4
_TOKEN = "neuroloop"  # noqa: S105 the name of a metadata field; Azure wants an identifier


@dataclass(frozen=True)
class Vendor:
    """What differs between the clouds: `actions` are the vendor's names of the rights."""

    scheme: str
    make: Callable[..., Any]
    no_bucket: tuple[str, ...]
    make_bucket: str
    login: str
    actions: Mapping[Right, tuple[str, ...]]
    endpoints: tuple[str, ...]
    """The variables that may lead to another endpoint than the vendor's."""
    options: Mapping[str, Any]


def _blobs(*names: str) -> tuple[str, ...]:
    return tuple(f"Microsoft.Storage/storageAccounts/blobServices/containers/blobs/{name}" for name in names)


S3 = Vendor(
    scheme="s3",
    make=S3Store,
    no_bucket=("NoSuchBucket",),
    make_bucket="aws s3 mb s3://{}",
    login="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role; set AWS_REGION",
    actions={
        Right.LIST: ("s3:ListBucket",),
        Right.READ: ("s3:GetObject",),
        Right.WRITE: ("s3:PutObject", "s3:AbortMultipartUpload"),
        Right.DELETE: ("s3:DeleteObject",),
    },
    endpoints=("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    options={"disable_bulk_delete": True},  # not every store that speaks S3 has it
)
AZURE = Vendor(
    scheme="az",
    make=AzureStore,
    no_bucket=("ContainerNotFound", "ContainerBeingDeleted"),
    make_bucket="az storage container create --name {}",
    login="set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or a workload identity",
    actions={
        Right.LIST: _blobs("read"),
        Right.READ: _blobs("read"),
        Right.WRITE: _blobs("write", "add/action"),
        Right.DELETE: _blobs("delete"),
    },
    endpoints=("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
    options={},
)


class CloudStore:
    """`ports.ObjectStore` in `bucket` of a vendor; a key's object is named `prefix/key`. Thread-safe, connects late.

    An upload of more than 8 MiB goes in parts and appears at its end, whole; the parts of one that broke off are never
    listed, and the bucket's own rule removes them (docs/stores.md).
    """

    def __init__(self, vendor: Vendor, bucket: str, prefix: str = "") -> None:
        self._vendor = vendor
        self._name = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._seen = False

    def put(self, key: str, data: bytes, *, content_type: str = "application/octet-stream") -> None:
        """Store `data` under `key`, replacing what was there. Raises `Unavailable`."""
        path = keys.checked(key)
        with self._errors(f"cannot store {key!r}", Right.WRITE, key):
            obstore.put(
                self._store,
                path,
                data,
                attributes={"Content-Type": content_type},
                chunk_size=_CHUNK,
                max_concurrency=_PARTS,
            )

    def create(self, key: str, data: bytes, *, content_type: str = "application/octet-stream") -> None:
        """Store `data` only if `key` is free. Raises `AlreadyExists`; of n concurrent calls one wins."""
        path, token = keys.checked(key), uuid.uuid4().hex
        with self._errors(f"cannot create {key!r}", Right.WRITE, key):
            try:
                obstore.put(
                    self._store, path, data, mode="create", attributes={"Content-Type": content_type, _TOKEN: token}
                )
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
                # When the answer to a successful write is lost, the retry meets our own object.
                if self._token(path) != token:
                    raise AlreadyExists(f"{key!r} exists already in {self._url}") from None

    def get(self, key: str) -> bytes:
        """The bytes under `key`. Raises `NotFound`."""
        path = keys.checked(key)
        with self._reading(f"cannot read {key!r}", key):
            return bytes(obstore.get(self._store, path).bytes())

    def exists(self, key: str) -> bool:
        """Whether `key` is taken."""
        try:
            self._head(key)
        except NotFound:
            return False
        return True

    def list(self, prefix: str) -> list[str]:
        """All keys that start with `prefix`, sorted."""
        above = prefix.rpartition("/")[0]
        if above:
            keys.checked(above)
        with self._errors(f"cannot list {prefix!r}", Right.LIST, prefix):
            chunks = obstore.list(self._store, above or None, chunk_size=1000)  # it lists whole folders only
            sizes = {found["path"]: found["size"] for chunk in chunks for found in chunk}
        # The console marks a folder by an empty object whose name ends in a slash; obstore drops that slash.
        folders = {path[:at] for path in sizes for at, letter in enumerate(path) if letter == "/"}
        marks = {path for path, size in sizes.items() if size == 0 and path in folders}
        return sorted(path for path in sizes.keys() - marks if path.startswith(prefix))

    def delete(self, key: str) -> None:
        """Remove `key`, for good; nothing happens where it is not there.

        A bucket with versioning or soft deletion keeps a copy as long as it is told to.
        """
        path = keys.checked(key)
        what = f"cannot delete {key!r}"
        with contextlib.suppress(NotFound), self._errors(what, Right.DELETE, key), self._bucket_known():
            obstore.delete(self._store, path)

    def modified(self, key: str) -> datetime:
        """When `key` was last written, UTC. Raises `NotFound`."""
        at: datetime = self._head(key)["last_modified"]
        return at.astimezone(UTC)

    def discard_unfinished(self, before: datetime) -> int:
        """None: what an upload that broke off left is for the bucket's own rule."""
        return 0

    def check(self) -> None:
        """Raise `Unavailable` unless objects can be listed where every identity may."""
        with self._errors("the object store cannot be used", Right.LIST, keys.PROBE):
            for _ in obstore.list(self._open(_CLIENT | {"read_timeout": "5s"}, _AT_ONCE), keys.PROBE, chunk_size=1):
                return

    @property
    def _url(self) -> str:
        return f"{self._vendor.scheme}://{self._name}/{self._prefix}".rstrip("/")

    @cached_property
    def _store(self) -> Any:
        return self._open(_CLIENT, _RETRY)

    def _open(self, client: dict[str, Any], retry: dict[str, Any]) -> Any:
        plain = any(os.environ.get(name, "").startswith("http://") for name in self._vendor.endpoints)
        return self._vendor.make(
            self._name,
            prefix=self._prefix.rstrip("/") or None,
            client_options=client | ({"allow_http": True} if plain else {}),
            retry_config=retry,
            **self._vendor.options,
        )

    def _head(self, key: str) -> Any:
        path = keys.checked(key)
        with self._reading(f"cannot look up {key!r}", key), self._bucket_known():
            return obstore.head(self._store, path)

    @contextlib.contextmanager
    def _bucket_known(self) -> Iterator[None]:
        """For calls whose "not found" does not say what: the bucket itself may be missing, unless it was seen."""
        try:
            yield
        except FileNotFoundError:
            if not self._seen:
                next(iter(obstore.list(self._store, keys.PROBE, chunk_size=1)), None)
            raise

    def _token(self, path: str) -> str | None:
        try:
            found = obstore.get(self._store, path, options={"head": True}).attributes
        except (FileNotFoundError, exceptions.PermissionDeniedError):
            return None
        return dict(found).get(_TOKEN)

    @contextlib.contextmanager
    def _reading(self, what: str, key: str) -> Iterator[None]:
        """The same errors as `_errors`; a missing object is `NotFound` also where the answer is a refusal.

        S3 answers 403 for an object that is not there, unless one may list the whole bucket.
        """
        try:
            with self._errors(what, Right.READ, key):
                yield
        except Forbidden:
            with contextlib.suppress(exceptions.BaseError):
                if not self._listed(key):
                    raise NotFound(f"{what}, it is not in {self._url}") from None
            raise

    def _listed(self, key: str) -> bool:
        chunks = obstore.list(self._store, key.rpartition("/")[0] or None, offset=key[:-1], chunk_size=1)
        paths = (found["path"] for chunk in chunks for found in chunk)
        return next((path for path in paths if path >= key), "") == key

    @contextlib.contextmanager
    def _errors(self, what: str, right: Right, key: str) -> Iterator[None]:
        """obstore's errors as ours."""
        vendor, bucket = self._vendor, f"{self._vendor.scheme}://{self._name}"
        kind, fix = Unavailable, f"check the network and that {bucket} can be reached"
        try:
            yield
            self._seen = True
            return
        except exceptions.PermissionDeniedError as error:
            cause: Exception = error
            kind = Forbidden
            fix = (
                f"this identity lacks the right to {right} {self._prefix + key!r}: grant it "
                f"{' and '.join(vendor.actions[right])} there if it is meant to have it (docs/stores.md)"
            )
        except exceptions.UnauthenticatedError as error:
            cause, fix = error, vendor.login
        except (FileNotFoundError, exceptions.BaseError, OSError, ValueError) as error:
            cause = error
            if any(name in str(error) for name in vendor.no_bucket):
                fix = f"create it ({vendor.make_bucket.format(self._name)}) or correct the URL"
            elif isinstance(error, FileNotFoundError):
                raise NotFound(f"{what}, it is not in {self._url}") from None
            elif "redential" in str(error) or "Account must be specified" in str(error):
                fix = vendor.login
        raise kind(f"{what} in {self._url}", why=_reason(cause), fix=fix) from cause


def _reason(error: Exception) -> str:
    """The words of an error, without its internals, and without the query of an address, which may be a signature."""
    text = str(error).partition("\n\nDebug source:")[0]
    code = re.search(r"<Code>(.*?)</Code>\s*<Message>(.*?)</Message>", text, re.DOTALL)
    if code:
        text = f"{text.partition('<?xml')[0].partition('<Error>')[0]}{code[1]}: {code[2]}"
    return " ".join(re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", text).split())[:500]
