"""Training. Imports TensorFlow: for the offline side only."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from sklearn.metrics import f1_score

from neuroloop.model.calibration import fit_temperature, negative_log_likelihood, softmax

Images = NDArray[np.uint8]
Labels = NDArray[np.integer]

_MIN_STEPS = 8  # an epoch of few images uses smaller batches instead of one or two huge steps
_WARM_UP = 0.04  # share of the training with a rising learning rate; 2 epochs of 50
_CLIP = 2.0  # largest global gradient norm


@dataclass(frozen=True)
class TrainConfig:
    """How to train. At least one of `epochs` and `minutes` is set; whichever ends first ends the training."""

    epochs: int | None = None
    minutes: float | None = None
    least_epochs: int = 0
    """Made even where `minutes` would end sooner: on a slow machine fewer would train nothing that is of use."""
    batch: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.08
    label_smoothing: float = 0.03
    mixup: float = 0.15
    """Share of the images that are mixed pairwise (Zhang et al., ICLR 2018)."""
    erasing: float = 0.2
    """Share of the images that lose a rectangle (Zhong et al., AAAI 2020)."""
    shift: float = 0.04
    """Largest further shift of an image each time it is seen, as a share of the side, in whole pixels; an even chance
    of a left-right flip goes with it. So the shards come round again without showing the same pixels twice."""
    ema: float = 0.998
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the layers' arithmetic; auto takes bfloat16 where the machine multiplies it natively (1.6 times as fast)."""
    patience: int = 60
    """Epochs without a lower validation loss after which training stops. Long, because that loss is noisy and the last,
    annealed third of a training is where most of it is gained."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs is None and self.minutes is None:
            raise ValueError("training needs an end: set epochs, minutes or both")
        if (self.epochs is not None and self.epochs < 1) or (self.minutes is not None and self.minutes <= 0):
            raise ValueError("epochs and minutes must be positive")


@dataclass(frozen=True)
class TrainResult:
    """What happened. `history` has one mapping an epoch, as given to `on_epoch`; `best_epoch` counts from 0."""

    epochs: int
    seconds: float
    best_epoch: int
    history: list[dict[str, float]] = field(default_factory=list)


def train(
    model: keras.Model,
    shards: Sequence[Callable[[], tuple[Images, Labels]]],
    validation: tuple[Images, Labels],
    config: TrainConfig,
    *,
    on_epoch: Callable[[int, dict[str, float]], None],
) -> TrainResult:
    """Train `model` in place; it ends with the averaged weights that did best on `validation`.

    Epoch e reads `shards[e % len(shards)]()`: images uint8 (n, s, s), labels (n,). `on_epoch(e, metrics)` is called
    after each epoch with loss, accuracy, val_loss, val_calibrated_loss, val_accuracy, val_macro_f1, learning_rate,
    seconds, images_per_second. With `epochs` alone the result is fixed by `seed` (same machine, same number
    of threads).

    AdamW (no decay on biases and norms), warm-up and cosine to zero. Under a
    time budget both follow the clock, not an estimate of the number of epochs, so a busy neighbour makes the training
    shorter, never cut off half-annealed. Validation and the result use an exponential average
    of all weights, norm statistics included. "Best" is the lowest loss, each epoch's at its own best temperature, since
    calibration will find that: of some hundred images, macro-F1 moves by whole images and picks an
    epoch by luck, often one before the rate has annealed.

    Within the scope of a `devices.strategy`, in which `model` was made too, each batch is shared out to its replicas:
    the same steps at the same rate as on one device. What differs is that each replica normalises by its own images
    and draws its own disturbances (and the same drop-out as the others). Several hosts give the same arguments, take
    the same steps, since the first one's clock and validation decide, and end with the same weights.

    Raises `ValueError` where there is no image, or a batch has fewer than there are replicas.
    """
    start = time.monotonic()
    budget = None if config.minutes is None else config.minutes * 60
    trainer = _Trainer(model, config)
    generator = np.random.default_rng(config.seed)
    best: tuple[float, int, list[NDArray[Any]]] | None = None
    history: list[dict[str, float]] = []
    reserve = 0.0  # seconds the last validation took, kept free of the budget
    epoch, done = 0, False
    while not done:
        began = time.monotonic()
        images, labels = shards[epoch % len(shards)]()
        if len(images) == 0 or len(validation[0]) == 0:
            raise ValueError("training and validation need at least one image each")
        steps = max(round(len(images) / config.batch), min(_MIN_STEPS, len(images) // 8), 1)
        if len(images) // steps < trainer.replicas:
            raise ValueError(f"{len(images)} images in {steps} batches are too few for {trainer.replicas} replicas")
        losses, hits, seen = [], 0, 0
        for step, chosen in enumerate(np.array_split(generator.permutation(len(images)), steps)):
            progress = 0.0
            if config.epochs is not None:
                progress = (epoch + step / steps) / config.epochs
            if budget is not None:
                spent = (time.monotonic() - start + reserve) / budget
                if config.least_epochs:
                    spent = min(spent, (epoch + step / steps) / config.least_epochs)
                progress = trainer.agreed(max(progress, spent))
            if progress >= 1 and (epoch or step):
                done = True
                break
            rate = config.learning_rate * _schedule(progress)
            loss, correct = trainer.step(images[chosen], labels[chosen], rate)
            losses.append(loss)
            hits, seen = hits + correct, seen + len(chosen)
        if not losses:
            break  # the budget ended between two epochs
        tested = time.monotonic()
        metrics = {"loss": float(np.mean(losses)), "accuracy": hits / seen}
        metrics |= trainer.validate(*validation)
        now = time.monotonic()
        reserve = now - tested
        metrics |= {
            "learning_rate": rate,
            "seconds": now - began,
            "images_per_second": seen / max(tested - began, 1e-9),
        }
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(f"the training loss became {metrics['loss']} in epoch {epoch}")
        if best is None or metrics["val_calibrated_loss"] < best[0]:
            best = (metrics["val_calibrated_loss"], epoch, trainer.averaged())
        history.append(metrics)
        on_epoch(epoch, metrics)
        epoch += 1
        done = done or epoch == config.epochs or epoch - best[1] > config.patience
    assert best is not None  # the first step is always taken
    model.set_weights(best[2])
    return TrainResult(len(history), time.monotonic() - start, best[1], history)


def _schedule(progress: float) -> float:
    """Learning-rate factor at `progress` in 0..1: a linear warm-up, then half a cosine down to 0."""
    warm = min(1.0, (progress + 0.002) / _WARM_UP)
    return warm * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class SummedAdamW(keras.optimizers.AdamW):
    """AdamW for gradients that are summed over the replicas already, so that it clips the norm of the sum."""

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        return list(grads_and_vars)


class _Trainer:
    """A model with its optimiser and the average of its weights."""

    def __init__(self, model: keras.Model, config: TrainConfig) -> None:
        self.model, self.config = model, config
        self.strategy = tf.distribute.get_strategy()
        self.replicas = self.strategy.num_replicas_in_sync
        self._from_first: Any = None
        if self.strategy.cluster_resolver is not None:  # several hosts
            self._from_first = tf.function(self._from_first_body)
            self._align()
        self.half = config.precision == "bfloat16" or (config.precision == "auto" and _has_half_precision())
        self.optimizer = SummedAdamW(
            config.learning_rate, weight_decay=config.weight_decay, beta_2=0.99, global_clipnorm=_CLIP
        )
        plain = [v for v in model.trainable_variables if len(v.shape) < 2]
        self.optimizer.exclude_from_weight_decay(var_list=plain)
        self.optimizer.build(model.trainable_variables)
        self.average = [tf.Variable(weight, trainable=False) for weight in model.get_weights()]
        self.steps = 0
        size = model.inputs[0].shape[1]
        image_spec = tf.TensorSpec((None, size, size), tf.uint8)
        self._step = tf.function(
            self._step_body if self.replicas == 1 else self._on_replicas,
            input_signature=[image_spec, tf.TensorSpec((None,), tf.int64), *[tf.TensorSpec((), tf.float32)] * 2,
                             tf.TensorSpec((2,), tf.int32)],
        )  # fmt: skip
        self._logits = tf.function(self._logits_body, input_signature=[image_spec])

    def step(self, images: Images, labels: Labels, rate: float) -> tuple[float, int]:
        """One update; the loss and the number of images whose (possibly mixed) main class was hit."""
        # The average forgets the random start quickly and reaches its full length as training goes on.
        decay = min(self.config.ema, (1 + self.steps) / (10 + self.steps))
        loss, correct = self._step(
            tf.constant(images), tf.constant(labels.astype(np.int64)), tf.constant(rate, tf.float32),
            tf.constant(decay, tf.float32), tf.constant([self.config.seed, self.steps], tf.int32),
        )  # fmt: skip
        self.steps += 1
        return float(loss), int(correct)

    def _step_body(self, images: Any, labels: Any, rate: Any, decay: Any, seed: Any) -> tuple[Any, Any]:
        """One update, on one replica of perhaps several; loss and hits are those of the whole batch."""
        config, share = self.config, 1.0
        if self.replicas > 1:
            images, labels, seed, share = self._own_part(images, labels, seed)
        classes = self.model.output["logits"].shape[-1]
        target = tf.one_hot(labels, classes) * (1 - config.label_smoothing) + config.label_smoothing / classes
        x = _move(tf.cast(images, tf.float32)[..., None], seed, config.shift)
        x = _disturb(x, seed, config.erasing)
        x, target = _mix(x, target, seed, config.mixup)
        with tf.GradientTape() as tape, _half_precision(self.model, self.half):
            logits = tf.cast(self.model(x, training=True)["logits"], tf.float32)
            loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(target, logits)) * share
        hit = tf.argmax(logits, axis=1) == tf.argmax(target, axis=1)
        hits = tf.reduce_sum(tf.cast(hit, tf.int32))
        variables = self.model.trainable_variables
        gradients = tape.gradient(loss, [v.value for v in variables])
        if self.replicas > 1:
            loss, hits, gradients = self._together(loss, hits, gradients)
        self.optimizer.learning_rate.assign(rate)
        self.optimizer.apply(gradients, variables)
        for average, weight in zip(self.average, self.model.weights, strict=True):
            if average.dtype.is_floating:
                average.assign_sub((1 - decay) * (average - weight.value))
            else:
                average.assign(weight.value)  # the state of the dropout generator
        return loss, hits

    def _on_replicas(self, *batch: Any) -> tuple[Any, Any]:
        """The update on every replica, each with the whole batch; what the first of this host returns."""
        loss, hits = self.strategy.run(self._step_body, args=batch)
        return tuple(self.strategy.experimental_local_results(each)[0] for each in (loss, hits))

    def _own_part(self, images: Any, labels: Any, seed: Any) -> tuple[Any, Any, Any, Any]:
        """This replica's images and labels, the seed of its disturbances, and which share of the batch it has."""
        replica = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.int32)
        n = tf.shape(images)[0]
        first, end = n * replica // self.replicas, n * (replica + 1) // self.replicas
        share = tf.cast(end - first, tf.float32) / tf.cast(n, tf.float32)
        return images[first:end], labels[first:end], seed + tf.stack([replica, 0]), share

    def _together(self, loss: Any, hits: Any, gradients: list[Any]) -> tuple[Any, Any, list[Any]]:
        """The sums over all replicas, in one exchange; the averages that layers keep become those of all replicas."""
        kept = [v for v in self.model.non_trainable_variables if tf.as_dtype(v.dtype).is_floating]
        own = [loss, tf.cast(hits, tf.float32), *gradients, *(v.value / self.replicas for v in kept)]
        loss, hits, *rest = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, own)
        for variable, mean in zip(kept, rest[len(gradients) :], strict=True):
            variable.assign(mean)
        return loss, tf.cast(tf.round(hits), tf.int32), rest[: len(gradients)]

    def agreed(self, value: float) -> float:
        """The first host's `value`, on every host, so that all decide alike; where there is one host, `value`."""
        return value if self._from_first is None else float(self._from_first([tf.constant(value, tf.float32)])[0])

    def _align(self) -> None:
        """Give every host the weights of the first one. Integers, the state of drop-out, follow from the seed."""
        weights = self.model.get_weights()
        floats = [i for i, weight in enumerate(weights) if weight.dtype == np.float32]
        shared = self._from_first([tf.constant(weights[i]) for i in floats])
        for i, weight in zip(floats, shared, strict=True):
            weights[i] = weight.numpy()
        self.model.set_weights(weights)

    def _from_first_body(self, values: list[Any]) -> Any:
        def own() -> Any:
            context = tf.distribute.get_replica_context()
            first = tf.equal(tf.cast(context.replica_id_in_sync_group, tf.int32), 0)
            told = [tf.where(first, value, tf.zeros_like(value)) for value in values]
            return context.all_reduce(tf.distribute.ReduceOp.SUM, told)

        return [self.strategy.experimental_local_results(each)[0] for each in self.strategy.run(own)]

    def _logits_body(self, images: Any) -> Any:
        return self.model(tf.cast(images, tf.float32)[..., None], training=False)["logits"]

    def averaged(self) -> list[NDArray[Any]]:
        """A copy of the averaged weights, in the order of `model.get_weights()`."""
        return [average.numpy() for average in self.average]

    def validate(self, images: Images, labels: Labels) -> dict[str, float]:
        """Loss, accuracy and macro-F1 of the averaged weights; the model keeps its own."""
        own = self.model.get_weights()
        self.model.set_weights(self.averaged())
        parts = [self._logits(tf.constant(images[i : i + 256])).numpy() for i in range(0, len(images), 256)]
        self.model.set_weights(own)
        logits = np.concatenate(parts)
        predicted = logits.argmax(axis=1)
        plain, best = (softmax(logits, t) for t in (1.0, fit_temperature(logits, labels)))
        return {
            "val_loss": negative_log_likelihood(plain, labels),
            "val_calibrated_loss": self.agreed(negative_log_likelihood(best, labels)),
            "val_accuracy": float((predicted == labels).mean()),
            "val_macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
        }


