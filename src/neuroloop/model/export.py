"""From a trained network to what a bundle holds of it: the ONNX graph that serves, the weights of a warm start.

Imports TensorFlow: for the offline side only.
"""

import io
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import keras
import numpy as np
import onnx
import onnxruntime
import tensorflow as tf
from numpy.typing import NDArray

from neuroloop.core.errors import InvalidBundle

OUTPUTS = ("logits", "cam", "features")
_OPSET = 17
_MOST_APART = 1e-4


def export_onnx(model: keras.Model, outputs: tuple[str, ...] = OUTPUTS) -> bytes:
    """The network as an ONNX file, for serving without TensorFlow.

    Input `image` float32 (n, s, s, 1), values 0..255; `outputs` are those of the model to keep, by default `logits`,
    `cam`, `features` as in `network.build`; the batch size is free. Normalisation layers are folded into the
    convolutions before them, in float32: the answers stay those of the trained network to rounding. Only standard
    operators are used, so any ONNX runtime can read it; what depends on the machine (memory layout, fused activations)
    is left to the runtime that loads it.
    """
    import tf2onnx

    spec = [tf.TensorSpec((None, *model.inputs[0].shape[1:]), tf.float32, name="image")]

    @tf.function(input_signature=spec)
    def forward(image: Any) -> Any:
        found = model(image, training=False)
        return [found[name] for name in outputs]

    proto, _ = tf2onnx.convert.from_function(forward, input_signature=spec, opset=_OPSET)
    # tf2onnx calls the outputs Identity:0 and so on, and each free dimension something else.
    names = {output.name: name for output, name in zip(proto.graph.output, outputs, strict=True)}
    for node in proto.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*proto.graph.input, *proto.graph.output):
        value.name = names.get(value.name, value.name)
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    return _folded(proto.SerializeToString())


def difference(model: keras.Model, exported: Callable[[NDArray[np.uint8]], Any], images: NDArray[np.uint8]) -> float:
    """The largest difference of a class's probability between a network and its export (`OnnxModel.run`).

    Over uint8 images (n, s, s), n >= 1; some 1e-6 by rounding. Raises `InvalidBundle` beyond 1e-4.
    """
    largest = 0.0
    for start in range(0, len(images), 32):
        some = images[start : start + 32]
        with tf.device("CPU"):  # a GPU rounds more coarsely
            here = tf.nn.softmax(model(some[..., None].astype(np.float32), training=False)["logits"]).numpy()
        there = tf.nn.softmax(exported(some).logits).numpy()
        largest = max(largest, float(np.abs(here - there).max()))
    if not largest <= _MOST_APART:
        raise InvalidBundle(
            "the exported network does not answer as the trained one",
            why=f"a probability differs by {largest:.3g}",
            fix="report this, with the architecture and the versions of tensorflow, tf2onnx and onnxruntime",
        )
    return largest


def _folded(data: bytes) -> bytes:
    """The same graph with constants folded, and scales and offsets taken into the convolution before them.

    ONNX Runtime would do this at each load; done here, the file is smaller and what is served is what was tested.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # standard operators only
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "folded.onnx"
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        proto = onnx.load(str(path))
    # Each optimiser of ONNX Runtime leaves the name of its own operator sets behind, used or not.
    used = {node.domain for node in proto.graph.node}
    sets = [each for each in proto.opset_import if each.domain in used]
    del proto.opset_import[:]
    proto.opset_import.extend(sets)
    _rescale_last(proto.graph)
    onnx.checker.check_model(proto)
    return cast(bytes, proto.SerializeToString())


def _rescale_last(graph: onnx.GraphProto) -> None:
    """Let the image's change of layout come before its rescaling by scalars, which is the same and much faster.

    ONNX Runtime steps through (n, s, s, 1) one pixel at a time when it adds a scalar: a third of a millisecond for
    128 px, a tenth of the whole network. On (n, 1, s, s) it takes a hundredth of that.
    """
    scalars = {each.name for each in graph.initializer if np.prod(each.dims) == 1}
    chain: list[onnx.NodeProto] = []
    name = graph.input[0].name
    while True:
        readers = [node for node in graph.node if name in node.input]
        if len(readers) != 1:
            return
        node = readers[0]
        if node.op_type in ("Reshape", "Transpose"):
            break
        if node.op_type not in ("Mul", "Add", "Sub", "Div") or not scalars & set(node.input):
            return
        chain.append(node)
        name = node.output[0]
    if not chain:
        return
    layout, end = node, node.output[0]
    del graph.value_info[:]  # shapes of values that now have another one
    _replace(layout.input, name, graph.input[0].name)
    _replace(chain[0].input, graph.input[0].name, f"{end}/layout")
    layout.output[0], chain[-1].output[0] = f"{end}/layout", end
    rest = [each for each in graph.node if each is not layout and each not in chain]
    ordered = [layout, *chain, *rest]
    copies = [onnx.NodeProto.FromString(each.SerializeToString()) for each in ordered]
    del graph.node[:]
    graph.node.extend(copies)


def _replace(names: Any, old: str, new: str) -> None:
    names[:] = [new if name == old else name for name in names]


def save_weights(model: keras.Model) -> bytes:
    """All weights as a compressed npz archive without pickle, keyed by the variables' paths.

    Kernels are kept in half precision, which is all a warm start needs and keeps the bundle small; biases and
    normalisation statistics, few and of any range, in full. What serves is the ONNX graph, in full precision.
    """
    arrays = {weight.path: np.asarray(weight) for weight in model.weights}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{path: _half(array) for path, array in arrays.items()})  # type: ignore[arg-type]
    return buffer.getvalue()


def load_weights(model: keras.Model, data: bytes) -> None:
    """Set the weights that `save_weights` wrote, for a warm start; the image size may differ.

    Raises `InvalidBundle` where the archive is damaged or of another architecture; the model is then unchanged.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InvalidBundle("the weights cannot be read", why=str(error), fix="train from scratch") from error
    wanted = {weight.path: tuple(weight.shape) for weight in model.weights}
    found = {name: array.shape for name, array in arrays.items()}
    if wanted != found:
        differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise InvalidBundle(
            "the weights are of another architecture", why=f"they differ in {differing[0]}", fix="train from scratch"
        )
    model.set_weights([arrays[weight.path].astype(weight.dtype) for weight in model.weights])


def _half(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.float16) if array.dtype == np.float32 and array.ndim > 1 else array
