"""One host of a training on several: the chief fits a model as a build does, the other runs `neuroloop train-worker`.

A program, not a test: a process joins a cluster before TensorFlow's first operation, and stays in it. Arguments: the
platform's home, the run, and a file for the final weights; `TF_CONFIG` says which host this is.
"""

import functools
import itertools
import json
import os
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np

from neuroloop import cli
from neuroloop.bootstrap import Services
from neuroloop.core.settings import Settings
from neuroloop.loop import pipeline
from neuroloop.model import gate_training, training

home, run, out = sys.argv[1:]
train = training.train


def observed(model, *arguments, **named):
    """The real training; its weights at the end go to the file."""
    result = train(model, *arguments, **named)
    np.savez(out, *model.get_weights(), losses=[metrics["loss"] for metrics in result.history])
    return result


training.train = observed
gate_training.steps_for = lambda *_: 20
gate_training.fit_gate = functools.partial(gate_training.fit_gate, per_kind=4)
index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
# A clock that goes on with each look at it, and three times as fast on the other host, which must not heed it.
clock = itertools.count(step=1 + 2 * index)
training.time = SimpleNamespace(monotonic=lambda: float(next(clock)))
if index == 0:
    services = Services(Settings(home=home, distribution="multi_worker"))
    services.__dict__["registry"] = MagicMock(next_step=lambda *_: 0)
    pipeline.fit(
        services, run, version="v1", statistics_json=b"{}", size=32, seed=0, epochs=None, minutes=0.5,
        architecture="tiny", hyperparameters={"batch": 13},
    )  # fmt: skip
else:
    os.environ["NEUROLOOP_HOME"] = home
    sys.argv[1:] = ["train-worker", run, "--wait", "120"]
    cli.main()
