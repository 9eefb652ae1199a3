"""An object store in a local folder; also how a folder of images is read as a training source."""

import contextlib
import errno
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from neuroloop.core import keys
from neuroloop.core.errors import AlreadyExists, NeuroLoopError, NotFound, OutOfSpace, Unavailable

_TEMPORARY = ".neuroloop-tmp"  # on the same file system as the objects, so that a rename or link is atomic
_MOST_LINKS = 8  # ways to one folder that are followed: more are a tangle of links, not parts of a set
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class FolderStore:
    """`ports.ObjectStore` on a folder; a key is the path below it. The folder is made at the first write.

    Writes go to a temporary file first and are flushed to disk before the call returns, so an object is whole or
    absent even after a crash.
    """

    def __init__(self, path: str, *, follow_links: bool = False) -> None:
        """`follow_links` lists what lies behind linked folders too: to read only, for it would be deleted there."""
        self._root, self._follow_links = Path(path).absolute(), follow_links

    def put(self, key: str, data: bytes, *, content_type: str = "application/octet-stream") -> None:
        """Store `data` under `key`, replacing what was there. Raises `Unavailable`, on a full disk `OutOfSpace`."""
        target = self._path(key)
        with self._written(key, data) as temporary:
            os.replace(temporary, target)
            _flush_folder(target.parent)

    def create(self, key: str, data: bytes, *, content_type: str = "application/octet-stream") -> None:
        """Store `data` only if `key` is free. Raises `AlreadyExists`; of n concurrent calls one wins."""
        target = self._path(key)
        with self._written(key, data) as temporary:
            try:
                os.link(temporary, target)  # fails where the name is taken, unlike a rename
            except FileExistsError:
                raise AlreadyExists(f"{key!r} exists already in {self._root}") from None
            _flush_folder(target.parent)

    def get(self, key: str) -> bytes:
        """The bytes under `key`. Raises `NotFound`, also for what is no file: a pipe would never end."""
        path = self._path(key)
        try:
            if stat.S_ISREG(path.stat().st_mode):
                return path.read_bytes()
            raise NotFound(f"{key!r} in {self._root} is no file")
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"there is no {key!r} in {self._root}") from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise NotFound(f"{key!r} in {self._root} is a link to itself") from None
            self._fail(f"cannot read {key!r} from {self._root}", error)

    def exists(self, key: str) -> bool:
        """Whether `key` is taken. Raises `Unavailable` where that cannot be told."""
        try:
            return stat.S_ISREG(self._path(key).stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            self._fail(f"cannot look up {key!r} in {self._root}", error)

    def list(self, prefix: str) -> list[str]:
        """All keys that start with `prefix`, sorted; a folder that is not there has none."""
        above = prefix.rpartition("/")[0]
        start = self._root / keys.checked(above) if above else self._root
        found = []

        def stop(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError | NotADirectoryError):
                self._fail(f"cannot list {error.filename}", error)

        seen: Counter[str] = Counter()
        for folder, folders, names in os.walk(start, onerror=stop, followlinks=self._follow_links):
            if self._follow_links:
                real = os.path.realpath(folder)
                seen[real] += 1
                within = any(os.path.realpath(above) == real for above in Path(folder).parents)
                if within or seen[real] > _MOST_LINKS:
                    folders.clear()
                    continue
            if Path(folder) == self._root and _TEMPORARY in folders:
                folders.remove(_TEMPORARY)
            below = Path(folder).relative_to(self._root).as_posix()
            found += [name if below == "." else f"{below}/{name}" for name in names]
        return sorted(key for key in found if key.startswith(prefix))

    def delete(self, key: str) -> None:
        """Remove `key`, for good; nothing happens where it is not there."""
        target = self._path(key)
        try:
            target.unlink()
            _flush_folder(target.parent)  # or a power cut could bring back what was erased
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return
        except OSError as error:
            self._fail(f"cannot delete {key!r} from {self._root}", error)

    def modified(self, key: str) -> datetime:
        """When `key` was last written, UTC. Raises `NotFound`."""
        try:
            return datetime.fromtimestamp(self._path(key).stat().st_mtime, UTC)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"there is no {key!r} in {self._root}") from None
        except OSError as error:
            self._fail(f"cannot look up {key!r} in {self._root}", error)

    def discard_unfinished(self, before: datetime) -> int:
        """Remove the temporary files that killed writers left before this time; how many."""
        count = 0
        for file in (self._root / _TEMPORARY).glob("*"):
            with contextlib.suppress(FileNotFoundError):
                if file.stat().st_mtime < before.timestamp():
                    file.unlink()
                    count += 1
        return count

    def check(self) -> None:
        """Raise `Unavailable` unless the folder can be listed and written, or be made where it is not there yet."""
        try:
            os.scandir(self._root).close()
            if not self._follow_links and not os.access(self._root, os.W_OK):  # as a disk after an error is mounted
                raise PermissionError(errno.EROFS, "it is read-only")
        except FileNotFoundError as error:
            above = next(folder for folder in self._root.parents if folder.exists())
            if not os.access(above, os.W_OK):
                self._fail(f"the store folder {self._root} is not there and cannot be made", error)
        except OSError as error:
            self._fail(f"the store folder {self._root} cannot be used", error)

    def _path(self, key: str) -> Path:
        if keys.checked(key).split("/", 1)[0] == _TEMPORARY:
            raise NeuroLoopError(f"{key!r} is no object key", why=f"{_TEMPORARY} holds unfinished writes")
        return self._root / key

    @contextlib.contextmanager
    def _written(self, key: str, data: bytes) -> Iterator[str]:
        """A temporary file that holds `data` on disk; gone at the end unless renamed."""
        temporary = ""
        try:
            _make_folder(self._path(key).parent)
            (self._root / _TEMPORARY).mkdir(exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self._root / _TEMPORARY)
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            yield temporary
        except OSError as error:
            self._fail(f"cannot store {key!r} in {self._root}", error)
        finally:
            if temporary:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def _fail(self, what: str, error: OSError) -> NoReturn:
        kind = OutOfSpace if error.errno in _FULL else Unavailable
        raise kind(
            what, why=error.strerror or str(error), fix="check the folder's permissions and the free disk space"
        ) from error


def _make_folder(folder: Path) -> None:
    """Make `folder` and those above it so that their names, too, survive a power cut."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        _flush_folder(each.parent)


def _flush_folder(folder: Path) -> None:
    """Make a new name in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
