"""CI and CD: what the workflows and the Jenkinsfile do, and the Makefile's targets that they call."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from neuroloop import __version__

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
JENKINS = (ROOT / "Jenkinsfile").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def jobs(path: Path) -> dict[str, dict[str, Any]]:
    return yaml.safe_load(path.read_text())["jobs"]


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in jobs(path).values() for step in job["steps"]]


def test_the_workflows_keep_the_schema_of_github():
    argv = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.stem for path in WORKFLOWS} == {"checks", "release"}


@each_workflow
def test_every_step_is_a_pinned_action_or_one_target_of_the_makefile(path: Path):
    for step in steps(path):
        if "uses" in step:
            assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", step["uses"])
        else:
            target = re.fullmatch(r"make ([a-z-]+)", step["run"])
            assert target, step
            assert target[1] in TARGETS
    pinned = re.findall(r"uses: (\S+@\S+)(.*)", path.read_text())
    assert all(re.fullmatch(r" # v\d+\.\d+\.\d+", version) for _, version in pinned)


@each_workflow
def test_a_job_may_read_the_sources_and_the_one_that_deploys_may_write_them(path: Path):
    assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}
    for name, job in jobs(path).items():
        assert job["timeout-minutes"] <= 120
        assert job.get("permissions") == ({"contents": "write"} if name == "deploy" else None)
        (checkout,) = (step for step in job["steps"] if step.get("uses", "").startswith("actions/checkout@"))
        assert ("ref" if name == "deploy" else "persist-credentials") in checkout["with"]


def test_the_jenkinsfile_calls_the_same_targets_and_nothing_else():
    called = re.findall(r"\bsh\s+(.*)", JENKINS)
    targets = {re.match(r"'make ([a-z-]+)'", each)[1] for each in called}
    assert targets == {step["run"].removeprefix("make ") for path in WORKFLOWS for step in steps(path) if "run" in step}


def test_secrets_come_from_the_store_of_the_ci_and_reach_the_step_that_needs_them_only():
    for path in WORKFLOWS:
        for step in steps(path):
            if "REGISTRY_PASSWORD" in str(step.get("env", "")):
                assert step["run"] == "make registry-login"
                assert step["env"]["REGISTRY_PASSWORD"] == "${{ secrets.REGISTRY_PASSWORD }}"
    assert "REGISTRY_PASSWORD" not in str(jobs(ROOT / ".github/workflows/checks.yml"))


# --- targets ------------------------------------------------------------------------------------


def would_run(*argv: str) -> str:
    """What make would do, with the environment of a CI that sets nothing."""
    return make("-n", *argv).stdout


def make(*argv: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    return subprocess.run(["make", "-C", folder, *argv], env=outside, capture_output=True, text=True, check=False)


def test_what_is_pushed_has_provenance_and_a_list_of_its_parts_and_a_version_without_the_v():
    commands = would_run("push", "REGISTRY=registry.example.org/neuroloop", "TAG=v1.2.3")
    assert "--provenance=mode=max --sbom=true --push" in commands
    assert "for image in airflow:airflow api:api frontend:ui mlflow:mlflow" in commands
    assert '--tag "registry.example.org/neuroloop/neuroloop-${image%:*}:1.2.3"' in commands


def test_packages_that_a_cloud_or_a_gpu_needs_go_into_the_images_by_hand_and_by_ci():
    packages = "boto3 dvc-s3 tensorflow[and-cuda]>=2.19"
    for target in ("images", "push"):
        commands = would_run(target, "REGISTRY=r/n", f"EXTRA_PACKAGES={packages}")
        assert f'--build-arg EXTRA_PACKAGES="{packages}"' in commands
        assert "--build-arg" not in would_run(target, "REGISTRY=r/n", "EXTRA_PACKAGES=")
    push = jobs(ROOT / ".github/workflows/release.yml")["push"]
    assert push["env"]["EXTRA_PACKAGES"] == "${{ vars.EXTRA_PACKAGES }}"
    assert JENKINS.count('EXTRA_PACKAGES = "${params.EXTRA_PACKAGES}"') == 1


@pytest.mark.parametrize(
    ("packages", "installed"), [("", ""), ("boto3 tensorflow[and-cuda]>=2.19 dvc-s3", "boto3 dvc-s3")]
)
def test_the_image_of_mlflow_takes_none_of_a_trainers_packages(packages: str, installed: str):
    stage = (ROOT / "deploy" / "Dockerfile").read_text().split("AS mlflow-packages")[1]
    (line,) = re.findall(r'(echo "\$EXTRA_PACKAGES" .*xargs --no-run-if-empty )uv pip install', stage)
    argv, env = ["bash", "-o", "pipefail", "-c", f"{line} echo"], os.environ | {"EXTRA_PACKAGES": packages}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == installed


def test_without_a_registry_nothing_is_pushed():
    done = make("push")
    assert done.returncode != 0
    assert "name the registry" in done.stdout


def test_images_built_here_are_those_that_the_local_overlay_runs():
    commands = would_run("images")
    assert f'--tag "neuroloop-${{image%:*}}:{__version__}"' in commands
    overlay = (ROOT / "deploy/kubernetes/overlays/local/kustomization.yaml").read_text()
    assert set(re.findall(r"newTag: (\S+)", overlay)) == {__version__}
    values = yaml.safe_load((ROOT / "deploy/kubernetes/overlays/local/airflow-values.yaml").read_text())
    assert values["defaultAirflowTag"] == __version__


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A repository with the Makefile, the sources' version and deploy/, and a remote to push to."""
    shutil.copytree(ROOT / "deploy", tmp_path / "work" / "deploy")
    (tmp_path / "work" / "src" / "neuroloop").mkdir(parents=True)
    for name in ("Makefile", "src/neuroloop/__init__.py"):
        shutil.copy(ROOT / name, tmp_path / "work" / name)
    git(tmp_path, "init", "--quiet", "--bare", "remote")
    git(tmp_path / "work", "init", "--quiet", "--initial-branch=main")
    git(tmp_path / "work", "remote", "add", "origin", str(tmp_path / "remote"))
    git(tmp_path / "work", "add", ".")
    git(tmp_path / "work", "commit", "--quiet", "-m", "first")
    return tmp_path / "work"


