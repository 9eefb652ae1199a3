"""What a person may choose when triggering a build."""

from typing import Any

from pydantic import Field, ValidationError, model_validator

from neuroloop.bootstrap import Services
from neuroloop.core.errors import InvalidSetting
from neuroloop.core.schemas import ArchitectureName, Record, SplitName
from neuroloop.model.architectures import ARCHITECTURES


class Params(Record):
    """What a person may choose when triggering a build."""

    data_url: str
    minutes: float = Field(gt=0)
    epochs: int | None = Field(default=None, gt=0)
    image_size: int = Field(ge=32, le=512, multiple_of=16)
    seed: int = Field(ge=0)
    split: SplitName = "grouped"
    architecture: ArchitectureName = "compact"
    hyperparameters: dict[str, Any] = Field(default_factory=dict)
    shards: int = Field(default=0, ge=0, le=256)

    @classmethod
    def of(cls, services: Services, given: dict[str, Any]) -> "Params":
        """The given values over the settings' defaults; empty ones count as not given."""
        settings = services.settings
        chosen = {key: value for key, value in given.items() if value not in (None, "")}
        architecture = ARCHITECTURES.get(chosen.get("architecture", settings.architecture))
        own_size = architecture is not None and "image_size" not in settings.model_fields_set
        defaults = {
            "data_url": settings.data_url,
            "minutes": settings.train_minutes,
            "image_size": architecture.image_size if architecture and own_size else settings.image_size,
            "seed": settings.seed,
            "architecture": settings.architecture,
            "shards": settings.data_shards,
        }
        if chosen.get("hyperparameters"):
            from neuroloop.model import hyperparameters  # TensorFlow: only where there is something to check

            chosen["hyperparameters"] = hyperparameters.checked(chosen["hyperparameters"])
        try:
            return cls.model_validate(defaults | chosen)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"])) or "combination of parameters"
            raise InvalidSetting(f"the {name} of this run is not valid", why=first["msg"]) from None

    @model_validator(mode="after")
    def _large_enough(self) -> "Params":
        minimum = ARCHITECTURES[self.architecture].minimum_size
        if self.image_size < minimum:
            raise ValueError(f"{self.architecture} takes images of {minimum} pixels and more, not {self.image_size}")
        return self
