"""Fits the input gate: a small network of its own that has seen varied brains and varied other images.

It learns from the training part's brains, from simulated heads in any contrast and plane, and from images of the kinds
in `outliers`, all of them varied anew each time (`vary`), so that neither contrast nor sharpness nor noise tells one
from the other: only what is in the picture does. Imports TensorFlow: for the offline side only.
"""

import logging
import math
from collections.abc import Callable, Collection
from typing import Any

import cv2
import keras
import numpy as np
import tensorflow as tf
from keras import layers
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from neuroloop.core.schemas import LABELS, NO_TUMOUR
from neuroloop.imaging.augment import AugmentParams, augment_batch
from neuroloop.model import export, outliers
from neuroloop.model.gate import (
    SIDE,
    FittedGate,
    Floats,
    Gate,
    Images,
    InputGate,
    deviations,
    distance,
    measure,
    shrink,
    wrongness,
)
from neuroloop.model.network import FusedBatchNormalization

log = logging.getLogger("neuroloop.gate")

Labels = NDArray[np.integer]
Labelled = tuple[Images, Labels]

_CHANNELS = (16, 24, 48, 96)
_BATCH = 64
_LEARNING_RATE, _WEIGHT_DECAY, _SMOOTHING = 2e-3, 0.02, 0.02
_NAMING = 0.3  # weight of naming the set that an image is of
_WARM_UP, _SAID = 60, 1000  # steps
_MEMORY = 0.02  # weight of one more image in what a set's images cost lately
_PER_KIND = 320
_MAX_VALIDATION = 400  # brains of each sort that the threshold rests on
_KEEP, _KEEP_WIDENED = 0.99, 0.97  # shares of validation brains, plain and widened, that the threshold must accept
_FAMILIAR = 0.99  # share of validation brains that must lie within a novelty of 1
_DOUBTED, _COPIES = 1500, 2  # brains that the doubt is learned from at most, and copies in changed contrasts of each
_STRENGTH = 0.01  # inverse regularisation of the doubt
_PLACES = AugmentParams(rotation_degrees=20, shift=0.08, shear_degrees=8, zoom=0.2)
_ROWS, _COLUMNS = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j].astype(np.float32)


def steps_for(minutes: float, epochs: int | None = None) -> int:
    """Steps of a gate beside a classifier's training of `minutes`, or of a few `epochs`, which only tries things out.

    9,750 beside 13 minutes, and at most 12,000, which take nine minutes on two cores and do better than half as many.
    Fewer than 1,500 let noise and other organs pass, so that a short training has as many.
    """
    wanted = max(750 * minutes, 1500)
    return int(np.clip(wanted if epochs is None else min(wanted, 100 * epochs), 200, 12_000))


