"""What the loop's figures are made of."""

from datetime import UTC, datetime, timedelta

import httpx
import numpy as np
import pytest

from neuroloop.bootstrap import Services
from neuroloop.core.credentials import new_key
from neuroloop.core.schemas import LABELS, LiveAnswer, PipelineEnd
from neuroloop.serving.loop_metrics import FRESH_SECONDS, LoopMetrics, drift, last_ends
from neuroloop.serving.metrics import Metrics
from serving.running import serving

START = datetime(2026, 1, 1, tzinfo=UTC)


def end(outcome: str, hour: int, task: str = "send_email") -> PipelineEnd:
    at = START + timedelta(hours=hour)
    return PipelineEnd(dag="model_retraining", outcome=outcome, run_id=f"r{hour}", task=task, ended_at=at)


@pytest.mark.parametrize(
    ("ends", "last"),
    [
        ([end("nothing_to_do", 1)], "nothing_to_do"),
        ([end("promoted", 1), end("nothing_to_do", 2)], "promoted"),
        ([end("failed", 2, "retrain_model"), end("promoted", 1), end("nothing_to_do", 3)], "failed"),
        ([end("failed", 2, "retrain_model"), end("not_promoted", 3)], "not_promoted"),
        ([end("failed", 2, "check_source_flag"), end("nothing_to_do", 3)], "nothing_to_do"),
        ([end("failed", 3, "check_source_flag"), end("nothing_to_do", 2)], "failed"),
    ],
)
def test_a_failed_retraining_counts_until_a_run_has_done_what_it_failed_at(ends, last):
    assert [each.outcome for each in last_ends(ends)] == [last]


def answers(rng, count: int, *, probability: float, label: str | None = None) -> list[LiveAnswer]:
    return [
        LiveAnswer(
            label=label or LABELS[rng.integers(4)],
            largest_probability=float(np.clip(rng.normal(probability, 0.05), 0, 1)),
            gate_score=float(np.clip(rng.normal(0.9, 0.03), 0, 1)),
        )
        for _ in range(count)
    ]


def test_what_moved_stands_out_and_what_did_not_stays_within_chance():
    rng = np.random.default_rng(0)
    first = answers(rng, 1000, probability=0.9)
    same = drift(first, answers(rng, 500, probability=0.9))
    assert all(index <= chance for index, chance in same.values())
    moved = drift(first, answers(rng, 500, probability=0.7, label="notumor"))
    for figure in ("class", "largest probability"):
        assert moved[figure][0] > 0.25
        assert moved[figure][0] > moved[figure][1]
    assert moved["gate score"][0] <= moved["gate score"][1]


def test_of_few_answers_nothing_is_said():
    assert set(drift([], []).values()) == {(0.0, 0.0)}


def test_a_database_that_is_away_costs_the_figures_and_is_told(services, postgres_server):
    now = [0.0]
    metrics = Metrics()
    loop = LoopMetrics(services, metrics, clock=lambda: now[0])
    loop.refresh()
    assert b"neuroloop_loop_up 1.0" in metrics.exposition()
    postgres_server.stop()
    try:
        loop.refresh()  # fresh enough
        assert b"neuroloop_loop_up 1.0" in metrics.exposition()
        now[0] += FRESH_SECONDS + 1
        loop.refresh()
        assert b"neuroloop_loop_up 0.0" in metrics.exposition()
    finally:
        postgres_server.start()
    now[0] += FRESH_SECONDS + 1
    loop.refresh()
    assert b"neuroloop_loop_up 1.0" in metrics.exposition()


def test_a_metrics_key_opens_the_metrics_and_nothing_else(services, champion):
    key = new_key()
    far = {"X-Forwarded-For": "203.0.113.9"}
    settings = services.settings.model_copy(update={"metrics_key": key})
    with serving(Services(settings)) as api:
        for shown, status in ((key, 200), (new_key(), 401), ("none", 401)):
            headers = far | {"Authorization": f"Bearer {shown}"}
            with httpx.Client(base_url=f"http://127.0.0.1:{api.port}", headers=headers) as scraper:
                assert scraper.get("/metrics").status_code == status
                assert scraper.get("/v1/model").status_code == 401
