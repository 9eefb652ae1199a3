import time

import numpy as np
import pytest
import tensorflow as tf

from neuroloop.model import network, training

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.integers(0, 256, (48, 32, 32), dtype=np.uint8)
LABELS = np.arange(48) % 4


def run(config: training.TrainConfig, shards=None, model=None):
    model = model or network.build(32, arch="tiny", seed=1)
    seen: list[tuple[int, dict[str, float]]] = []
    result = training.train(
        model,
        shards or [lambda: (IMAGES, LABELS)],
        (IMAGES[:16], LABELS[:16]),
        config,
        on_epoch=lambda epoch, metrics: seen.append((epoch, metrics)),
    )
    return model, result, seen


def test_a_model_learns_the_simulated_scans_clearly_beyond_chance(tiny_model):
    best = tiny_model.history[tiny_model.best_epoch]
    assert best["val_macro_f1"] > 0.7, tiny_model.history
    assert best["val_calibrated_loss"] == min(epoch["val_calibrated_loss"] for epoch in tiny_model.history)
    assert all(epoch["val_calibrated_loss"] <= epoch["val_loss"] + 1e-3 for epoch in tiny_model.history)


def test_every_epoch_reports_its_progress_and_the_rate_falls_to_almost_nothing(tiny_model):
    assert tiny_model.history[0].keys() == {
        "loss", "accuracy", "val_loss", "val_calibrated_loss", "val_accuracy", "val_macro_f1", "learning_rate",
        "seconds", "images_per_second",
    }  # fmt: skip
    assert tiny_model.history[-1]["learning_rate"] < 1e-4 < max(e["learning_rate"] for e in tiny_model.history)


def test_the_same_seed_trains_the_same_model_from_the_shards_in_turn():
    read = []

    def shard(number):
        def images():
            read.append(number)
            return IMAGES[:: 1 - 2 * number], LABELS[:: 1 - 2 * number]

        return images

    def weights():
        model, _, _ = run(training.TrainConfig(epochs=3, seed=3), [shard(0), shard(1)])
        return np.concatenate([weight.ravel() for weight in model.get_weights()])

    first = weights()
    assert read == [0, 1, 0]
    np.testing.assert_allclose(weights(), first, atol=1e-6)
    assert np.abs(first).max() > 0


def test_images_are_moved_by_whole_pixels_and_flipped_without_blurring_them():
    images = np.zeros((64, 32, 32, 1), np.float32)
    images[:, 10:13, 8] = images[:, 10, 8:11] = 200  # an L, so that its mirror image is another
    moved = np.asarray(training._move(tf.constant(images), tf.constant([0, 0]), 0.1))
    seen = set()
    for image in moved[..., 0]:
        corner = [int(axis.min()) for axis in np.nonzero(image)]
        shape = image[corner[0] : corner[0] + 3, corner[1] : corner[1] + 3]
        flipped = shape[2, 0] == 0
        assert np.array_equal(shape[:, ::-1] if flipped else shape, images[0, 10:13, 8:11, 0])
        assert image.sum() == images[0].sum()
        seen.add((corner[0] - 10, corner[1] - (21 if flipped else 8), bool(flipped)))
    assert {down for down, _, _ in seen} == {right for _, right, _ in seen} == set(range(-3, 4))
    assert {flipped for _, _, flipped in seen} == {False, True}
    assert np.array_equal(training._move(tf.constant(images), tf.constant([0, 0]), 0.0), images)


def test_a_budget_that_is_too_short_still_makes_the_least_epochs_and_anneals_over_them():
    _, result, seen = run(training.TrainConfig(minutes=0.0001, least_epochs=3))
    assert result.epochs == 3
    assert seen[-1][1]["learning_rate"] < 0.1 * max(metrics["learning_rate"] for _, metrics in seen)


def test_a_time_budget_ends_the_training_in_time_with_an_annealed_rate():
    began = time.monotonic()
    _, result, seen = run(training.TrainConfig(minutes=0.08))
    assert time.monotonic() - began < 0.08 * 60 + 120  # a first step, compilation included, is always finished
    assert result.epochs == len(seen) == len(result.history) >= 1
    if result.epochs > 2:
        assert seen[-1][1]["learning_rate"] < seen[1][1]["learning_rate"]


def test_training_stops_when_validation_no_longer_improves():
    _, result, _ = run(training.TrainConfig(epochs=50, patience=1, learning_rate=1e-9))
    assert result.epochs < 50
    assert result.best_epoch < result.epochs - 1


def test_a_training_without_an_end_is_refused():
    with pytest.raises(ValueError, match="needs an end"):
        training.TrainConfig()


def test_an_empty_shard_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        run(training.TrainConfig(epochs=1), [lambda: (IMAGES[:0], LABELS[:0])])