def fit_gate(
    predict: Callable[[Images], tuple[Floats, Floats]],
    train_part: Labelled,
    validation_part: Labelled,
    generator: np.random.Generator,
    *,
    steps: int = 0,
    per_kind: int | None = None,
    without: Collection[str] = (),
    onnx: bytes | None = None,
) -> FittedGate:
    """Fit the gate of one classifier.

    `predict` maps uint8 (n, s, s) to the classifier's logits (n, classes) and features (n, f); both parts are canonical
    brains, uint8 (n, s, s), and their classes (n,), the second one unseen by the classifier. `per_kind` images are made
    of each kind of `outliers.KINDS`, by default 40 to 320, for few are enough for few steps, and as many simulated
    heads as of seven kinds. Kinds that `without` names are not learned, to see how it does then. A network that is
    there already is given as `onnx` and kept: only its threshold and what depends on the classifier is found anew.
    Raises `ValueError` with fewer than 10 brains in a set.
    """
    (brains_train, labels_train), (brains_validation, labels_validation) = train_part, validation_part
    if min(len(brains_train), len(brains_validation)) < 10:
        raise ValueError("a gate needs at least 10 brains to learn from and 10 to set its threshold")
    per_kind = per_kind or int(np.clip(steps // 10, 40, _PER_KIND))
    if onnx is None:
        kinds = [kind for kind in outliers.KINDS if kind not in without]
        others = [shrink(outliers.make(kind, brains_train, per_kind, generator)) for kind in kinds]
        heads = outliers.render(7 * per_kind, SIDE, generator)
        small = shrink(brains_train)
        brains = [small, outliers.widen(small, generator), heads]
        onnx = train(brains, others, steps=steps, generator=generator)

    raw = InputGate(_NEUTRAL, onnx, threads=2)
    some = generator.permutation(len(brains_validation))[:_MAX_VALIDATION]
    validation, known = brains_validation[some], labels_validation[some]
    widened = outliers.widen(validation, generator)
    rendered = outliers.render(per_kind, brains_train.shape[1], generator)
    logits, features = predict(brains_train)
    centre, scale = features.mean(axis=0).astype(np.float64), features.std(axis=0).astype(np.float64) + 1e-3
    doubt, bias = _learn_doubt(predict, brains_train, labels_train, logits, features, centre, scale, generator)
    answers = {name: predict(images) for name, images in (("plain", validation), ("widened", widened))}
    answers["rendered"] = predict(rendered)
    away = {name: deviations(found, centre, scale) for name, (_, found) in answers.items()}
    wrong = wrongness(away["plain"], doubt, bias)
    plain, wide = raw.logits(validation), raw.logits(widened)
    # One of the logits itself: between two of them, fewer than these shares of some hundred would be accepted.
    limits = ((plain, _KEEP), (wide, _KEEP_WIDENED))
    offset = float(min(np.quantile(found, 1 - share, method="lower") for found, share in limits))
    # Each limit on its own, then both moved alike until that share lies within the two of them.
    far, doubtful = (max(float(np.quantile(each, _FAMILIAR)), 1e-6) for each in (distance(away["plain"]), wrong))
    both = np.maximum(distance(away["plain"]) / far, wrong / doubtful)
    moved = float(np.quantile(both, _FAMILIAR, method="higher"))
    far, doubtful = far * moved, min(doubtful * moved, 1.0)

    measured = max(per_kind // 4, 10)

    def refused(kind: str) -> float:
        fresh = outliers.make(kind, validation, measured, generator, aside=True)
        return float((raw.logits(fresh) < offset).mean())

    facts = Gate(
        offset=offset,
        width=max(float(np.median(plain)) - offset, 1e-6) / math.log(19),  # the median brain scores 0.95
        threshold=0.5,
        threshold_origin=(
            f"A score of 0.5 is where at least {100 * _KEEP:.0f} % of {len(validation)} validation brains and "
            f"{100 * _KEEP_WIDENED:.0f} % of the same brains in changed contrasts are accepted."
        ),
        usual=tuple(map(tuple, np.quantile(measure(brains_train), (0.01, 0.99), axis=0).T.tolist())),
        centre=tuple(centre.tolist()),
        scale=tuple(scale.tolist()),
        far=far,
        doubt=tuple(doubt.tolist()),
        doubt_bias=bias,
        doubtful=doubtful,
        far_origin=f"{100 * _FAMILIAR:.0f} % of {len(validation)} validation brains lie within a novelty of 1.",
        accepted_brains=float((plain >= offset).mean()),
        accepted_widened=float((wide >= offset).mean()),
        accepted_rendered=float((raw.logits(rendered) >= offset).mean()),
        novel_widened=0,
        novel_rendered=0,
        missed_widened=0,
        rejected={kind: refused(kind) for kind in outliers.KINDS},
        measured=measured,
    )
    novel = {name: facts.novelty(found) > 1 for name, (_, found) in answers.items()}
    tumours = known != LABELS.index(NO_TUMOUR)
    missed = tumours & (answers["widened"][0].argmax(axis=1) == LABELS.index(NO_TUMOUR)) & ~novel["widened"]
    found = {
        "novel_widened": float(novel["widened"].mean()),
        "novel_rendered": float(novel["rendered"].mean()),
        "missed_widened": float(missed.sum() / max(tumours.sum(), 1)),
    }
    return FittedGate(facts.model_copy(update=found), onnx)


def _learn_doubt(
    predict: Callable[[Images], tuple[Floats, Floats]],
    brains: Images,
    labels: Labels,
    logits: Floats,
    features: Floats,
    centre: NDArray[np.float64],
    scale: NDArray[np.float64],
    generator: np.random.Generator,
) -> tuple[NDArray[np.float64], float]:
    """Weights (f,) and bias of the logit that the classifier is wrong, for the `deviations` of its features.

    Learned from brains of the training part, plain and in changed contrasts (`outliers.widen`), whose class is known:
    on the latter a classifier is often wrong, and most often by seeing no tumour. As ConfidNet (Corbiere et al.,
    NeurIPS 2019) learns where a classifier fails, but from a shift that was made, since on what it has learned it
    hardly fails.
    """
    chosen = generator.permutation(len(brains))[:_DOUBTED]
    away = [deviations(features[chosen], centre, scale)]
    wrong = [logits[chosen].argmax(axis=1) != labels[chosen]]
    for _ in range(_COPIES):
        answered, found = predict(outliers.widen(brains[chosen], generator))
        away.append(deviations(found, centre, scale))
        wrong.append(answered.argmax(axis=1) != labels[chosen])
    target = np.concatenate(wrong)
    if target.all() or not target.any():  # nothing to tell apart: the distance alone decides
        return np.zeros(features.shape[1]), -20.0
    model = LogisticRegression(C=_STRENGTH, max_iter=500).fit(np.concatenate(away), target)
    return model.coef_[0].astype(np.float64), float(model.intercept_[0])


_NEUTRAL = Gate(
    offset=0, width=1, threshold=0.5, threshold_origin="", usual=(), centre=(), scale=(), far=1, far_origin="",
    doubt=(), doubt_bias=0, doubtful=1, accepted_brains=0, accepted_widened=0, accepted_rendered=0, novel_widened=0,
    novel_rendered=0, missed_widened=0, rejected={},
)  # fmt: skip


def train(brains: list[Images], others: list[Images], *, steps: int, generator: np.random.Generator) -> bytes:
    """Train a gate's network on sets of uint8 (n, 64, 64) images; an ONNX file.

    Half of each batch are brains, half are others, shared out among the sets of a side as `_Side` says. Besides, the
    network learns which set an image is of: who must name the kinds sees more of them (a second output, which is left
    behind). AdamW, warm-up and cosine. Fixed by the generator, on the same machine with the same number of threads.
    """
    keras.utils.set_random_seed(int(generator.integers(2**31)))
    model = _network(len(brains) + len(others))
    optimizer = keras.optimizers.AdamW(_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    optimizer.build(model.trainable_variables)
    image, scalar = tf.TensorSpec((_BATCH, SIDE, SIDE), tf.float32), tf.TensorSpec((), tf.float32)
    number_of_set = tf.TensorSpec((_BATCH,), tf.int32)
    answer = tf.constant((np.arange(_BATCH) < _BATCH // 2) * (1 - _SMOOTHING) + _SMOOTHING / 2, tf.float32)

    @tf.function(input_signature=[image, number_of_set, scalar])
    def step(images: Any, sets: Any, rate: Any) -> Any:
        optimizer.learning_rate.assign(rate)
        variables = model.trainable_variables
        with tf.GradientTape() as tape:
            found = model(images[..., None], training=True)
            losses = tf.nn.sigmoid_cross_entropy_with_logits(answer, found["logit"][:, 0])
            naming = tf.nn.sparse_softmax_cross_entropy_with_logits(sets, found["set"])
            loss = tf.reduce_mean(losses) + _NAMING * tf.reduce_mean(naming)
        optimizer.apply(tape.gradient(loss, [variable.value for variable in variables]), variables)
        return losses

    sides = [_Side(brains), _Side(others)]
    for number in range(steps):
        drawn = np.concatenate([side.draw(_BATCH // 2, generator) for side in sides])
        rate = _LEARNING_RATE * min(1.0, (number + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * number / steps))
        sets = np.concatenate([sides[0].last, len(brains) + sides[1].last]).astype(np.int32)
        losses = step(tf.constant(vary(drawn, generator)), tf.constant(sets), tf.constant(rate, tf.float32)).numpy()
        for side, own in zip(sides, np.split(losses, 2), strict=True):
            side.learn(own)
        if (number + 1) % _SAID == 0:
            log.info("the gate's network: %d of %d steps, loss %.3f", number + 1, steps, losses.mean())
    return export.export_onnx(model, outputs=("logit",))


class _Side:
    """The sets of brains, or of others. What is hard is shown more often, so that no kind is left behind."""

    def __init__(self, sets: list[Images]) -> None:
        self.sets = sets
        self._losses = np.ones(len(sets))
        self.last = np.zeros(0, int)
        """The sets of the images drawn last"""

    def draw(self, count: int, generator: np.random.Generator) -> Images:
        """`count` images: the set of half of them by an equal chance, of the others by what its images cost lately."""
        shares = 0.5 / len(self.sets) + 0.5 * self._losses / self._losses.sum()
        self.last = generator.choice(len(self.sets), size=count, p=shares)
        return np.stack([self.sets[index][generator.integers(len(self.sets[index]))] for index in self.last])

    def learn(self, losses: Floats) -> None:
        """Take note of what the images drawn last cost, (count,)."""
        for index, loss in zip(self.last, losses, strict=True):
            self._losses[index] += _MEMORY * (float(loss) - self._losses[index])


def _network(sets: int) -> keras.Model:
    """Four halvings and three residual convolutions, 0.14 M parameters; mean and maximum over the places decide.

    Outputs `logit` (n, 1), and `set` (n, sets), the logits of the set that an image is of.
    """
    image = keras.Input((SIDE, SIDE, 1), name="image")
    x = layers.Rescaling(1 / 64, offset=-1.0)(image)
    x = _convolved(x, _CHANNELS[0], 4, 2)
    for channels in _CHANNELS[1:]:
        x = _convolved(x, channels, 2, 2)
        x = layers.Add()([x, _convolved(x, channels, 3, 1)])
    pooled = [layers.GlobalAveragePooling2D()(x), layers.GlobalMaxPooling2D()(x)]
    x = layers.Dropout(0.3)(layers.Concatenate()(pooled))
    outputs = {"logit": layers.Dense(1, name="logit")(x), "set": layers.Dense(sets, name="set")(x)}
    return keras.Model(image, outputs, name="gate")


def _convolved(x: Any, channels: int, kernel: int, stride: int) -> Any:
    x = layers.Conv2D(channels, kernel, stride, padding="same", use_bias=False)(x)
    return layers.ReLU()(FusedBatchNormalization(momentum=0.9)(x))


def vary(images: Images, generator: np.random.Generator) -> Floats:
    """Each image as another scanner or camera might show it: uint8 (n, 64, 64) -> float32 (n, 64, 64), 0..255.

    Place, contrast (inverted or any curve, too), shading, sharpness and noise are drawn anew. The same is done to
    brains and to what is none.
    """
    count = len(images)

    def some(share: float) -> NDArray[np.intp]:
        return np.flatnonzero(generator.random(count) < share)

    def each(low: float, high: float, share: float = 1.0) -> Floats:
        drawn = generator.uniform(low, high, (count, 1, 1)) * (generator.random((count, 1, 1)) < share)
        return drawn.astype(np.float32)

    turned = images.copy()
    for index in some(0.15):
        turned[index] = np.rot90(turned[index], int(generator.integers(1, 4)))
    moved = augment_batch(turned, generator, _PLACES)
    tones = np.stack([_tone(generator) for _ in range(count)])
    x = tones[np.arange(count)[:, None, None], moved]
    down, across, both = (each(-0.4, 0.4) for _ in range(3))
    x *= np.exp(each(1, 1, 0.5) * (down * _ROWS + across * _COLUMNS + both * _ROWS * _COLUMNS))
    for index in some(0.25):
        x[index] = cv2.GaussianBlur(x[index], (0, 0), generator.uniform(0.4, 1.4))
    for index in some(0.1):
        side = int(generator.integers(20, 44))
        coarse = cv2.resize(x[index], (side, side), interpolation=cv2.INTER_AREA)
        x[index] = cv2.resize(coarse, (SIDE, SIDE))
    noise = generator.standard_normal(x.shape, dtype=np.float32) * each(0, 0.06, 0.5)
    x += noise * np.maximum(moved > 5, each(1, 1, 0.4))  # of the whole frame, or of the head alone
    return 255 * np.clip(x, 0, 1, out=x)


def _tone(generator: np.random.Generator) -> Floats:
    """A curve of greys, float32 (256,): as it was, gamma, the inverse, or any smooth one; black stays black."""
    x = np.linspace(0, 1, 256)
    match generator.integers(8):
        case 0:
            y = x ** math.exp(generator.uniform(-0.8, 0.8))
        case 1:
            y = np.where(x > 0.02, (1.05 - x) ** math.exp(generator.uniform(-0.3, 0.7)), x)
        case 2:
            y = np.where(x > 0.02, np.interp(x, np.linspace(0, 1, 5), np.r_[0.0, generator.uniform(0, 1, 4)]), 0)
        case _:
            y = x
    if generator.random() < 0.3:  # overexposed
        y = y * (1 + generator.uniform(0, 0.6))
    return np.clip(y, 0, 1).astype(np.float32)
