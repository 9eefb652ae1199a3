import numpy as np
import pytest

from neuroloop.model.calibration import expected_calibration_error, fit_temperature, negative_log_likelihood, softmax


def overconfident(factor: float, n: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are `factor` times what the labels were drawn from."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 1.5, (n, 4))
    labels = np.array([generator.choice(4, p=p) for p in softmax(logits)])
    return logits * factor, labels


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


def test_a_temperature_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="positive"):
        softmax(np.zeros((1, 4)), 0.0)


def test_no_held_out_image_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        fit_temperature(np.zeros((0, 4)), np.zeros(0, int))
