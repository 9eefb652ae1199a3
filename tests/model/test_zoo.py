"""The other architectures, with random weights on small images: what a bundle needs of each."""

from typing import get_args

import keras
import numpy as np
import pytest

from neuroloop.core.errors import NeuroLoopError
from neuroloop.core.schemas import ArchitectureName
from neuroloop.core.settings import Settings
from neuroloop.model import network, zoo
from neuroloop.model.architectures import ARCHITECTURES
from neuroloop.model.bundle import OnnxModel
from neuroloop.model.export import export_onnx, load_weights, save_weights
from neuroloop.model.training import TrainConfig, train

GENERATOR = np.random.default_rng(0)


def images(count: int, size: int) -> np.ndarray:
    return GENERATOR.integers(0, 256, (count, size, size), dtype=np.uint8)


def as_input(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., None].astype(np.float32)


@pytest.fixture(scope="module")
def smallest():
    """Each architecture of the zoo at its smallest size; built once."""
    return {arch: network.build(ARCHITECTURES[arch].minimum_size, arch=arch, seed=3) for arch in zoo.NAMES}


def test_every_selectable_architecture_is_described_and_can_be_built():
    assert set(get_args(ArchitectureName)) == set(ARCHITECTURES) == {*network.ARCHITECTURES, *zoo.NAMES}
    for arch, about in ARCHITECTURES.items():
        assert about.image_size % 16 == about.minimum_size % 16 == 0, arch
        assert about.minimum_size <= about.image_size, arch
    for arch in (*network.ARCHITECTURES, "plain64", "conv224"):
        model = network.build(ARCHITECTURES[arch].image_size, arch=arch)
        assert model.count_params() == pytest.approx(ARCHITECTURES[arch].parameters, rel=0.01), arch
    assert ARCHITECTURES["compact"].image_size == Settings.model_fields["image_size"].default


@pytest.mark.parametrize("arch", zoo.NAMES)
def test_the_mean_of_the_activation_map_is_the_logit_and_the_sizes_are_as_described(smallest, arch):
    model = smallest[arch]
    size = ARCHITECTURES[arch].minimum_size
    outputs = model(as_input(images(2, size)))
    places = outputs["cam"].shape[1:3]
    assert outputs["logits"].shape == (2, 4)
    assert outputs["cam"].shape == (2, *places, 4)
    assert places == {"plain64": (4, 4), "conv224": (2, 2), "xception": (3, 3)}.get(
        arch, (1, 1) if size == 32 else places
    )
    np.testing.assert_allclose(np.mean(outputs["cam"], axis=(1, 2)), outputs["logits"], atol=1e-5)
    assert np.isfinite(outputs["features"]).all()
    assert np.std(outputs["features"]) > 0
    if ARCHITECTURES[arch].pretrained:  # the others' dense layers grow with the image
        assert model.count_params() == ARCHITECTURES[arch].parameters


def test_the_plain_head_is_a_dense_layer_on_the_flattened_map(smallest):
    model, pixels = smallest["plain64"], as_input(images(3, 32))
    kernel, out, bias = (
        np.asarray(weight) for weight in (*model.get_layer("dense").weights, *model.get_layer("cam").weights)
    )
    maps = np.asarray(keras.Model(model.input, model.get_layer("block3_pool").output)(pixels))
    hidden = np.maximum(maps.reshape(3, -1) @ kernel.reshape(-1, kernel.shape[-1]), 0)
    np.testing.assert_allclose(model(pixels)["logits"], hidden @ out[0, 0] + bias, atol=1e-4)


@pytest.mark.parametrize("arch", ["plain64", "conv224"])
def test_the_exported_network_equals_the_keras_one(smallest, arch):
    pixels = images(7, 32)
    expected = smallest[arch](as_input(pixels))
    for name, found in OnnxModel(export_onnx(smallest[arch])).run(pixels)._asdict().items():
        np.testing.assert_allclose(found, expected[name], rtol=1e-5, atol=1e-4, err_msg=name)


def test_the_same_seed_gives_the_same_trunk_and_another_seed_another(smallest):
    first = smallest["xception"]
    again, other = (network.build(80, arch="xception", seed=seed) for seed in (3, 4))
    # Names too, although Keras counts its unnamed layers: saved weights must fit the model of another process.
    assert [weight.path for weight in first.weights] == [weight.path for weight in again.weights]
    for one, two in zip(first.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    assert any((one != two).any() for one, two in zip(first.get_weights(), other.get_weights(), strict=True))


def test_a_trunk_starts_from_a_weights_file_and_its_preprocessing_is_in_the_graph(tmp_path):
    trunk = keras.applications.InceptionV3(include_top=False, weights=None, input_shape=(80, 80, 3))
    trunk.save_weights(tmp_path / "trunk.weights.h5")
    model = network.build(80, arch="inceptionv3", seed=1, weights=tmp_path / "trunk.weights.h5")
    pixels = as_input(images(2, 80))
    prepared = keras.applications.inception_v3.preprocess_input(np.repeat(pixels, 3, axis=-1))
    expected = np.asarray(trunk(prepared)).mean(axis=(1, 2))
    features = np.asarray(model(pixels)["features"])
    np.testing.assert_allclose(features[:, -expected.shape[1] :], expected, atol=1e-5)


def test_a_file_of_another_network_is_refused_with_a_way_out(tmp_path, smallest):
    smallest["plain64"].save_weights(tmp_path / "other.weights.h5")
    (tmp_path / "text.h5").write_text("no weights")
    for name in ("other.weights.h5", "text.h5", "missing.h5"):
        with pytest.raises(NeuroLoopError, match=rf"{name} cannot start xception.*NEUROLOOP_PRETRAINED=none"):
            network.build(80, arch="xception", weights=tmp_path / name)
    with pytest.raises(NeuroLoopError, match="plain64 has no pretrained weights"):
        network.build(64, arch="plain64", weights=tmp_path / "text.h5")


def test_a_size_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="xception takes images of 80 pixels and more, not 64"):
        network.build(64, arch="xception")


def test_a_plain_network_learns_and_its_weights_start_another():
    labels = np.arange(64) % 4
    pixels = images(64, 32) // 4
    for row, label in enumerate(labels):
        pixels[row, 16 * (label // 2) :][:12, 16 * (label % 2) :][:, :12] += 150
    model = network.build(32, arch="plain64", seed=1)
    result = train(
        model,
        [lambda: (pixels, labels)],
        (pixels, labels),
        TrainConfig(epochs=12, learning_rate=3e-3, mixup=0, erasing=0, ema=0.9),
        on_epoch=lambda *_: None,
    )
    assert result.history[result.best_epoch]["val_macro_f1"] > 0.9, result.history
    again = network.build(32, arch="plain64", seed=2)
    load_weights(again, save_weights(model))
    np.testing.assert_allclose(again.get_weights()[0], model.get_weights()[0], atol=1e-3)
