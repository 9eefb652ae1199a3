"""Data versions over time: which were accepted in what order, and how to bring one back."""

import contextlib
import hashlib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from pydantic import Field

from neuroloop.bootstrap import Services
from neuroloop.core import keys
from neuroloop.core.errors import AlreadyExists, InvalidSource, NotFound
from neuroloop.core.ports import ObjectStore
from neuroloop.core.schemas import ModelVersion, Record, Snapshot, now
from neuroloop.data.comparison import Comparison, compare
from neuroloop.data.statistics import Statistics
from neuroloop.loop import feedback
from neuroloop.loop.feedback import Correction
from neuroloop.loop.handoff import RETRAINING, kept


class Accepted(Record):
    """A data version that a build went on with."""

    version: str
    simulated: bool
    source: str = Field(description="the data URL it came from")
    run_id: str
    at: datetime = Field(default_factory=now)


def accepted(store: ObjectStore) -> list[Accepted]:
    """All accepted data versions, oldest first; one that came back stands there again."""
    return [Accepted.model_validate_json(store.get(key)) for key in store.list(keys.HISTORY)]


def accept(store: ObjectStore, snapshot: Snapshot, run_id: str) -> None:
    """Note that a run goes on with a data version; nothing happens where it is the latest of its kind already."""
    while True:
        key = keys.accepted_version(keys.next_number(store.list(keys.HISTORY)))
        history = accepted(store)
        own = [each for each in history if each.simulated == snapshot.simulated]
        if own and own[-1].version == snapshot.version:
            return
        entry = Accepted(version=snapshot.version, simulated=snapshot.simulated, source=snapshot.source, run_id=run_id)
        try:
            store.create(key, entry.model_dump_json().encode(), content_type="application/json")
        except AlreadyExists:
            continue
        return


def previous(store: ObjectStore, snapshot: Snapshot) -> str | None:
    """The version accepted before this one, simulated or real like it; None for the first.

    The same before and after `accept`, so that a repeated step compares with the same version again.
    """
    others = [
        each.version
        for each in accepted(store)
        if each.simulated == snapshot.simulated and each.version != snapshot.version
    ]
    known = (v for v in reversed(others) if store.exists(keys.statistics(v)) and store.exists(keys.snapshot(v)))
    return next(known, None)


def compare_with_previous(store: ObjectStore, snapshot: Snapshot, statistics: Statistics) -> Comparison | None:
    """What changed since the version accepted before; None for the first of its kind."""
    version = previous(store, snapshot)
    if version is None:
        return None
    before = Snapshot.model_validate_json(store.get(keys.snapshot(version)))
    earlier = Statistics.model_validate_json(store.get(keys.statistics(version)))
    return compare(before, snapshot, earlier, statistics)


class Restored(Record):
    """What `restore` brought back."""

    version: str = Field(description="data version")
    corrections: int = Field(default=0, description="corrected uploads that the model was trained on besides")
    missing: int = Field(default=0, description="of those, how many are no longer there: erased, or taken back")
    unknown: bool = Field(default=False, description="it learned from corrections, and which was not kept")


def restore(services: Services, folder: Path, *, version: str = "", model: str = "") -> Restored:
    """Bring exactly the images of a data version to `folder/data`, and verify every one.

    Without `version` it is the one that the registered model version `model` was trained on, without both the
    champion's; of a retrained model the corrections come as well, to `folder/corrections/<class>/`. Raises `NotFound`
    for an unknown model or version, `InvalidSource` where a file is not the snapshot's, or one that is of no version
    would be removed.
    """
    trained = None if version else _model(services, model)
    version = trained.tags["data_version"] if trained else version
    try:
        data_dvc = services.store.get(keys.data_dvc(version))
        snapshot = Snapshot.model_validate_json(services.store.get(keys.snapshot(version)))
    except NotFound as error:
        raise NotFound(f"there is no data version {version}", why=str(error), fix="check the version") from error
    wanted = {image.path: image.sha256 for image in snapshot.images}
    if strangers := _strangers(services, folder / "data", wanted):
        raise InvalidSource(
            f"{folder / 'data'} holds files that are of no data version",
            why=f"{len(strangers)} files would be removed or overwritten, first {strangers[0]}",
            fix="restore into an empty folder (--to), or move them away",
        )
    services.versions.restore(data_dvc, folder)
    there = {path.relative_to(folder / "data").as_posix(): path for path in _files(folder / "data")}
    wrong = sorted(there.keys() ^ wanted.keys()) or [
        path for path, file in sorted(there.items()) if hashlib.sha256(file.read_bytes()).hexdigest() != wanted[path]
    ]
    if wrong:
        raise InvalidSource(
            f"{folder / 'data'} is not data version {version}",
            why=f"{len(wrong)} files are missing, too many or different, first {wrong[0]}",
            fix="restore into an empty folder",
        )
    return _with_corrections(services, folder, Restored(version=version), trained)


def _with_corrections(services: Services, folder: Path, done: Restored, trained: ModelVersion | None) -> Restored:
    """The corrections of a retrained model too, under the classes that it learned them by."""
    if trained is None or trained.tags.get("pipeline") != RETRAINING:
        return done
    try:
        found = kept(services, trained.tags["pipeline_run"], "corrections")["trained_on"]
    except (KeyError, NotFound):
        return done.model_copy(update={"unknown": True})
    learned = [Correction.model_validate(each) for each in found]
    there = feedback.by_name(services.store.list(keys.CORRECTIONS))
    target = folder / "corrections"
    wanted = {target / each.label / each.name: each for each in learned}
    if surplus := sorted(set(_files(target)) - wanted.keys()):
        raise InvalidSource(
            f"{target} holds what the model was not trained on",
            why=f"{len(surplus)} files, first {surplus[0].relative_to(target)}",
            fix="restore into an empty folder",
        )
    allowed = {each.name for each in feedback.allowed(services.log, learned)}
    count = 0
    for file, each in wanted.items():
        data = b""
        with contextlib.suppress(NotFound):  # taken back at this moment
            if each.name in allowed and each.name in there:
                data = services.store.get(there[each.name])
        if hashlib.sha256(data).hexdigest() == each.sha256:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            count += 1
        else:
            file.unlink(missing_ok=True)
    return done.model_copy(update={"corrections": count, "missing": len(learned) - count})


def _model(services: Services, model: str) -> ModelVersion:
    if model:
        found = next((each for each in services.registry.versions() if each.version == model), None)
        if found is None:
            raise NotFound(f"there is no model version {model}", fix="MLflow's page of the registered model lists them")
    else:
        found = services.registry.by_alias("champion")
        if found is None:
            raise NotFound("there is no champion", fix="name a data version with --version, or a model with --model")
    return found


def _strangers(services: Services, data: Path, wanted: Mapping[str, str]) -> list[str]:
    """The files in a folder that no data version has, by name and content; hidden ones count for nothing."""
    files = {path.relative_to(data).as_posix(): path for path in _files(data) if not path.name.startswith(".")}
    found = {(name, hashlib.sha256(path.read_bytes()).hexdigest()) for name, path in files.items()} - wanted.items()
    for each in services.store.list(keys.VERSIONS) if found else ():
        if each == keys.snapshot(each.removeprefix(keys.VERSIONS).partition("/")[0]):
            others = Snapshot.model_validate_json(services.store.get(each)).images
            found -= {(image.path, image.sha256) for image in others}
    return sorted(name for name, _ in found)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
