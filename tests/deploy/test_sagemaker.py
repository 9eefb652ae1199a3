"""The requests of deploy/sagemaker, as far as one can judge them without an account."""

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from neuroloop.core.settings import Settings

SCRIPT = Path(__file__).parents[2] / "deploy" / "sagemaker" / "make-requests"
GIVEN = [
    *("--image", "111122223333.dkr.ecr.eu-central-1.amazonaws.com/neuroloop-api:0.1.0"),
    *("--role", "arn:aws:iam::111122223333:role/neuroloop-sagemaker"),
    *("--subnets", "subnet-a,subnet-b", "--groups", "sg-c"),
]


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    file = tmp_path / "sagemaker.env"
    file.write_text(
        "# of the endpoint\nNEUROLOOP_DATABASE_URL=postgresql://user:password@10.0.0.1:5432/neuroloop\n"
        "NEUROLOOP_MLFLOW_TRACKING_URI=http://10.0.0.2:5000\nNEUROLOOP_STORE_URL=gs://bucket\n"
    )
    return file


def make(folder: Path, settings: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, SCRIPT, folder, *GIVEN, "--settings", settings]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_the_container_gets_the_settings_and_listens_where_sagemaker_calls(tmp_path: Path, settings: Path):
    folder = tmp_path / "requests"
    assert make(folder, settings).returncode == 0
    model, config, endpoint = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("model", "config", "endpoint")
    )
    container = model["PrimaryContainer"]
    loaded = Settings.load(container["Environment"] | {"NEUROLOOP_ENV_FILE": str(tmp_path / "none")})
    assert (loaded.sagemaker, loaded.bind, loaded.api_port) == (True, "0.0.0.0", 8080)
    assert loaded.mlflow_tracking_uri == "http://10.0.0.2:5000"
    assert model["VpcConfig"] == {"Subnets": ["subnet-a", "subnet-b"], "SecurityGroupIds": ["sg-c"]}
    assert config["ProductionVariants"][0]["ModelName"] == model["ModelName"]
    assert endpoint["EndpointConfigName"] == config["EndpointConfigName"]


def test_the_requests_hold_secrets_and_nobody_else_may_read_them(tmp_path: Path, settings: Path):
    folder = tmp_path / "requests"
    make(folder, settings)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}


def test_a_setting_without_which_it_cannot_answer_is_named(tmp_path: Path, settings: Path):
    settings.write_text("NEUROLOOP_STORE_URL=gs://bucket\n")
    done = make(tmp_path / "requests", settings)
    assert done.returncode == 1
    assert "lacks NEUROLOOP_DATABASE_URL, NEUROLOOP_MLFLOW_TRACKING_URI" in done.stderr
    assert not (tmp_path / "requests").exists()
