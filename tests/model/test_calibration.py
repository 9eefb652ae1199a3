import subprocess
import sys

import numpy as np
import pytest
from pydantic import ValidationError

from neuroloop.core.schemas import LABELS
from neuroloop.model.calibration import (
    ANSWERED_LEAST,
    ANSWERED_MOST,
    LEVELS,
    Calibration,
    calibration_floor,
    expected_calibration_error,
    fit,
    fit_refer_below,
    fit_temperature,
    group_weights,
    negative_log_likelihood,
    softmax,
)


def overconfident(factor: float, n: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are `factor` times what the labels were drawn from."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 1.5, (n, 4))
    labels = np.array([generator.choice(4, p=p) for p in softmax(logits)])
    return logits * factor, labels


def accurate(n: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a model that is right 96 times of 100, and certain of most of them; meningioma is harder."""
    labels = np.arange(n) % 4
    logits = generator.normal(size=(n, 4))
    logits[np.arange(n), labels] += generator.gamma(4.0, np.array([2.0, 1.5, 2.0, 2.0])[labels]) - 0.75
    return logits, labels


def shares(fitted: Calibration, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Coverage, level by class."""
    probabilities = fitted.probabilities(logits)
    sets = [fitted.prediction_sets(probabilities, level) for level in LEVELS]
    return np.array([[each[labels == k, k].mean() for k in range(4)] for each in sets])


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_an_exaggeration_of_the_logits(factor):
    logits, labels = overconfident(factor)
    assert fit_temperature(logits, labels) == pytest.approx(factor, rel=0.1)


def test_the_fitted_temperature_lowers_the_calibration_error_and_the_likelihood_loss():
    logits, labels = overconfident(3.0)
    before, after = softmax(logits), softmax(logits, fit_temperature(logits, labels))
    assert expected_calibration_error(before, labels) > 0.15
    assert expected_calibration_error(after, labels) < 0.03
    assert negative_log_likelihood(after, labels) < negative_log_likelihood(before, labels)


def test_softmax_survives_huge_logits_and_sums_to_one():
    assert softmax(np.array([[1e4, 0, -1e4, 5.0]])).tolist() == [[1, 0, 0, 0]]
    assert softmax(np.random.default_rng(0).normal(size=(9, 4)), 2.5).sum(axis=1) == pytest.approx(np.ones(9))


def test_the_calibration_error_of_a_hand_worked_case():
    probabilities = np.array([[0.8, 0.2]] * 10)
    labels = np.array([0] * 5 + [1] * 5)
    assert expected_calibration_error(probabilities, labels) == pytest.approx(0.3)


def test_the_floor_is_what_a_perfectly_calibrated_model_scores_and_copies_do_not_lower_it():
    logits, _ = overconfident(1.0, 300)
    probabilities, generator = softmax(logits), np.random.default_rng(1)
    drawn = [(generator.random(300)[:, None] > probabilities.cumsum(axis=1)).sum(axis=1) for _ in range(200)]
    floor, chance = calibration_floor(probabilities, np.arange(300), generator=generator)
    errors = [expected_calibration_error(probabilities, y) for y in drawn]
    assert floor == pytest.approx(np.mean(errors), rel=0.05)
    assert chance == pytest.approx(np.quantile(errors, 0.95), rel=0.15)
    assert floor < chance
    copies = np.repeat(probabilities, 16, axis=0)
    same, _ = calibration_floor(copies, np.repeat(np.arange(300), 16), generator=generator)
    assert same == pytest.approx(floor, rel=0.05)
    assert calibration_floor(copies, np.arange(4800), generator=generator)[0] == pytest.approx(floor / 4, rel=0.15)


def test_a_temperature_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="positive"):
        softmax(np.zeros((1, 4)), 0.0)


def test_no_held_out_image_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        fit(np.zeros((0, 4)), np.zeros(0, int))


@pytest.mark.parametrize("images", [120, 720])
def test_the_sets_cover_each_class_as_promised_on_average_over_draws_even_with_few_images(images):
    generator = np.random.default_rng(0)
    logits, labels = accurate(20_000, generator)
    assert 0.94 < (logits.argmax(axis=1) == labels).mean() < 0.98  # so sets at 90 % must be empty now and then
    measured = np.mean([shares(fit(*accurate(images, generator)), logits, labels) for _ in range(150)], axis=0)
    assert measured[0] == pytest.approx(np.full(4, 0.90), abs=0.015)
    assert measured[1] == pytest.approx(np.full(4, 0.95), abs=0.015)


def test_with_many_images_a_single_draw_is_within_two_points_of_the_promise():
    generator = np.random.default_rng(1)
    measured = shares(fit(*accurate(8000, generator)), *accurate(8000, generator))
    assert measured == pytest.approx(np.array([[0.90] * 4, [0.95] * 4]), abs=0.02)


def test_copies_of_an_image_change_nothing():
    logits, labels = accurate(400, np.random.default_rng(2))
    once = fit(logits, labels)
    times = np.where(np.arange(400) < 40, 12, 1)
    many = fit(np.repeat(logits, times, axis=0), np.repeat(labels, times), np.repeat(np.arange(400), times))
    assert many.temperature == pytest.approx(once.temperature, rel=1e-3)
    assert many.refer_below == pytest.approx(once.refer_below, abs=1e-3)
    assert many.groups == once.groups == dict.fromkeys(LABELS, 100)
    for level in LEVELS:
        assert many.conformal[level] == pytest.approx(once.conformal[level], abs=1e-3)


def test_copies_taken_for_images_of_their_own_would_break_the_promise_that_groups_keep():
    generator = np.random.default_rng(3)
    logits, labels = accurate(20_000, generator)
    kept, broken = [], []
    for _ in range(150):
        few, classes = accurate(240, generator)
        # One group in ten has 30 copies, as slices of one healthy head have.
        times = np.where(generator.random(240) < 0.1, 30, 1)
        copies = np.repeat(few, times, axis=0), np.repeat(classes, times)
        kept.append(shares(fit(*copies, np.repeat(np.arange(240), times)), logits, labels))
        broken.append(shares(fit(*copies), logits, labels))
    assert np.mean(kept, axis=0) == pytest.approx(np.array([[0.90] * 4, [0.95] * 4]), abs=0.015)
    assert np.abs(np.mean(broken, axis=0) - np.array([[0.90] * 4, [0.95] * 4])).max() > 0.02


def test_a_class_with_too_few_images_for_the_level_is_in_every_set():
    logits, labels = accurate(400, np.random.default_rng(4))
    chosen = (labels != 0) | (np.arange(400) < 4 * 10)  # ten of class 0: enough for 90 %, not for 95 %
    fitted = fit(logits[chosen], labels[chosen])
    assert fitted.conformal["0.90"]["glioma"] < 1
    assert fitted.conformal["0.95"]["glioma"] == 1
    without = fit(logits[labels != 0], labels[labels != 0])
    assert without.conformal["0.90"]["glioma"] == 1
    assert fitted.prediction_sets(fitted.probabilities(logits), "0.95")[:, 0].all()
    assert without.groups["glioma"] == 0


def test_images_that_are_equally_certain_are_covered_together():
    logits = np.tile([60.0, 0, 0, 0], (100, 1))  # certain to the last bit of a float
    logits[:5] = [0, 60, 0, 0]
    fitted = fit(logits, np.zeros(100, int))
    sets = fitted.prediction_sets(fitted.probabilities(logits), "0.90")
    assert sets[5:, 0].all()
    assert not sets[:5, 0].any()


def test_the_sets_survive_the_way_through_json():
    logits, labels = accurate(400, np.random.default_rng(5))
    fitted = fit(logits, labels)
    again = Calibration.model_validate_json(fitted.model_dump_json())
    assert again == fitted
    probabilities = fitted.probabilities(logits)
    assert probabilities.dtype == np.float32
    # The image that set a limit is in its own set, whatever the rounding.
    for level in LEVELS:
        assert (shares(again, logits, labels)[LEVELS.index(level)] >= float(level) - 0.01).all()
    assert (again.refer(probabilities) == (probabilities.max(axis=1) < fitted.refer_below)).all()


def test_a_strong_model_answers_nine_of_ten_and_is_right_99_times_of_100():
    generator = np.random.default_rng(6)
    fitted = fit(*accurate(700, generator))
    logits, labels = accurate(20_000, generator)
    probabilities = fitted.probabilities(logits)
    answered = ~fitted.refer(probabilities)
    assert ANSWERED_LEAST <= answered.mean() <= ANSWERED_MOST + 0.02
    assert (probabilities.argmax(axis=1) == labels)[answered].mean() >= 0.99


def test_a_model_that_is_nearly_good_enough_refers_more_than_a_strong_one():
    labels = np.zeros(1000, int)
    p = np.linspace(0.99, 0.3, 1000)
    probabilities = np.column_stack([p, *[(1 - p) / 3] * 3])
    assert fit_refer_below(probabilities, labels) == pytest.approx(p[899])
    wrong = labels.copy()
    wrong[860:] = 1  # all errors stand among the least certain 140, so 86.8 % answered has 0.9 % errors
    assert p[869] < fit_refer_below(probabilities, wrong) < p[859]


def test_a_weak_model_still_answers_its_share():
    generator = np.random.default_rng(7)
    probabilities, labels = generator.dirichlet(np.ones(4), 500), generator.integers(0, 4, 500)
    limit = fit_refer_below(probabilities, labels)
    assert (probabilities.max(axis=1) >= limit).mean() == pytest.approx(ANSWERED_LEAST, abs=0.005)


def test_a_model_that_knows_nothing_at_all_refers_nothing_rather_than_everything():
    fitted = fit(np.zeros((50, 4)), np.arange(50) % 4)
    assert not fitted.refer(fitted.probabilities(np.zeros((50, 4)))).any()
    assert fitted.prediction_sets(fitted.probabilities(np.zeros((1, 4))), "0.90").all()


def test_the_weights_of_a_group_sum_to_one():
    assert group_weights(np.array([7, 3, 7, 7, 5])) == pytest.approx([1 / 3, 1, 1 / 3, 1 / 3, 1])


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0},
        {"refer_below": 1.2},
        {"conformal": {"0.90": {"glioma": 0.1}}},
        {"conformal": {"0.99": dict.fromkeys(LABELS, 0.1)}},
        {"conformal": {"0.90": dict.fromkeys(LABELS, 1.1)}},
    ],
)
def test_a_calibration_that_cannot_be_applied_is_refused(change):
    good = {"temperature": 1.0, "conformal": {"0.90": dict.fromkeys(LABELS, 0.2)}, "refer_below": 0.5}
    Calibration.model_validate(good)
    with pytest.raises(ValidationError):
        Calibration.model_validate(good | change)


def test_applying_a_calibration_loads_no_fitting_library():
    code = (
        "import sys, numpy as np\n"
        "from neuroloop.core.schemas import LABELS\n"
        "from neuroloop.model.calibration import Calibration\n"
        "c = Calibration(temperature=2, conformal={'0.90': dict.fromkeys(LABELS, 0.2)}, refer_below=0.5)\n"
        "p = c.probabilities(np.eye(4) * 9)\n"
        "c.refer(p), c.prediction_sets(p, '0.90')\n"
        "assert not {'scipy', 'sklearn'} & set(sys.modules), 'loaded'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
