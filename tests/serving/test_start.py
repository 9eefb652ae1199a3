"""A server that has started, serves and answers has not loaded what only training needs."""

import os
import subprocess
import sys

from neuroloop.bootstrap import Services

SERVE_ONE = """
import io, sys
import numpy as np
from neuroloop.bootstrap import services
from neuroloop.serving.champion import Champion
from neuroloop.serving.inference import InferenceService
from neuroloop.serving.metrics import Metrics
from serving.running import encoded, head

del sys.modules["onnx"]  # the tests' own, to make networks with
before = set(sys.modules)
given, metrics = services(), Metrics()
champion = Champion(given, metrics)
champion.refresh()
service = InferenceService(given, champion, metrics)
assert service.predict(encoded(head("glioma"))).label == "glioma"
service.check_database(), service.check_store(), service.models(), service.monitoring()
service.decoder.close()
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
print(",".join(sorted(loaded & {"mlflow", "pandas", "sklearn", "tensorflow", "keras", "onnx", "sqlalchemy", "yoyo"})))
"""


def test_a_server_answers_without_mlflow_pandas_scikit_learn_tensorflow_or_the_migrations_program(
    services: Services, champion: str
):
    services.log.check()  # the schema is there, as at every start but the first
    settings = services.settings
    done = subprocess.run(
        [sys.executable, "-c", SERVE_ONE],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "NEUROLOOP_HOME": str(settings.home),
            "NEUROLOOP_DATABASE_URL": settings.database_url,
            "NEUROLOOP_MLFLOW_TRACKING_URI": settings.mlflow_tracking_uri,
        },
        cwd=settings.home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
