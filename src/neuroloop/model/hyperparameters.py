"""From a choice of hyper-parameters to a `TrainConfig`. Imports TensorFlow: for the offline side only."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from neuroloop.core.errors import InvalidSetting
from neuroloop.core.schemas import ArchitectureName
from neuroloop.model.architectures import ARCHITECTURES
from neuroloop.model.training import TrainConfig

_OWN_PARAMS = ("epochs", "minutes", "seed")  # parameters of a build in their own right
_FROM_ONE = ("batch", "patience")
_SHARES = ("label_smoothing", "mixup", "erasing", "shift", "ema")


def names() -> tuple[str, ...]:
    """What a person or a search may choose: the fields of `TrainConfig` that are no parameters of a build."""
    return tuple(each.name for each in fields(TrainConfig) if each.name not in _OWN_PARAMS)


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` in the types of `TrainConfig`. Raises `InvalidSetting` on an unknown name or a value out of range."""
    for name in values:
        if name not in names():
            raise InvalidSetting(f"{name!r} is no hyper-parameter", why=f"there are {', '.join(names())}")
    try:
        config = TypeAdapter(TrainConfig).validate_python({**values, "epochs": 1})
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidSetting(
            f"the hyper-parameter {'.'.join(map(str, first['loc']))} is not valid", why=first["msg"]
        ) from error
    found = {name: getattr(config, name) for name in values}
    for name, value in found.items():
        low, high = (1.0 if name in _FROM_ONE else 0.0), (1.0 if name in _SHARES else math.inf)
        if isinstance(value, int | float) and not (low <= value <= high and math.isfinite(value)):
            raise InvalidSetting(
                f"the hyper-parameter {name} is {value}", why=f"it must be at least {low:g} and at most {high:g}"
            )
    return found


def configure(
    architecture: ArchitectureName,
    chosen: Mapping[str, Any],
    *,
    epochs: int | None,
    minutes: float | None,
    seed: int,
) -> TrainConfig:
    """How to train `architecture`: its own defaults, then what was `chosen`.

    Without `epochs` it trains as many as is usual for the architecture, within `minutes`.
    """
    usual = dict(ARCHITECTURES[architecture].training)
    usual_epochs = usual.pop("epochs", None)
    if epochs is None and usual_epochs is not None:
        epochs = int(usual_epochs)
    return TrainConfig(epochs=epochs, minutes=minutes, seed=seed, **checked({**usual, **chosen}))
