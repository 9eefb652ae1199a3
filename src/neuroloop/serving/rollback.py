"""A person makes another version the champion, as a rule the one before; servers follow within seconds."""

import logging
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

from neuroloop.bootstrap import Services
from neuroloop.core.errors import Busy, InvalidBundle, NeuroLoopError, NotFound
from neuroloop.core.ports import Registry
from neuroloop.core.schemas import Check, ModelVersion, Promotion, now
from neuroloop.model.bundle import BUNDLE_TAG, Bundle

_LOG = logging.getLogger(__name__)


class NotPromotable(NeuroLoopError):
    """A version that must not become, or already is, the champion."""


class LedgerBehind(NeuroLoopError):
    """The champion is another, and the ledger has no row of it."""


def make_champion(
    services: Services, version: str | None, *, by: str, reason: str, wanted: Callable[[], bool] = lambda: True
) -> Promotion:
    """Point `champion` at `version` (None: at what `previous` names) and `previous` at the champion there was.

    The version is fetched and verified first, so that no server is sent after a broken one, and the ledger gets a row
    that says who did it and why. Nothing moves where another became the champion meanwhile, or it is no longer
    `wanted`. Raises `NotFound`, `NotPromotable`, `InvalidBundle` and `Unavailable`; then the champion has not moved,
    unless the registry went away in the midst of it. Raises `LedgerBehind` where the database goes away once it has.
    """
    registry = services.registry
    champion = registry.by_alias("champion")
    target = _target(services, version, champion)
    if champion is not None and champion.version == target.version:
        raise NotPromotable(f"Version {target.version} is the champion already", fix="name another version")
    _verify(services, target)
    services.log.check()
    before = champion.version if champion else None
    step = f"from version {before} to version {target.version}" if before else f"to version {target.version}"
    row = Promotion(
        run_id=f"by-hand-{now():%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}",
        version=target.version,
        previous=before,
        promoted=True,
        checks=(Check(name="by_hand", passed=True, reason=f"{by} went {step}: {reason.rstrip('.')}."),),
    )
    latest = registry.by_alias("champion")
    if (latest and latest.version) != before:
        raise NotPromotable(
            "The champion has changed meanwhile, so nothing was changed",
            why=f"it was {f'version {before}' if before else 'none'} when this was asked",
            fix="look at the Models page, and ask again if it is still right",
        )
    if not wanted():
        raise Busy("Nothing was changed", why="it took longer than anybody waits to verify it", fix="try again shortly")
    _move(registry, target.version, before)
    try:
        services.log.record_promotion(row)
    except NeuroLoopError as error:
        _LOG.exception("version %s is the champion, and the ledger has no row of it", target.version)
        raise LedgerBehind(
            f"Version {target.version} is the champion now, but the ledger does not say so",
            fix="repeat it the other way round and back once the database answers",
        ) from error
    return row


def _move(registry: Registry, version: str, before: str | None) -> None:
    """`previous` first, so that the way back is known whenever the champion is another."""
    was = registry.by_alias("previous")
    try:
        if before:
            registry.set_alias("previous", before)
        registry.set_alias("champion", version)
    except NeuroLoopError:
        if (champion := registry.by_alias("champion")) and champion.version == version:
            return  # only the answer was lost
        if before and was:
            registry.set_alias("previous", was.version)
        raise


def _target(services: Services, version: str | None, champion: ModelVersion | None) -> ModelVersion:
    if version is None:
        found = services.registry.by_alias("previous")
        if found and champion and found.version == champion.version:  # a move broke off: the ledger knows the way
            found = _before(services, champion.version)
        if found is None:
            raise NotFound(
                "There is no previous champion to go back to",
                why="the registry has no alias previous that is another version",
                fix="name a version with --to",
            )
        return found
    for each in services.registry.versions():
        if each.version == version:
            return each
    raise NotFound(f"There is no model version {version}", fix="the Models page lists them")


def _before(services: Services, version: str) -> ModelVersion | None:
    """The champion before `version`, as the latest promotion of that says."""
    known = (row.previous for row in services.log.promotions() if row.promoted and row.version == version)
    previous = next(known, None)
    return next((each for each in services.registry.versions() if each.version == previous), None)


def _verify(services: Services, target: ModelVersion) -> None:
    with tempfile.TemporaryDirectory(prefix="neuroloop-rollback-") as folder:
        try:
            files = services.registry.download_bundle(target.version, Path(folder))
            bundle = Bundle.load(files, sha256=target.tags.get(BUNDLE_TAG))
        except InvalidBundle as error:
            raise NotPromotable(
                f"Version {target.version} cannot be served, so nothing was changed", why=str(error), fix="name another"
            ) from error
        except NotFound as error:  # its own words name the registry's address
            raise NotPromotable(
                f"Version {target.version} cannot be served, so nothing was changed",
                why="the registry has no bundle of it",
                fix="name another",
            ) from error
    if bundle.manifest.split == "legacy":
        raise NotPromotable(
            f"Version {target.version} was built on the source's own split, so it is never served",
            why="its training data has twins of its test images",
            fix="name a version of the frozen split",
        )
