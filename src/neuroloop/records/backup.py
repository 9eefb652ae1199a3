"""One backup: both databases and every object of the store, with hashes, and the way back into an empty stack.

```
<backup>/manifest.json                       written last: a folder without it is no backup
<backup>/databases/<name>/<table>/000001.copy
<backup>/objects/<key>                       the store as it stands: images, corrections, batches, data versions, models
```

The databases are dumped first, each as of one moment, then the objects are copied: the platform stores an object
before the row that names it, so what the rows name is there. What is erased while the copying goes on would be missed:
then the databases are dumped anew, until rows and objects agree. No row names a corrected copy, and it moves when a
reader changes the class: the copies are listed again after the copying, a few times at most, until none has moved or
come meanwhile. What came after the last dump and belongs to no row of it is left out: once restored, nobody could erase
it, and corrected copies would be trained on. The prediction log is dumped before MLflow's database, so that the ledger
names no version that the registry lacks. Airflow's own database is not in it, nor are the logs of its tasks: its
history of runs is no part of the loop, whose steps and batches stand in the store.
"""

import hashlib
import logging
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

from pydantic import Field, ValidationError

from neuroloop import __version__
from neuroloop.core import keys
from neuroloop.core.errors import AlreadyExists, NeuroLoopError, NotFound
from neuroloop.core.ports import Database, ObjectStore
from neuroloop.core.schemas import DatabaseDump, Record, now
from neuroloop.records.orphans import prediction_id

MANIFEST = "manifest.json"
UNFINISHED = "restore-unfinished.json"
"""In the store while a restore goes on: with it the same restore may be repeated after it broke off."""
_FORMAT = 1
_ATTEMPTS = 4
_AT_ONCE = 8
_LOG = logging.getLogger(__name__)
Say = Callable[[str], None]


class CopiedObject(Record):
    """One object of the store."""

    sha256: str
    size: int = Field(ge=0, description="bytes")


class Manifest(Record):
    """What a backup holds."""

    format: int = _FORMAT
    made_at: datetime = Field(default_factory=now)
    program: str = Field(default=__version__, description="the NeuroLoop that made it")
    databases: dict[str, DatabaseDump]
    objects: dict[str, CopiedObject]
    missing: tuple[str, ...] = Field(description="what rows name and the store had not: lost before the backup")
    mlflow_elsewhere: str = Field("", description="where MLflow kept its files, if outside of the store: not in it")

    @property
    def rows(self) -> int:
        """Rows of all tables."""
        return sum(table.rows for dump in self.databases.values() for table in dump.tables)

    @property
    def size(self) -> int:
        """Bytes of all objects."""
        return sum(each.size for each in self.objects.values())


class _Progress(Record):
    """What of a restore is done."""

    made_at: datetime
    loaded: tuple[str, ...] = ()


def backup(
    databases: Mapping[str, Database], store: ObjectStore, target: ObjectStore, *, say: Say, mlflow_elsewhere: str = ""
) -> Manifest:
    """Copy everything into the empty `target`, while the platform runs. Raises `AlreadyExists`, `Unavailable`.

    `mlflow_elsewhere` is where MLflow keeps its files, if outside of the store: noted, not copied.
    """
    if target.list(""):
        raise AlreadyExists("the backup's folder is not empty", fix="name another one")
    copied: dict[str, CopiedObject] = {}
    lost: set[str] = set()
    for attempt in range(1, _ATTEMPTS + 1):
        for key in target.list("databases/"):  # of the attempt before: what was erased since must not stay in it
            target.delete(key)
        there = _kept(store)
        dumps = {name: _dumped(name, database, target) for name, database in databases.items()}
        say(f"databases: {sum(table.rows for dump in dumps.values() for table in dump.tables):,} rows")
        _copy_all(store, target, copied)
        say(f"objects: {len(copied):,}")
        rows = {column: _column(dumps, column, target) for column in ("object_key", "id")}
        missing = rows["object_key"] - copied.keys()
        if missing <= lost:  # nobody moved them: they were not there before either
            break
        lost = missing
        say(f"{len(missing)} objects went while they were copied: once more (attempt {attempt})")
    for key in [key for key in copied.keys() - there if _of_a_later_row(key, rows["id"])]:
        target.delete(_object(key))
        del copied[key]
    manifest = Manifest(
        databases=dumps, objects=copied, missing=tuple(sorted(missing)), mlflow_elsewhere=mlflow_elsewhere
    )
    for key in manifest.missing:
        _LOG.warning("%s is named by a row and was not in the store", key)
    target.create(MANIFEST, manifest.model_dump_json(indent=1).encode(), content_type="application/json")
    return manifest


