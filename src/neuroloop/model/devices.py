"""What TensorFlow computes on. Imports TensorFlow: for the offline side only."""

import tensorflow as tf


def prepare() -> str:
    """Let TensorFlow take GPU memory as it needs it; names what it will compute on, such as `GPU NVIDIA L4` or `CPU`.

    By default it takes all memory of every GPU at the first operation, and whoever shares the GPU gets none. Called
    again, or after the first operation, it changes nothing.
    """
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        try:
            tf.config.experimental.set_memory_growth(gpu, True)
        except RuntimeError:  # the GPU is in use already: it was prepared before, or keeps TensorFlow's default
            break
    found = [f"GPU {tf.config.experimental.get_device_details(gpu).get('device_name', gpu.name)}" for gpu in gpus]
    return ", ".join(found) or "CPU"
