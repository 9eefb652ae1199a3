"""Housekeeping of what is kept of uploads: erasures are finished, retention is kept, leftovers of crashes go."""

import logging
from datetime import timedelta

from neuroloop.bootstrap import Services
from neuroloop.core.errors import NeuroLoopError
from neuroloop.core.schemas import PipelineEnd, now
from neuroloop.loop.handoff import Result, drop_stale
from neuroloop.records import erasure, orphans

LEFTOVER_AGE = timedelta(hours=1)
"""An object without a row may be one whose row is just being written; an hour is longer than any request lasts."""
RETRY_AGE = timedelta(days=1)
"""For so long a client may repeat a request that was never answered; then what its key says of the file goes."""
_LOG = logging.getLogger(__name__)


def tidy(services: Services, *, force: bool = False) -> Result:
    """Do all of it once; how much there was to do. Safe to repeat and to run beside servers and trainings.

    Raises `NeuroLoopError`, at the end and without removing any, where the leftovers are too many to be ones.
    """
    log, store, days = services.log, services.store, services.settings.retention_days
    result: Result = {"erasures_finished": erasure.finish_all(log, store)}
    result["expired"] = erasure.expire(log, store, now() - timedelta(days=days)) if days else 0
    result["claims_forgotten"] = log.forget_claims(now() - RETRY_AGE)
    result["corrections_mended"] = orphans.settle_corrections(log, store) + orphans.bring_back_corrections(log, store)
    drop_stale(services)
    try:
        result["leftovers_removed"] = len(orphans.sweep(log, store, now() - LEFTOVER_AGE, force=force))
    except NeuroLoopError:
        _LOG.error("all but the leftovers is done: %s", result)
        raise
    log.record_end(PipelineEnd(dag="housekeeping", outcome="done", run_id=f"{now():%Y%m%dT%H%M%S}", task="tidy"))
    return result
