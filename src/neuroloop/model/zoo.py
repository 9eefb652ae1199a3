"""Networks that known systems use, beside the compact one: two plain CNNs, and transfer learning on three large trunks.

All have the outputs of `network.build`, of which the class-activation map is the hard one: known systems flatten the
last map and put dense layers on it, which leaves no map. The plain CNNs keep that head, written so that each place's
part in it shows: a rectified unit lets the parts of all places through or none, so they still add up. What it lacks is
the unit's bias. On the trunks, whose places see most of the image, the dense layers stand at every place of the map
instead (1x1 convolutions) and the logits are the mean over the places. Padding is "same" in the plain CNNs, so that the
map covers the whole image. Imports TensorFlow: for the offline side only.
"""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
from keras import layers

from neuroloop.core.errors import NeuroLoopError
from neuroloop.core.schemas import LABELS
from neuroloop.model import network
from neuroloop.model.architectures import ARCHITECTURES

_PLAIN: dict[str, tuple[tuple[int, ...], int]] = {
    # (channels of the convolutions, each followed by a pooling; units of the dense layer at each place)
    "plain64": ((32, 64, 128), 128),
    "conv224": ((32, 64, 128, 256), 256),
}
_TRUNKS: dict[str, tuple[Callable[..., keras.Model], tuple[str, ...]]] = {
    # (maker, layers whose channels are summarised for the input gate)
    "xception": (
        keras.applications.Xception,
        ("block1_conv2_act", "block2_sepconv2_bn", "block3_sepconv2_bn", "block4_sepconv2_bn"),
    ),
    "inceptionv3": (keras.applications.InceptionV3, ("mixed0", "mixed4")),
    "resnet101v2": (
        keras.applications.ResNet101V2,
        ("conv1_conv", "conv2_block3_out", "conv3_block4_out"),
    ),
}
_UNITS = 128  # units of the hidden layer that known systems put on these trunks
NAMES = (*_PLAIN, *_TRUNKS)
"""The architectures made here."""


def build(
    arch: str, size: int, classes: int = len(LABELS), seed: int = 0, *, weights: Path | None = None
) -> keras.Model:
    """An untrained network, or with `weights` one whose trunk is pretrained; the same `seed` gives the same weights.

    Input and outputs are those of `network.build`: float32 (n, size, size, 1), values 0..255, to `logits` (n, classes),
    `cam` (n, h, w, classes), whose mean over the places is the logits, and `features` (n, f) for the input gate. h and
    w are size // 8 (plain64), size // 16 (conv224), about size // 32 (the others). Grey becomes three equal channels
    and is scaled to what the trunk was trained on, inside the graph. `weights` is a Keras weights file of the trunk
    without its top (.h5, as Keras publishes them for ImageNet). Raises `ValueError` on an unknown `arch` or a `size`
    below its minimum, `NeuroLoopError` where `weights` cannot be read or belong to another network.
    """
    if arch not in NAMES:
        raise ValueError(f"unknown architecture {arch!r}; there are {', '.join(NAMES)}")
    minimum = ARCHITECTURES[arch].minimum_size  # type: ignore[index]
    if size < minimum:
        raise ValueError(f"{arch} takes images of {minimum} pixels and more, not {size}")
    seeds = iter(range(seed * 1000, seed * 1000 + 1000))
    image = keras.Input((size, size, 1), name="image")
    if arch in _PLAIN:
        if weights is not None:
            raise NeuroLoopError(f"{arch} has no pretrained weights", fix="choose a transfer-learning architecture")
        channels, units = _PLAIN[arch]
        x, features = _plain(image, channels, seeds)
        x = _flattened(x, units, seeds)
    else:
        x, features = _transfer(image, arch, weights, seeds)
        x = layers.Dropout(0.3, seed=next(seeds), name="dropout1")(x)
        init = keras.initializers.HeNormal(seed=next(seeds))
        x = layers.Conv2D(_UNITS, 1, activation="relu", kernel_initializer=init, name="dense")(x)
        x = layers.Dropout(0.25, seed=next(seeds), name="dropout2")(x)
    init = keras.initializers.GlorotUniform(seed=next(seeds))
    cam = layers.Conv2D(classes, 1, kernel_initializer=init, name="cam")(x)
    logits = layers.GlobalAveragePooling2D(name="logits")(cam)
    return keras.Model(image, {"logits": logits, "cam": cam, "features": features}, name=arch)