def _has_half_precision() -> bool:
    """Whether this machine multiplies bfloat16 natively: a GPU, or a CPU that says so."""
    if tf.config.list_physical_devices("GPU"):
        return True
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and bool({"avx512_bf16", "amx_bf16"} & set(cpu.read_text().split()))


@contextmanager
def _half_precision(model: keras.Model, wanted: bool) -> Iterator[None]:
    """Layers compute in bfloat16 where `wanted`, their variables stay float32; only what is traced inside."""
    policies = [(layer, layer.dtype_policy) for layer in model.layers]
    if wanted:
        for layer, _ in policies:
            layer.dtype_policy = "mixed_bfloat16"
    try:
        yield
    finally:
        for layer, policy in policies:
            layer.dtype_policy = policy


def _move(x: Any, seed: Any, share: float) -> Any:
    """Flip half of the images and shift each by whole pixels, so that nothing is interpolated; unchanged at 0."""
    if not share:
        return x
    n, size = tf.shape(x)[0], x.shape[1]
    reach = round(share * size)
    draw = tf.random.stateless_uniform((3, n), seed + tf.constant([14000, 0]))
    right, down = (tf.floor(draw[axis] * (2 * reach + 1)) - reach for axis in (0, 1))
    side = tf.where(draw[2] < 0.5, -1.0, 1.0)
    right += tf.where(side < 0, tf.cast(size - 1, tf.float32), 0.0)
    one, none = tf.ones(n), tf.zeros(n)
    maps = tf.stack([side, none, right, none, one, down, none, none], axis=1)
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=x, transforms=maps, output_shape=(size, size), fill_value=0.0,
        interpolation="NEAREST", fill_mode="NEAREST",
    )  # fmt: skip


