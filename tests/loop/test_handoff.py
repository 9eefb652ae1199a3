"""What a try of a task leaves for the next try of the same task."""

import os
import time
from pathlib import Path

import pytest

from neuroloop.bootstrap import Services
from neuroloop.core.errors import NeuroLoopError, NotFound
from neuroloop.core.settings import Settings
from neuroloop.loop import handoff, retraining


@pytest.fixture
def services(tmp_path: Path, smtp_sink, postgres_url: str) -> Services:
    return Services(Settings(home=tmp_path, notify_url=smtp_sink.url, database_url=postgres_url))


def test_what_the_first_try_settled_holds_for_every_later_one_of_the_run(services: Services):
    for version in ("1", "2"):
        assert handoff.settled(services, "run", "start", lambda version=version: {"version": version}) == {
            "version": "1"
        }
    assert handoff.settled(services, "another run", "start", lambda: {"version": "2"}) == {"version": "2"}


def test_a_retraining_that_does_not_happen_is_mailed_once_a_run_however_often_the_task_is_tried(
    services: Services, smtp_sink
):
    for run_id in ("manual__1", "manual__1", "manual__2"):
        handoff.keep(services, run_id, "check_source_flag", {"waiting": 50, "reason": "50 corrections wait."})
        retraining.flag_false(services, run_id, by_hand=True)
    assert [mail.body.split()[1] for mail in smtp_sink.mails()] == ["manual__1", "manual__2"]


def test_what_a_run_that_never_ended_left_goes_after_a_week_and_no_other(services: Services):
    kinds = [f"runs/{run}/{kind}" for run in ("old", "new") for kind in ("shards/000-000000.npz", "looks/1.npz")]
    for key in (*kinds, "runs/old/check_source.json"):
        services.store.put(key, b"x")
    week_ago = time.time() - 8 * 86_400
    for key in (*kinds[:2], "runs/old/check_source.json"):
        os.utime(tmp_of(services) / key, (week_ago, week_ago))
    again = "runs/cleared/train/000001.npz"  # of a task that was cleared, and works anew
    services.store.put(again, b"x")
    os.utime(tmp_of(services) / again, (week_ago, week_ago))
    handoff.in_use(services, "cleared")
    handoff.drop_stale(services)
    left = {key for key in services.store.list("runs/") if "cleared" not in key}
    assert left == {*kinds[2:], "runs/old/check_source.json"}
    assert services.store.exists(again)


def tmp_of(services: Services) -> Path:
    return Path(services.settings.store.removeprefix("file://"))


def test_a_training_whose_images_are_gone_says_what_to_do(services: Services):
    with pytest.raises(NotFound, match=r"manual__9 has no training images.*trigger a new run"):
        handoff.training_shards(services, "manual__9")


def test_two_dags_cannot_share_a_run_id(services: Services):
    for _ in range(2):
        handoff.begin(services, "release-1", handoff.BUILD)
    with pytest.raises(NeuroLoopError, match=f"run release-1 of {handoff.BUILD} before"):
        retraining.check_source_flag(services, "release-1")