def _flattened(x: Any, units: int, seeds: Iterator[int]) -> Any:
    """Rectified dense `units` on the flattened map (n, h, w, c), as each place's part in them (n, h, w, units).

    The mean of the parts over the places is what the dense layer gives: the rectifier lets all parts of a unit through,
    or none, by their sum.
    """
    height, width = x.shape[1:3]
    init = keras.initializers.HeNormal(seed=next(seeds))
    parts = layers.EinsumDense("nhwc,hwcu->nhwu", (height, width, units), kernel_initializer=init, name="dense")(x)
    parts = layers.Rescaling(float(height * width), name="parts")(parts)
    unit = layers.GlobalAveragePooling2D(keepdims=True, name="units")(parts)
    gate = layers.Activation(_positive, name="rectifier")(unit)
    gate = layers.Dropout(0.25, seed=next(seeds), name="dropout")(gate)
    return layers.Multiply(name="rectified")([parts, gate])


def _positive(x: Any) -> Any:
    return keras.ops.cast(x > 0, x.dtype)


def _plain(image: Any, channels: tuple[int, ...], seeds: Iterator[int]) -> tuple[Any, Any]:
    x = layers.Rescaling(1 / 255, name="scale")(image)
    summaries = []
    for number, width in enumerate(channels, 1):
        init = keras.initializers.HeNormal(seed=next(seeds))
        x = layers.Conv2D(
            width, 3, padding="same", activation="relu", kernel_initializer=init, name=f"block{number}_conv"
        )(x)
        x = layers.MaxPooling2D(2, name=f"block{number}_pool")(x)
        summaries.append(network.summary(x, f"block{number}"))
    return x, layers.Concatenate(name="features")(summaries)


def _transfer(image: Any, arch: str, weights: Path | None, seeds: Iterator[int]) -> tuple[Any, Any]:
    """The trunk's last map, and features: means and deviations of early stages, means of the last.

    The deviations of the last stages' thousands of channels would make fitting the gate, cubic in the features, take
    minutes; and there the class is told apart, not the kind of image.
    """
    x = layers.Rescaling(1 / 127.5, offset=-1.0, name="scale")(image)  # the "tf" preprocessing of all three trunks
    colour = layers.Concatenate(name="colour")([x, x, x])
    maker, stages = _TRUNKS[arch]
    original = maker(include_top=False, weights=None, input_shape=(*image.shape[1:3], 3))
    if weights is not None:
        _load(original, arch, weights)
    names = {layer.name: f"trunk{number:03d}" for number, layer in enumerate(original.layers)}

    def named(layer: keras.layers.Layer) -> keras.layers.Layer:
        # Keras counts unnamed layers over the whole process, so their names, the keys of saved weights, would differ
        # from one process to the next; and it draws their weights from an unseeded generator.
        config = layer.get_config() | {"name": names[layer.name]}
        for key, value in config.items():
            if isinstance(value, dict) and "seed" in value.get("config", {}):
                config[key] = value | {"config": value["config"] | {"seed": next(seeds)}}
        if isinstance(layer, layers.BatchNormalization):
            config["momentum"] = 0.9  # a fine-tuning has too few steps for the usual 0.99
        return type(layer).from_config(config)

    trunk = keras.models.clone_model(original, input_tensors=colour, clone_function=named)
    if weights is not None:
        trunk.set_weights(original.get_weights())
    # The layers' own first outputs hang on `image`; those of the model `trunk` on an input of its own.
    *early, last = (trunk.get_layer(names[stage]).output for stage in (*stages, original.layers[-1].name))
    summaries = [network.summary(x, f"stage{number}") for number, x in enumerate(early, 1)]
    summaries.append(layers.GlobalAveragePooling2D(name="stage_last")(last))
    return last, layers.Concatenate(name="features")(summaries)


def _load(trunk: keras.Model, arch: str, weights: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # so that Keras does not leave a layer random and merely say so
            trunk.load_weights(weights)
    except (ValueError, OSError, KeyError, UserWarning) as error:
        raise NeuroLoopError(
            f"{weights} cannot start {arch}",
            why=str(error).splitlines()[0],
            fix=f"give a Keras weights file of {arch} without its top, or NEUROLOOP_PRETRAINED=none for random weights",
        ) from error
