"""The classifier: a compact residual network whose class-activation map comes from the same forward pass."""

from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from keras import layers

from neuroloop.core.schemas import LABELS

ARCHITECTURES: dict[str, tuple[tuple[int, bool], ...]] = {
    # (channels, halve the resolution), one pair a block; the stem has the first block's channels.
    "compact": ((32, False), (64, True), (64, False), (160, True), (160, False)),
    "tiny": ((16, False), (32, True), (48, True)),
}
"""`compact` has 0.9 M parameters and is the one to use; `tiny` trains in seconds, for trying things out."""


def build(
    size: int, classes: int = len(LABELS), *, arch: str = "compact", seed: int = 0, weights: Path | None = None
) -> keras.Model:
    """An untrained network; the same `seed` gives the same weights. `arch` is one of these or of `zoo`.

    Input: float32 (n, size, size, 1) with grey values 0..255, scaled inside, so that preprocessing travels with the
    model. Outputs, by name:

    - `logits` (n, classes);
    - `cam` (n, size // 16, size // 16, classes): the share of each place in each logit. Its mean over the places *is*
      the logit, so the map shows what the answer rests on (class-activation map, Zhou et al., CVPR 2016);
    - `features` (n, f): mean and deviation of every channel after every block, for the input gate.

    Residual blocks with squeeze-and-excitation (He et al. 2016, Hu et al. 2018). Every step that halves the
    resolution has an even kernel: an odd one with "same" padding shifts the map by half a pixel each time, which adds
    up to half a cell of the heat map. `weights` is a file of pretrained weights for an architecture that takes them
    (see `zoo.build`). Raises `ValueError` on an unknown `arch` or a `size` not divisible by 16.
    """
    from neuroloop.model import zoo  # here, because the zoo is made of this module's parts

    if arch in zoo.NAMES:
        return zoo.build(arch, size, classes, seed, weights=weights)
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}; there are {', '.join((*ARCHITECTURES, *zoo.NAMES))}")
    if size % 16:
        raise ValueError(f"the image size must be divisible by 16, which {size} is not")
    seeds = iter(range(seed * 1000, seed * 1000 + 1000))
    blocks = ARCHITECTURES[arch]

    image = keras.Input((size, size, 1), name="image")
    x = layers.Rescaling(1 / 64, offset=-1.0, name="scale")(image)
    x = _conv(x, blocks[0][0], 6, "stem", seeds, strides=2)
    x = layers.Activation("relu", name="stem_act")(x)
    x = layers.MaxPooling2D(2, name="stem_pool")(x)
    summaries = [summary(x, "stem")]
    for number, (channels, halve) in enumerate(blocks, 1):
        x = _residual(x, channels, halve, f"block{number}", seeds)
        summaries.append(summary(x, f"block{number}"))
    features = layers.Concatenate(name="features")(summaries)

    x = layers.SpatialDropout2D(0.2, seed=next(seeds), name="dropout")(x)
    # A 1x1 convolution and then the mean equals the usual mean and then dense layer, and yields the map for free.
    init = keras.initializers.GlorotUniform(seed=next(seeds))
    cam = layers.Conv2D(classes, 1, kernel_initializer=init, name="cam")(x)
    logits = layers.GlobalAveragePooling2D(name="logits")(cam)
    return keras.Model(image, {"logits": logits, "cam": cam, "features": features}, name=arch)


class FusedBatchNormalization(layers.BatchNormalization):
    """Batch normalisation of (n, h, w, c) that trains with TensorFlow's fused kernel; otherwise Keras's own.

    Keras 3 composes it from a dozen passes over memory, which took a quarter of a training step on a CPU.
    """

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalise by the batch and move the averages in training, by the averages otherwise."""
        if not training:
            return super().call(inputs, training=training, mask=mask)
        out, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            inputs, self.gamma.value, self.beta.value, epsilon=self.epsilon, is_training=True
        )
        for average, value in ((self.moving_mean, mean), (self.moving_variance, variance)):
            average.assign(average * self.momentum + tf.cast(value, average.dtype) * (1 - self.momentum))
        return out


def _conv(x: Any, channels: int, kernel: int, name: str, seeds: Any, *, strides: int = 1) -> Any:
    init = keras.initializers.HeNormal(seed=next(seeds))
    x = layers.Conv2D(
        channels, kernel, strides, padding="same", use_bias=False, kernel_initializer=init, name=f"{name}_conv"
    )(x)
    return FusedBatchNormalization(momentum=0.9, name=f"{name}_norm")(x)


def _residual(x: Any, channels: int, halve: bool, name: str, seeds: Any) -> Any:
    shortcut = layers.AveragePooling2D(2, name=f"{name}_pool")(x) if halve else x
    if shortcut.shape[-1] != channels:
        shortcut = _conv(shortcut, channels, 1, f"{name}_skip", seeds)
    y = _conv(x, channels, 2 if halve else 3, f"{name}_a", seeds, strides=2 if halve else 1)
    y = layers.Activation("relu", name=f"{name}_a_act")(y)
    y = _conv(y, channels, 3, f"{name}_b", seeds)
    squeeze = layers.GlobalAveragePooling2D(keepdims=True, name=f"{name}_squeeze")(y)
    for step, width, activation in (("down", channels // 8, "relu"), ("up", channels, "sigmoid")):
        init = keras.initializers.HeNormal(seed=next(seeds))
        squeeze = layers.Conv2D(width, 1, activation=activation, kernel_initializer=init, name=f"{name}_{step}")(
            squeeze
        )
    y = layers.Multiply(name=f"{name}_excite")([y, squeeze])
    return layers.Activation("relu", name=f"{name}_act")(layers.Add(name=f"{name}_add")([y, shortcut]))


def summary(x: Any, name: str) -> Any:
    """Mean and deviation of every channel: a map (n, h, w, c) to (n, 2 c), for the `features` output."""
    mean = layers.GlobalAveragePooling2D(keepdims=True, name=f"{name}_mean")(x)
    centred = layers.Subtract(name=f"{name}_centred")([x, mean])
    square = layers.Multiply(name=f"{name}_square")([centred, centred])
    variance = layers.GlobalAveragePooling2D(name=f"{name}_variance")(square)
    deviation = layers.Activation(_root, name=f"{name}_deviation")(variance)
    return layers.Concatenate(name=f"{name}_summary")([layers.Flatten(name=f"{name}_flat")(mean), deviation])


def _root(x: Any) -> Any:
    return keras.ops.sqrt(x + 1e-6)
