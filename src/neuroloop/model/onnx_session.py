"""One way to open an ONNX file for inference; needs no TensorFlow."""

import onnxruntime

from neuroloop.core.errors import InvalidBundle

_NOWHERE = "/dev/null"  # no folder, so that no file lies in it


def open_session(onnx: bytes, what: str, *, threads: int) -> onnxruntime.InferenceSession:
    """The network of a file on the CPU; one call may use `threads` cores.

    What is not in the file itself does not count: ONNX has weights in other files, too, which would let whoever wrote
    this one read the files of whoever opens it. Raises `InvalidBundle`, whose message calls it `what`.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", _NOWHERE)
    try:
        return onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen unrelated types for a bad file
        raise InvalidBundle(f"{what} cannot be loaded", why=str(error), fix="build the model again") from error
