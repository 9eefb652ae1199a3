import collections

import keras
import numpy as np
import onnx
import pytest

from neuroloop.core.errors import InvalidBundle
from neuroloop.model import export, network
from neuroloop.model.bundle import OnnxModel


@pytest.fixture(scope="module")
def used():
    """A compact network whose normalisation has seen images, so that folding it has something to lose."""
    model = network.build(64, seed=3)
    generator = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            shape = layer.gamma.shape
            layer.set_weights(
                [
                    generator.uniform(0.5, 2, shape),  # gamma, beta, then mean and variance
                    generator.normal(0, 1, shape),
                    generator.normal(0, 1, shape),
                    generator.uniform(0.2, 5, shape),
                ]
            )
    return model


@pytest.fixture(scope="module")
def exported(used) -> bytes:
    return export.export_onnx(used)


def test_the_exported_network_equals_the_trained_one_for_any_batch_size(tiny_model):
    model = network.build(64, arch="tiny")
    export.load_weights(model, tiny_model.weights)
    network_again = OnnxModel(export.export_onnx(model))
    for count in (1, 7):
        images = tiny_model.validation.images[:count]
        expected = model(images[..., None].astype(np.float32))
        for name, found in network_again.run(images)._asdict().items():
            np.testing.assert_allclose(found, expected[name], atol=1e-4, err_msg=name)


def test_an_export_that_answers_otherwise_than_its_network_is_no_bundle(used, exported):
    images = np.random.default_rng(1).integers(0, 256, (40, 64, 64), dtype=np.uint8)
    assert export.difference(used, OnnxModel(exported).run, images) < 1e-4
    other = OnnxModel(export.export_onnx(network.build(64, seed=4)))
    with pytest.raises(InvalidBundle, match="does not answer as the trained one"):
        export.difference(used, other.run, images)


def test_normalisation_is_folded_into_the_convolutions_without_changing_an_answer(used, exported):
    graph = onnx.load_from_string(exported).graph
    constants = {each.name for each in graph.initializer}
    makers = {output: node.op_type for node in graph.node for output in node.output}
    assert collections.Counter(node.op_type for node in graph.node)["BatchNormalization"] == 0
    for node in graph.node:
        if node.op_type in ("Mul", "Add", "Sub", "Div") and constants & set(node.input):
            assert not any(makers.get(name) == "Conv" for name in node.input), node.name
    images = np.random.default_rng(1).integers(0, 256, (16, 64, 64), dtype=np.uint8)
    expected = used(images[..., None].astype(np.float32))
    for name, found in OnnxModel(exported).run(images)._asdict().items():
        scale = float(np.abs(expected[name]).max())
        np.testing.assert_allclose(found / scale, expected[name] / scale, atol=1e-5, err_msg=name)


def test_the_graph_uses_standard_operators_only(exported):
    proto = onnx.load_from_string(exported)
    assert {node.domain for node in proto.graph.node} == {""}
    assert [each.domain for each in proto.opset_import] == [""]
    assert not proto.functions


def test_the_image_changes_its_layout_before_it_is_rescaled_which_the_runtime_does_faster(exported):
    graph = onnx.load_from_string(exported).graph
    first = [node for node in graph.node if "image" in node.input]
    assert [node.op_type for node in first] in (["Reshape"], ["Transpose"])


def test_saved_weights_start_a_model_of_another_image_size_near_where_the_first_ended(tiny_model):
    trained, model = network.build(64, arch="tiny", seed=1), network.build(32, arch="tiny", seed=9)
    export.load_weights(trained, tiny_model.weights)
    export.load_weights(model, tiny_model.weights)
    for one, other in zip(trained.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert export.save_weights(model) == tiny_model.weights
    images = tiny_model.validation.images
    warm = np.asarray(trained(images[..., None].astype(np.float32))["logits"])
    served = OnnxModel(tiny_model.onnx).run(images).logits
    assert np.abs(warm - served).max() < 0.05 * np.abs(served).max()
    assert (warm.argmax(axis=1) == served.argmax(axis=1)).mean() >= 0.98


def test_saved_weights_take_half_the_room_of_the_network(used):
    assert len(export.save_weights(used)) < 0.55 * 4 * used.count_params()


def test_weights_of_another_architecture_are_refused_and_change_nothing(tiny_model):
    model = network.build(32, arch="compact", seed=9)
    before = model.get_weights()
    with pytest.raises(InvalidBundle, match="another architecture"):
        export.load_weights(model, tiny_model.weights)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:500], lambda data: b"", lambda data: b"\x80\x04N.", lambda data: data[:900] + data[1000:]],
    ids=["cut off", "empty", "pickle", "torn"],
)
def test_damaged_weights_are_refused(tiny_model, damage):
    with pytest.raises(InvalidBundle, match="cannot be read"):
        export.load_weights(network.build(32, arch="tiny"), damage(tiny_model.weights))