def git(folder: Path, *argv: str) -> str:
    who = ("-c", "user.name=a test", "-c", "user.email=test@example.org")
    return subprocess.run(["git", *who, *argv], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_a_published_bump_moves_one_overlay_and_reaches_the_branch_that_argo_follows(copy: Path):
    for _ in range(2):  # a job that runs again finds it done
        assert make("publish-bump", "ENVIRONMENT=gke", "TAG=v1.2.3", folder=copy).returncode == 0
    changed = git(copy, "diff", "--stat", "HEAD~1").splitlines()[:-1]
    overlay = "deploy/kubernetes/overlays/gke"
    assert [line.split()[0] for line in changed] == [f"{overlay}/airflow-values.yaml", f"{overlay}/kustomization.yaml"]
    built = yaml.safe_load(git(copy, "show", f"origin/main:{overlay}/kustomization.yaml"))
    assert {image["newTag"] for image in built["images"]} == {"1.2.3"}
    values = yaml.safe_load(git(copy, "show", f"origin/main:{overlay}/airflow-values.yaml"))
    assert values["defaultAirflowTag"] == "1.2.3"
    assert git(copy, "log", "-1", "--format=%s").strip() == "gke runs 1.2.3"


@pytest.mark.parametrize(
    ("environment", "tag", "words"),
    [("gke", "latest", "no version"), ("mars", "1.2.3", "there are aks, eks, gke, local"), ("", "1.2.3", "there are")],
)
def test_a_bump_to_no_version_or_no_environment_is_refused_and_changes_nothing(
    copy: Path, environment: str, tag: str, words: str
):
    argv = [sys.executable, copy / "deploy" / "bump", environment, tag]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert words in done.stderr
    assert git(copy, "status", "--short") == ""
