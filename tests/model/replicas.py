"""Trains on one device and on two replicas in a process whose CPU counts as two devices, and prints what came of it.

A program, not a test: how many devices a CPU is must be said before TensorFlow's first operation.
"""

import json
import sys

import numpy as np
import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)

import keras  # noqa: E402

from neuroloop.model import devices, network, training  # noqa: E402
from neuroloop.model.bundle import OnnxModel  # noqa: E402
from neuroloop.model.export import export_onnx  # noqa: E402

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.integers(0, 256, (45, 32, 32), dtype=np.uint8)
LABELS = np.arange(45) % 4
QUIET = {"mixup": 0, "erasing": 0, "shift": 0, "precision": "float32", "seed": 1}


def plain() -> keras.Model:
    """A network without normalisation and drop-out, so that replicas have nothing to differ in."""
    keras.utils.set_random_seed(1)
    image = keras.Input((32, 32, 1))
    x = keras.layers.Conv2D(8, 4, 4, activation="relu")(keras.layers.Rescaling(1 / 64)(image))
    logits = keras.layers.Dense(4)(keras.layers.Flatten()(x))
    return keras.Model(image, {"logits": logits})


def copies(variables: list) -> list[list[np.ndarray]]:
    """What each replica holds of each variable."""
    found = [v.value if isinstance(v, keras.Variable) else v for v in variables]
    return [[each.numpy() for each in v.values] for v in found]


def steps(strategy: tf.distribute.Strategy) -> tuple[dict, list[np.ndarray]]:
    """Six steps of the plain network without disturbances; batches of 15 fall into parts of 7 and 8."""
    with strategy.scope():
        model = plain()
        trainer = training._Trainer(model, training.TrainConfig(epochs=1, **QUIET))
        told = [
            trainer.step(IMAGES[at : at + 15], LABELS[at : at + 15], 1e-3) for _ in range(2) for at in range(0, 45, 15)
        ]
        state = [v.numpy() for v in trainer.optimizer.variables] + trainer.averaged() + model.get_weights()
    return {"loss": [loss for loss, _ in told], "hits": [hits for _, hits in told]}, state


def main() -> None:
    """Print one JSON object."""
    disturb, training._disturb = training._disturb, lambda x, seed, erasing: x
    one, one_state = steps(devices.strategy("one"))
    two, two_state = steps(devices.strategy("mirrored"))
    training._disturb = disturb
    # Relative to each array's largest value: momentum and velocity differ by many orders of magnitude.
    apart = [
        float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-12)) for a, b in zip(one_state, two_state, strict=True)
    ]

    strategy = devices.strategy("mirrored")
    seen = []
    with strategy.scope():
        model = network.build(32, arch="tiny", seed=1)
        start = model.get_weights()
        training.train(
            model, [lambda: (IMAGES, LABELS)], (IMAGES[:20], LABELS[:20]),
            training.TrainConfig(epochs=3, batch=15, precision="bfloat16", seed=1),
            on_epoch=lambda epoch, metrics: seen.append(metrics),
        )  # fmt: skip
        trainer = training._Trainer(model, training.TrainConfig(epochs=1, seed=1))
        trainer.step(IMAGES[:15], LABELS[:15], 1e-3)
        held = copies(model.variables) + copies(trainer.average) + copies(trainer.optimizer.variables)
        try:
            training.train(
                model, [lambda: (IMAGES[:1], LABELS[:1])], (IMAGES, LABELS), training.TrainConfig(epochs=1),
                on_epoch=lambda *_: None,
            )  # fmt: skip
            refused = ""
        except ValueError as error:
            refused = str(error)
    moved = [not np.array_equal(a, b) for a, b in zip(start, model.get_weights(), strict=True)]
    served = OnnxModel(export_onnx(model)).run(IMAGES).logits
    answered = np.asarray(model(IMAGES[..., None].astype(np.float32), training=False)["logits"])
    result = {
        "one": one,
        "two": two,
        "apart": max(apart),
        "replicas": strategy.num_replicas_in_sync,
        "copies": sorted({len(each) for each in held}),
        "unequal": sum(not np.array_equal(*each) for each in held),
        "moved": sum(moved) / len(moved),
        "losses": [metrics["loss"] for metrics in seen],
        "export_apart": float(np.abs(served - answered).max()),
        "refused": refused,
    }
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
