"""What the loop tells Prometheus: read from database and store when a server is asked for its metrics.

The loop's steps are short-lived processes on any worker, so there is nothing of theirs to scrape. What they have to
say stands in the database anyway, and every server reads the same there: no gateway keeps figures of the dead, and
dashboards take the `max` over the servers, never the `sum`.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from neuroloop.bootstrap import Services
from neuroloop.core.errors import NeuroLoopError
from neuroloop.core.schemas import LABELS, LiveAnswer, LoopFigures, PipelineEnd
from neuroloop.records import corrections
from neuroloop.serving.metrics import Metrics

FRESH_SECONDS = 30.0
"""For so long figures are shown without asking again: scrapes come every 15 s, from more than one Prometheus."""
_CHECKS = ("check_source_flag", "flag_false")
"""Tasks that only count corrections: their failure is over as soon as another run has counted."""
_BINS = 20
_LOG = logging.getLogger(__name__)


class LoopMetrics:
    """The loop's gauges among a server's metrics. Thread-safe."""

    def __init__(self, services: Services, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._services, self._clock = services, clock
        self._asked_at = -FRESH_SECONDS
        self._asking = threading.Lock()
        self._batches: dict[str, bytes] = {}
        gauge = metrics.gauge
        self._up = gauge("loop_up", "Whether database and store told the loop's figures when last asked")
        self._waiting = gauge("corrections_waiting", "Corrected images that no retraining has used")
        self._threshold = gauge("corrections_threshold", "A retraining starts at strictly more than this")
        self._outcome = gauge("pipeline_last_outcome", "1 for how the last run of a DAG ended", "dag", "outcome")
        self._ended = gauge("pipeline_last_end_timestamp_seconds", "When a DAG last ended so", "dag", "outcome")
        self._macro_f1 = gauge("ledger_macro_f1", "On the frozen test part, of the ledger's latest row", "model")
        self._accuracy = gauge(
            "live_accuracy", "Share of the answers that readers looked at in 30 days and confirmed", "model_version"
        )
        self._reviewed = gauge(
            "live_reviewed", "Predictions that readers confirmed or corrected in 30 days", "model_version"
        )
        self._psi = gauge("drift_psi", "Population stability index, latest answers against the model's first", "figure")
        self._chance = gauge("drift_chance", "What the index stays under in 99 of 100 cases without drift", "figure")
        self._erasures = gauge("erasures_unfinished", "Erasures that were promised and are not finished")

    def refresh(self) -> None:
        """Ask anew unless that was just done. Raises nothing; the figures of before stay where nobody answers."""
        with self._asking:
            if self._clock() - self._asked_at < FRESH_SECONDS:
                return
            try:
                # All is asked and worked out before any of it is shown: a scrape that does not wait gets no half.
                figures = self._services.log.loop_figures()
                waiting = len(corrections.waiting(self._services.store, self._batches))
                self._show(figures, drift(figures.first_answers, figures.latest_answers))
                self._waiting.set(waiting)
                self._threshold.set(self._services.settings.feedback_threshold)
                self._up.set(1)
            except NeuroLoopError as error:
                self._up.set(0)
                _LOG.warning("the loop's figures cannot be read: %s", error)
            self._asked_at = self._clock()

    def _show(self, figures: LoopFigures, shifts: dict[str, tuple[float, float]]) -> None:
        for gauge in (self._outcome, self._ended, self._macro_f1, self._accuracy, self._reviewed):
            gauge.clear()
        for end in figures.ends:
            self._ended.labels(end.dag, end.outcome).set(end.ended_at.timestamp())
            self._outcome.labels(end.dag, end.outcome).set(0)
        for end in last_ends(figures.ends):
            self._outcome.labels(end.dag, end.outcome).set(1)
        for model, score in figures.ledger_macro_f1.items():
            self._macro_f1.labels(model).set(score)
        for version in figures.accuracy:
            self._accuracy.labels(version.model_version).set(version.right / version.reviewed)
            self._reviewed.labels(version.model_version).set(version.reviewed)
        for figure, (index, chance) in shifts.items():
            self._psi.labels(figure).set(index)
            self._chance.labels(figure).set(chance)
        self._erasures.set(figures.erasures_unfinished)


def last_ends(ends: Sequence[PipelineEnd]) -> list[PipelineEnd]:
    """How the last run of each DAG ended, in name order.

    A run that found nothing to do counts only where there is nothing else: it neither hides that a retraining failed,
    whose corrections wait in it, nor the last result. A failure in counting is over once a run has counted.
    """
    found = []
    for dag in sorted({end.dag for end in ends}):
        of_dag = sorted((end for end in ends if end.dag == dag), key=lambda end: end.ended_at)
        results = [end for end in of_dag if end.outcome != "nothing_to_do"]
        last = of_dag[-1]
        if results and (results[-1].outcome != "failed" or results[-1].task not in _CHECKS):
            last = results[-1]
        found.append(last)
    return found


def drift(first: Sequence[LiveAnswer], latest: Sequence[LiveAnswer]) -> dict[str, tuple[float, float]]:
    """Figure -> population stability index from the first to the latest answers, and what it may be by chance.

    Both are 0 where either are fewer than 20. A model's first answers are the reference, not its training images: those
    were balanced by class, and what is uploaded is not.
    """
    from neuroloop.data.comparison import psi  # SciPy: not needed to answer

    shapes: dict[str, Callable[[Sequence[LiveAnswer]], list[int]]] = {
        "class": lambda answers: [sum(each.label == label for each in answers) for label in (*LABELS, None)],
        "largest probability": lambda answers: _histogram(
            [each.largest_probability for each in answers if each.largest_probability is not None]
        ),
        "gate score": lambda answers: _histogram([each.gate_score for each in answers]),
    }
    shifts = {figure: psi(shape(first), shape(latest)) for figure, shape in shapes.items()}
    return {figure: (shift.psi, shift.chance) for figure, shift in shifts.items()}


def _histogram(values: Sequence[float]) -> list[int]:
    """Counts of values in [0, 1] in equal bins."""
    counts = [0] * _BINS
    for value in values:
        counts[min(int(value * _BINS), _BINS - 1)] += 1
    return counts
