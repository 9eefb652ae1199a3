"""When a retraining starts: by count, and once, however many triggers there are at once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from neuroloop.bootstrap import Services
from neuroloop.core import keys
from neuroloop.core.schemas import Feedback, Verdict
from neuroloop.core.settings import Settings
from neuroloop.loop import retraining
from neuroloop.records import corrections, erasure
from records.test_leftovers import recorded


@pytest.fixture
def services(tmp_path: Path, postgres_url: str) -> Services:
    return Services(Settings(home=tmp_path, database_url=postgres_url, notify_url="smtp://127.0.0.1:9"))


def correct(services: Services, count: int) -> list[str]:
    """Recorded corrections, as readers leave them."""
    rows = [recorded(services.log, services.store) for _ in range(count)]
    for row in rows:
        services.log.record_feedback(
            Feedback(prediction_id=row.id, reader="ann", verdict=Verdict.CORRECT, label="pituitary")
        )
        corrections.settle(services.log, services.store, row)
    return [row.id for row in rows]


def trigger(services: Services, run_id: str) -> bool:
    """A run as far as its batch; whether it goes on to train."""
    return retraining.check_source_flag(services, run_id)["go"] and bool(retraining.flag_true(services, run_id))


def test_fifty_start_nothing_one_more_starts_one_run_and_a_hundred_and_fifty_more_one_other(services: Services):
    correct(services, 50)
    assert not trigger(services, "run-1")
    correct(services, 1)
    assert trigger(services, "run-2")
    assert not trigger(services, "run-3")
    correct(services, 150)
    assert trigger(services, "run-4")
    assert not trigger(services, "run-5")
    assert services.store.list(keys.BATCHES) == [keys.batch(1), keys.batch(2)]


def test_five_triggers_at_once_with_two_hundred_corrections_are_one_run(services: Services):
    correct(services, 200)
    with ThreadPoolExecutor(5) as pool:
        went = list(pool.map(lambda n: trigger(services, f"run-{n}"), range(5)))
    assert sum(went) == 1
    assert services.store.list(keys.BATCHES) == [keys.batch(1)]


def test_a_killed_task_that_is_tried_again_has_the_same_batch(services: Services):
    correct(services, 51)
    first = retraining.flag_true(services, "run-1")
    correct(services, 60)
    assert retraining.check_source_flag(services, "run-1")["go"]
    assert retraining.flag_true(services, "run-1") == first


def test_erased_and_doubled_copies_do_not_count(services: Services):
    ids = correct(services, 51)
    services.store.put(keys.correction("notumor", ids[0]), b"left by a killed server")
    erasure.erase(services.log, services.store, ids[1], reason="mistake", by="ann")
    services.store.put(keys.correction("pituitary", ids[1]), b"left by a killed server")
    found = retraining.check_source_flag(services, "run-1")
    assert (found["waiting"], found["go"]) == (50, False)
