"""Probabilities that mean what they say: temperature scaling and its measure."""

from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

Floats = NDArray[np.floating]
Integers = NDArray[np.integer]

_LOG_RANGE = (-3.0, 3.0)  # temperatures of 0.05 to 20; beyond, the held-out set is too small or wrong


def softmax(logits: Floats, temperature: float = 1.0) -> NDArray[np.float64]:
    """Calibrated probabilities, shape of `logits` (n, classes), each row summing to 1.

    Raises `ValueError` unless `temperature` is positive.
    """
    if not temperature > 0:
        raise ValueError(f"a temperature is positive, not {temperature}")
    return cast(NDArray[np.float64], np.exp(log_softmax(np.asarray(logits, np.float64) / temperature, axis=-1)))


def negative_log_likelihood(probabilities: Floats, labels: Integers) -> float:
    """Mean of -log p(true class) in nats; `probabilities` (n, classes), `labels` (n,) in 0..classes-1."""
    chosen = np.asarray(probabilities, np.float64)[np.arange(len(labels)), labels]
    return float(-np.log(np.clip(chosen, 1e-12, 1.0)).mean())


def fit_temperature(logits: Floats, labels: Integers) -> float:
    """The temperature that minimises the negative log-likelihood of held-out images.

    `logits` (n, classes), `labels` (n,); the result lies in 0.05..20. It never changes which class is largest.
    Method: Guo et al., On Calibration of Modern Neural Networks, ICML 2017. Raises `ValueError` on no image.
    """
    from scipy.optimize import minimize_scalar  # slow to load, and a server does not fit

    if len(labels) == 0:
        raise ValueError("a temperature needs at least one held-out image")
    result = minimize_scalar(
        lambda log_t: negative_log_likelihood(softmax(logits, float(np.exp(log_t))), labels),
        bounds=_LOG_RANGE,
        method="bounded",
        options={"xatol": 1e-4},
    )
    return float(np.exp(result.x))


def expected_calibration_error(probabilities: Floats, labels: Integers, bins: int = 15) -> float:
    """Mean distance, in 0..1, between the confidence of the predicted class and its accuracy.

    `probabilities` (n, classes), `labels` (n,); equal-width bins weighted by their share of the images
    (Naeini et al., AAAI 2015).
    """
    confidence = np.asarray(probabilities, np.float64).max(axis=1)
    correct = (np.argmax(probabilities, axis=1) == labels).astype(np.float64)
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(which, weights=confidence - correct, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))
