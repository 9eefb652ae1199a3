"""From readers' verdicts over HTTP to retrainings: how many start, however many come at once."""

import itertools
from concurrent.futures import ThreadPoolExecutor

from neuroloop.bootstrap import Services
from neuroloop.loop import feedback, retraining
from records.test_leftovers import recorded
from serving.running import Api, serving

READERS = ("ann", "ben", "cem", "dot")


def predictions(services: Services, count: int) -> list[str]:
    return [recorded(services.log, services.store).id for _ in range(count)]


def correct(api: Api, ids: list[str]) -> None:
    """All at once, as far as twenty connections go."""
    with ThreadPoolExecutor(20) as pool:
        said = zip(ids, itertools.cycle(READERS))
        answers = list(pool.map(lambda one: api.feedback(one[0], "correct", "pituitary", one[1]), said))
    assert {answer.status_code for answer in answers} == {200}


def trigger(services: Services, run_id: str) -> bool:
    """A run with connections of its own, as far as its batch; whether it goes on to train."""
    outside = Services(services.settings)
    return retraining.check_source_flag(outside, run_id)["go"] and bool(retraining.flag_true(outside, run_id))


def five_triggers(services: Services, name: str) -> int:
    """How many of five runs that are triggered at once go on to train."""
    with ThreadPoolExecutor(5) as pool:
        return sum(pool.map(lambda number: trigger(services, f"{name}-{number}"), range(5)))


def test_fifty_start_nothing_one_more_one_run_and_two_hundred_at_once_another(services: Services):
    ids = predictions(services, 251)
    with serving(services, model=False) as api:
        correct(api, ids[:50])
        assert five_triggers(services, "fifty") == 0
        correct(api, ids[50:51])
        assert five_triggers(services, "fifty-one") == 1
        correct(api, ids[51:])
        assert five_triggers(services, "two-hundred") == 1
        assert five_triggers(services, "again") == 0
    assert [len(batch.corrections) for batch in feedback.batches(services.store)] == [51, 200]


def test_triggers_in_the_midst_of_two_hundred_verdicts_use_none_twice_and_lose_none(services: Services):
    ids = predictions(services, 200)
    with serving(services, model=False) as api, ThreadPoolExecutor(1) as aside:
        arriving = aside.submit(correct, api, ids)
        started = 0
        for number in itertools.count():
            done = arriving.done()  # before the triggers: the last ones see every verdict
            started += five_triggers(services, f"round-{number}")
            if done:
                break
        arriving.result()
    batches = feedback.batches(services.store)
    used = [key for batch in batches for key in batch.corrections]
    assert len(batches) == started >= 1
    assert all(len(batch.corrections) > 50 for batch in batches)
    assert len(used) == len(set(used))
    assert len(used) + len(feedback.waiting(services.store)) == 200
    assert len(feedback.waiting(services.store)) <= 50
