import keras
import numpy as np
import pytest

from neuroloop.model import network


@pytest.fixture(scope="module")
def untrained():
    return network.build(64, seed=5)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 1)).astype(np.float32)


def test_the_mean_of_the_activation_map_is_the_logit(untrained, images):
    outputs = untrained(images)
    assert outputs["cam"].shape == (2, 4, 4, 4)
    np.testing.assert_allclose(np.mean(outputs["cam"], axis=(1, 2)), outputs["logits"], atol=1e-4)


def test_the_compact_network_has_fewer_than_two_million_parameters(untrained):
    assert 0.5e6 < untrained.count_params() < 2e6


def test_the_features_are_finite_even_for_an_empty_image(untrained):
    features = np.asarray(untrained(np.zeros((1, 64, 64, 1), np.float32))["features"])
    assert features.shape[1] == 2 * (32 + 32 + 64 + 64 + 160 + 160)
    assert np.isfinite(features).all()


def test_the_same_seed_gives_the_same_network_and_another_seed_another(images):
    first, again, other = (
        np.asarray(network.build(64, arch="tiny", seed=seed)(images)["logits"]) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_an_unknown_architecture_and_an_odd_size_are_refused():
    with pytest.raises(ValueError, match="unknown architecture"):
        network.build(64, arch="huge")
    with pytest.raises(ValueError, match="divisible by 16"):
        network.build(100)


def test_the_fused_normalisation_trains_and_predicts_as_keras_does():
    x = np.random.default_rng(1).normal(3, 2, (8, 5, 5, 6)).astype(np.float32)
    ours, theirs = network.FusedBatchNormalization(momentum=0.9), keras.layers.BatchNormalization(momentum=0.9)
    for _ in range(3):
        np.testing.assert_allclose(ours(x, training=True), theirs(x, training=True), atol=1e-4)
    np.testing.assert_allclose(ours.moving_mean, theirs.moving_mean, atol=1e-5)
    # The fused kernel averages the unbiased variance: n / (n - 1) of Keras's, and n is the batch times its places.
    np.testing.assert_allclose(ours.moving_variance, theirs.moving_variance, rtol=0.01)
    np.testing.assert_allclose(ours(x, training=False), theirs(x, training=False), atol=0.02)
