"""What is known of each architecture before TensorFlow is loaded: sizes, and how it is usually trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from neuroloop.core.schemas import ArchitectureName


@dataclass(frozen=True)
class Architecture:
    """One selectable network. `network.build` makes it; its outputs mean the same in all of them."""

    description: str
    image_size: int
    """Natural side of the canonical image, pixels; a multiple of 16, as every canonical image is here."""
    minimum_size: int
    """Smallest side it takes, pixels."""
    parameters: int
    """At the natural size, with four classes."""
    training: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """What differs from `TrainConfig`'s defaults: learning_rate, batch, epochs and so on."""
    pretrained: bool = False
    """Starts from ImageNet weights where they can be had: see `NEUROLOOP_PRETRAINED`."""


def _defaults(**training: float) -> Mapping[str, float]:
    return MappingProxyType(training)


# Fine-tuning: all weights at once, at a thirtieth of the rate of a training from scratch and with the trainer's
# warm-up, so that the random head's first gradients do not undo the trunk. Small batches, because the maps of these
# trunks at 304 px take much memory. Not measured here on ImageNet weights: a start, for a search to improve on.
_FINE_TUNING = _defaults(learning_rate=1e-4, batch=16, epochs=10, weight_decay=0.01)

# Without normalisation layers these learn slowly: what counts is the number of steps, and what makes the images harder
# costs more than it brings (real scans at 64 px, validation macro-F1: 0.64 after 10 epochs, 0.83 after 30; with batches
# of 64, mixup and erasing 0.50 after 15).
_PLAIN = _defaults(learning_rate=1e-3, batch=16, weight_decay=0.01, mixup=0.0, erasing=0.0, epochs=40)

ARCHITECTURES: Mapping[ArchitectureName, Architecture] = {
    "compact": Architecture("compact residual network, the one to use on a CPU", 128, 32, 903_968),
    "tiny": Architecture("a small sibling of compact, for trying things out", 64, 32, 48_000),
    "plain64": Architecture(
        "plain CNN: three blocks of convolution and pooling, dropout, dense",
        64,
        32,
        1_141_764,
        _PLAIN,
    ),
    "conv224": Architecture(
        "four convolutions with pooling, dropout, dense",
        224,
        32,
        13_234_884,
        _PLAIN,
    ),
    "xception": Architecture(
        "transfer learning on Xception (Chollet 2017); wants a GPU", 304, 80, 21_124_268, _FINE_TUNING, True
    ),
    "inceptionv3": Architecture(
        "transfer learning on InceptionV3 (Szegedy et al. 2016); wants a GPU", 304, 80, 22_065_572, _FINE_TUNING, True
    ),
    "resnet101v2": Architecture(
        "transfer learning on ResNet101V2 (He et al. 2016); wants a GPU", 224, 32, 42_889_348, _FINE_TUNING, True
    ),
}
"""By name. 304 px are the papers' 299 px rounded up to a multiple of 16, which leaves the 10 x 10 or 8 x 8 map."""
