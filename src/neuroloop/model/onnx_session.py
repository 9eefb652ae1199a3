"""One way to open an ONNX file for inference; needs no TensorFlow."""

import onnxruntime

from neuroloop.core.errors import InvalidBundle


def open_session(onnx: bytes, what: str, *, threads: int) -> onnxruntime.InferenceSession:
    """The network of a file on the CPU; one call may use `threads` cores.

    Raises `InvalidBundle`, whose message calls it `what`.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen unrelated types for a bad file
        raise InvalidBundle(f"{what} cannot be loaded", why=str(error), fix="build the model again") from error
