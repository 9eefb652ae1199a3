"""What a person chooses for a build, over the settings and the architecture's own defaults."""

from pathlib import Path

import pytest

from neuroloop.bootstrap import Services
from neuroloop.core.errors import InvalidSetting
from neuroloop.core.settings import Settings
from neuroloop.loop.params import Params


def params(given: dict[str, object], **settings: object) -> Params:
    return Params.of(Services(Settings(home=Path("/nowhere"), **settings)), given)


def test_an_architecture_brings_its_own_image_size_unless_one_is_chosen_or_set():
    assert params({}).image_size == 128
    assert params({"architecture": "plain64"}).image_size == 64
    assert params({"architecture": "", "image_size": None}, architecture="conv224").image_size == 224
    assert params({"architecture": "xception", "image_size": 96}).image_size == 96
    assert params({"architecture": "xception"}, image_size=160).image_size == 160


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"architecture": "xception", "image_size": 64}, "xception takes images of 80 pixels and more, not 64"),
        ({"architecture": "huge"}, "the architecture of this run is not valid.*'plain64'"),
        ({"minutes": 0}, "the minutes of this run is not valid.*greater than 0"),
        ({"colour": "red"}, "the colour of this run is not valid"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_starts(given, why):
    with pytest.raises(InvalidSetting, match=why):
        params(given)
