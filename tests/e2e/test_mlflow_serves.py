"""MLflow's own server gives the answers of the bundle: `mlflow models serve` of a registered version, over HTTP."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import httpx
import numpy as np
import pytest

from conftest import stop, wait_until
from neuroloop.adapters.mlflow_registry import MODEL, MlflowRegistry
from neuroloop.core.schemas import LABELS
from neuroloop.imaging.canonical import canonicalize
from neuroloop.model.bundle import Bundle
from serving.running import SIZE, head, write_bundle

pytestmark = pytest.mark.e2e


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def invocations(bundle: Path, mlflow_uri: str, free_port, tmp_path: Path):
    """The address of a scoring server of the bundle's registered version."""
    registry = MlflowRegistry(mlflow_uri)
    run = registry.open_run(str(uuid.uuid4()), experiment="served-by-mlflow")
    registry.set_alias("served", registry.register(run, bundle, tags={}).version)
    port, log = free_port(), tmp_path / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "--workers", "1"),
                *("--model-uri", f"models:/{MODEL}@served", "--host", "127.0.0.1", "--port", str(port)),
            ],
            # Its own interpreter first on the path: it starts `uvicorn` by name.
            env=os.environ
            | {
                "MLFLOW_TRACKING_URI": mlflow_uri,
                "MLFLOW_DISABLE_TELEMETRY": "true",
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            },
            cwd=tmp_path,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            return httpx.get(f"{url}/ping", timeout=2, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        wait_until(answers, process, log)
        yield f"{url}/invocations"
    finally:
        stop(process)


def test_mlflow_serves_a_registered_version_with_the_logits_of_the_bundle(invocations: str, bundle: Path):
    images = np.stack([canonicalize(head(label), SIZE) for label in LABELS])
    body = {"inputs": {"image": images[..., None].astype(float).tolist()}}
    answer = httpx.post(invocations, json=body, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    predictions = answer.json()["predictions"]
    expected = Bundle.load(bundle).predict(images)
    np.testing.assert_allclose(predictions["logits"], expected.logits, atol=1e-5)
    np.testing.assert_allclose(predictions["cam"], expected.cam, atol=1e-4)
    assert np.argmax(predictions["logits"], axis=1).tolist() == [0, 1, 2, 3]

    wrong = {"inputs": {"image": images[:, :32, :32, None].astype(float).tolist()}}
    refused = httpx.post(invocations, json=wrong, timeout=60, trust_env=False)
    assert refused.status_code == 400
    assert "shape" in json.dumps(refused.json())