def read_manifest(source: ObjectStore) -> Manifest:
    """The manifest of a backup. Raises `NotFound` where it is none, `NeuroLoopError` where it is damaged."""
    try:
        return Manifest.model_validate_json(source.get(MANIFEST))
    except NotFound:
        raise NotFound(
            "there is no whole backup here", why=f"it has no {MANIFEST}", fix="name the folder of one backup"
        ) from None
    except (ValueError, ValidationError) as error:
        raise NeuroLoopError(
            "the backup's manifest cannot be read",
            why=f"it is damaged, or of a later version than {__version__}: {str(error).splitlines()[0]}",
            fix="restore it with the version that made it",
        ) from None


def restore(databases: Mapping[str, Database], store: ObjectStore, source: ObjectStore, *, say: Say) -> Manifest:
    """Bring a backup into an empty store and empty databases; every hash is compared.

    After it broke off, the same restore goes on. Raises `AlreadyExists` where something is there, before anything is
    written.
    """
    manifest = read_manifest(source)
    if manifest.databases.keys() != databases.keys():
        raise NeuroLoopError(
            f"the backup holds the databases {', '.join(manifest.databases)}", why=f"asked for: {', '.join(databases)}"
        )
    progress = _begun(databases, store, manifest)
    there = set(store.list(""))
    _LOG.info("restoring the backup of %s", manifest.made_at)
    wanted = [key for key in sorted(manifest.objects) if key not in there]
    _bring(source, store, wanted, manifest.objects)
    for key in sorted(there & manifest.objects.keys()):
        _compare(key, store.get(key), manifest.objects[key])
    say(f"objects: {len(manifest.objects):,}")
    for name, database in databases.items():
        if name not in progress.loaded:
            database.load(manifest.databases[name], lambda part, name=name: source.get(_part(name, part)))  # type: ignore[misc]
            progress = progress.model_copy(update={"loaded": (*progress.loaded, name)})
            store.put(UNFINISHED, progress.model_dump_json().encode())
    say(f"databases: {manifest.rows:,} rows")
    store.delete(UNFINISHED)
    return manifest


def _begun(databases: Mapping[str, Database], store: ObjectStore, manifest: Manifest) -> _Progress:
    """The marker of this restore, new or as it broke off. Raises `AlreadyExists`."""
    there = store.list("")
    goes_on = UNFINISHED in there
    if goes_on:
        progress = _Progress.model_validate_json(store.get(UNFINISHED))
        strangers = [key for key in there if key not in manifest.objects and key != UNFINISHED]
        if progress.made_at != manifest.made_at or strangers:
            raise AlreadyExists("another restore broke off here", fix="empty the store and the databases")
    else:
        if there:
            raise AlreadyExists(
                f"the store is not empty: {len(there)} objects, such as {there[0]}",
                why="a restore would mix two histories",
                fix="name an empty one in NEUROLOOP_STORE_URL",
            )
        progress = _Progress(made_at=manifest.made_at)
    for name, database in databases.items():
        if name in progress.loaded or database.empty():
            continue
        why = "a part of the platform has started on it, or it is in use"
        if goes_on:  # perhaps it broke off between the rows, which come all or none, and their note in the marker
            if _holds(database, manifest.databases[name]):
                progress = progress.model_copy(update={"loaded": (*progress.loaded, name)})
                continue
            why = f"it holds other rows than the backup: {why}"
        raise AlreadyExists(
            f"the database {name} is not empty",
            why=why,
            fix="stop all parts but PostgreSQL, and make the database anew",
        )
    store.put(UNFINISHED, progress.model_dump_json().encode())
    return progress


