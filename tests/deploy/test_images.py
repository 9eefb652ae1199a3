"""What each container image holds: the pinned packages of its target, and whether its roles can live on them."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = ("api", "ui", "mlflow")
GROUPS = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]

ONLY = """
import importlib, importlib.abc, importlib.metadata, re, sys
known = lambda name: re.sub(r"[-_.]+", "-", name).lower()
allowed = {known(name) for name in sys.argv[1].split()}
owners = importlib.metadata.packages_distributions()
finders = list(sys.meta_path)
class Only(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        mine = {known(owner) for owner in owners.get(name, [])} - {"neuroloop"}
        if mine and not mine & allowed:
            return None
        return next((spec for finder in finders if (spec := finder.find_spec(name, path, target))), None)
    def find_distributions(self, *args):
        return importlib.metadata.MetadataPathFinder.find_distributions(*args)
sys.meta_path[:] = [Only()]
sys.path[:0] = sys.argv[2].split(":")
for module in sys.argv[3:]:
    importlib.import_module(module)
"""


def pins(file: Path) -> dict[str, str]:
    return dict(line.split("==") for line in file.read_text().splitlines())


def imported(image: str, *modules: str) -> str:
    """What the import of `modules` says where only that image's packages can be imported; empty: it went well."""
    names = " ".join(pins(ROOT / "deploy" / f"requirements-{image}.txt"))
    argv = [sys.executable, "-c", ONLY, names, f"{ROOT / 'src'}:{ROOT / 'frontend'}", *modules]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else ""


@pytest.mark.parametrize("image", IMAGES)
def test_the_packages_of_every_image_are_pinned_as_in_the_one_list(image: str):
    whole = pins(ROOT / "requirements.txt")
    mine = pins(ROOT / "deploy" / f"requirements-{image}.txt")
    assert mine.items() <= whole.items()
    assert {name(line) for line in GROUPS[image] if isinstance(line, str)} <= set(mine)


@pytest.mark.parametrize("image", IMAGES)
def test_neither_tensorflow_nor_airflow_is_in_an_image_that_only_serves(image: str):
    heavy = re.compile(r"tensorflow|keras|apache-airflow|celery|dvc|torch|nvidia|tf2onnx")
    assert [package for package in pins(ROOT / "deploy" / f"requirements-{image}.txt") if heavy.match(package)] == []


def test_the_lists_are_made_by_the_makefile_from_the_groups():
    lock = (ROOT / "Makefile").read_text().partition("\nlock:")[2].partition("\n\n")[0]
    assert f"for image in {' '.join(IMAGES)}; do" in lock
    assert set(GROUPS) == {*IMAGES, "role"}


def test_the_api_and_all_its_adapters_can_be_imported_with_its_packages_only():
    adapters = ("gcs", "cloud", "folder", "postgres", "mlflow_registry", "smtp")
    modules = ("cli", "serving.api", "serving.decode_worker", "serving.rollback")
    lazy = ("pydicom", "openjpeg", "gdcm", "nibabel", "ecs_logging", "aiosmtpd.controller", "yoyo")
    ours = [f"neuroloop.{module}" for module in (*modules, *(f"adapters.{adapter}" for adapter in adapters))]
    assert imported("api", *ours, *lazy) == ""


def test_the_frontend_can_be_imported_with_its_packages_only():
    modules = ("api_client", "heatmap", "layout", "samples", "session", "signin", "streamlit.web.cli")
    assert imported("ui", "neuroloop.embedded.roles", *modules) == ""


def test_the_dockerfile_has_no_fault_that_hadolint_knows():
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, ROOT / "deploy" / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_an_import_that_an_image_lacks_would_be_noticed():
    assert "No module named 'tensorflow'" in imported("api", "tensorflow")
    assert "No module named 'streamlit'" in imported("api", "streamlit")


def name(requirement: str) -> str:
    return re.split(r"[<>=\[; ]", requirement)[0]
