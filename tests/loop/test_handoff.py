"""What a try of a task leaves for the next try of the same task."""

from pathlib import Path

import pytest

from neuroloop.bootstrap import Services
from neuroloop.core.errors import NeuroLoopError
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


def test_two_dags_cannot_share_a_run_id(services: Services):
    for _ in range(2):
        handoff.begin(services, "release-1", handoff.BUILD)
    with pytest.raises(NeuroLoopError, match=f"run release-1 of {handoff.BUILD} before"):
        retraining.check_source_flag(services, "release-1")