def _disturb(x: Any, seed: Any, erasing: float) -> Any:
    """Changes a scanner could make: blur, gamma, gain, noise; and a grey rectangle on a share of the images."""
    n, size = tf.shape(x)[0], tf.shape(x)[1]

    def uniform(low: float, high: float, offset: int) -> Any:
        return tf.random.stateless_uniform((n, 1, 1, 1), seed + tf.constant([offset, 0]), low, high)

    soft = x
    for _ in range(max(1, round(x.shape[1] / 43))):  # at 128 pixels three box filters of 3, about a Gaussian of 1.4
        soft = tf.nn.avg_pool2d(soft, 3, 1, "SAME")
    x += (soft - x) * tf.maximum(uniform(-1, 1, 13000), 0)  # half of the images stay sharp
    x = 255 * tf.pow(tf.clip_by_value(x / 255, 1e-4, 1), tf.exp(uniform(-0.25, 0.25, 1000)))
    noise = tf.random.stateless_normal(tf.shape(x), seed + tf.constant([2000, 0]))
    # Mostly little noise, now and then much: up to 9 % of the range, the most that BrainWeb simulates.
    x = x * uniform(0.9, 1.1, 3000) + noise * 23 * tf.square(uniform(0, 1, 4000))
    place = tf.cast(tf.range(size), tf.float32) / tf.cast(size, tf.float32)
    rows, columns = place[None, :, None, None], place[None, None, :, None]
    inside = tf.abs(rows - uniform(0, 1, 5000)) < uniform(0.05, 0.17, 6000)
    inside &= tf.abs(columns - uniform(0, 1, 7000)) < uniform(0.05, 0.17, 8000)
    inside &= uniform(0, 1, 9000) < erasing
    return tf.where(inside, uniform(0, 128, 10000), tf.clip_by_value(x, 0, 255))


def _mix(x: Any, target: Any, seed: Any, share: float) -> tuple[Any, Any]:
    """Mix a share of the images with their batch neighbour, the image itself keeping the larger part."""
    n = tf.shape(x)[0]
    chosen = tf.random.stateless_uniform((n,), seed + tf.constant([11000, 0])) < share
    other = tf.random.stateless_uniform((n,), seed + tf.constant([12000, 0]), 0.0, 0.5)
    weight = tf.where(chosen, other, 0.0)
    x = x * (1 - weight[:, None, None, None]) + tf.roll(x, 1, 0) * weight[:, None, None, None]
    return x, target * (1 - weight[:, None]) + tf.roll(target, 1, 0) * weight[:, None]