def _holds(database: Database, dump: DatabaseDump) -> bool:
    """Whether all tables of a database are, row by row, those of a dump."""
    found = database.dump(lambda part, data: None)
    return [(each.name, each.rows, each.sha256) for each in found.tables] == [
        (each.name, each.rows, each.sha256) for each in dump.tables
    ]


def _kept(store: ObjectStore) -> set[str]:
    """The keys of all that a backup holds of the store."""
    return {key for key in store.list("") if not key.startswith(keys.TASK_LOGS)}


def _dumped(name: str, database: Database, target: ObjectStore) -> DatabaseDump:
    return database.dump(lambda part, data: target.put(_part(name, part), data))


def _column(dumps: Mapping[str, DatabaseDump], column: str, target: ObjectStore) -> set[str]:
    """What stands in this column of the predictions, the table whose rows name objects."""
    found = set()
    for name, dump in dumps.items():
        for table in dump.tables:
            if "object_key" in table.columns:
                index = table.columns.index(column)
                for part in table.parts:
                    # Not splitlines(): a name may hold what Unicode counts as the end of a line; COPY leaves it there.
                    lines = target.get(_part(name, part.name)).decode().split("\n")
                    found |= {line.split("\t")[index] for line in lines if line}
    return found


def _of_a_later_row(key: str, ids: Collection[str]) -> bool:
    """Whether this is the image, or the corrected copy, of a prediction that is not among these."""
    own = prediction_id(key) if key.startswith((keys.PREDICTIONS, keys.INVALID, keys.CORRECTIONS)) else None
    return own is not None and own not in ids


def _copy_all(store: ObjectStore, target: ObjectStore, copied: dict[str, CopiedObject]) -> None:
    """Bring `copied`, and what lies in the target, up to what the store holds.

    A corrected copy is put under its new class before the old one goes, so one that moves, even while a listing is
    made, is in the next.
    """
    wanted = there = _kept(store)
    for _ in range(_ATTEMPTS):
        copied |= _copy(store, target, sorted(wanted - copied.keys()))
        before, there = there, _kept(store)
        # Away in between, such as one that was erased: it must not live on in the backup.
        for key in copied.keys() - there:
            target.delete(_object(key))
            del copied[key]
        wanted = {key for key in (before - there) | (there - copied.keys()) if key.startswith(keys.CORRECTIONS)}
        if not wanted:
            return
    _LOG.warning("corrected copies kept moving; after a restore, housekeeping brings back those that were missed")


def _copy(store: ObjectStore, target: ObjectStore, wanted: list[str]) -> dict[str, CopiedObject]:
    """Copy the objects that are still there, several at a time."""

    def one(key: str) -> tuple[str, CopiedObject] | None:
        try:
            data = store.get(key)
        except NotFound:
            return None
        target.put(_object(key), data)
        return key, CopiedObject(sha256=hashlib.sha256(data).hexdigest(), size=len(data))

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(found for found in pool.map(one, wanted) if found)


def _bring(source: ObjectStore, store: ObjectStore, wanted: list[str], objects: Mapping[str, CopiedObject]) -> None:
    def one(key: str) -> None:
        data = source.get(_object(key))
        _compare(key, data, objects[key])
        store.put(key, data)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(one, wanted))


def _compare(key: str, data: bytes, known: CopiedObject) -> None:
    if hashlib.sha256(data).hexdigest() != known.sha256:
        raise NeuroLoopError(f"{key} of the backup is damaged", why="its hash is not the manifest's")


def _object(key: str) -> str:
    return f"objects/{key}"


def _part(database: str, part: str) -> str:
    return f"databases/{database}/{part}"
