"""What importing the project's modules does, and does not, do."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "src").rglob("*.py")
)

IMPORT_ALL = """
import importlib, socket, sys
def refuse(*_, **__): raise OSError("no network at import")
socket.socket.connect = refuse
socket.create_connection = refuse
for name in sys.argv[1:]:
    importlib.import_module(name)
print(",".join(name for name in ("tensorflow", "keras", "mlflow") if name in sys.modules))
"""


def imported(*modules: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *modules],
        env={"PATH": "/usr/bin:/bin"},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_module_can_be_imported_with_an_empty_environment_and_no_network():
    assert "neuroloop.model.training" in MODULES
    imported(*MODULES)


@pytest.mark.parametrize("face", ["neuroloop.serving.api", "neuroloop.cli", "neuroloop.embedded.stack"])
def test_what_serves_pulls_in_neither_tensorflow_nor_the_mlflow_library(face):
    assert imported(face) == ""


def test_the_api_can_be_imported_without_what_only_training_needs():
    code = (
        "import sys, neuroloop.serving.api, neuroloop.bootstrap, neuroloop.adapters.mlflow_registry\n"
        "import neuroloop.adapters.postgres, neuroloop.adapters.folder, neuroloop.serving.decode_worker\n"
        "heavy = {'mlflow', 'pandas', 'sklearn', 'tensorflow', 'keras', 'onnx', 'cv2', 'skimage', 'matplotlib'}\n"
        "heavy |= {'sqlalchemy', 'yoyo', 'faiss', 'nilearn', 'pydicom', 'nibabel', 'airflow', 'streamlit'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_bench_can_be_started():
    benches = [file for file in sorted((ROOT / "bench").glob("*.py")) if "argparse.ArgumentParser(" in file.read_text()]
    assert len(benches) >= 8
    started = {
        file.name: subprocess.Popen(
            [sys.executable, str(file), "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for file in benches
    }
    for name, process in started.items():
        shown, error = process.communicate(timeout=300)
        assert process.returncode == 0, (name, error.decode()[-2000:])
        assert shown.startswith(b"usage: "), name
