"""The contract of `ports.DataVersions`, by real DVC on a folder and on three clouds' stores."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from neuroloop.adapters.cloud import AZURE, S3, CloudStore
from neuroloop.adapters.dvc import DvcVersions
from neuroloop.adapters.folder import FolderStore
from neuroloop.adapters.gcs import GcsStore
from neuroloop.core import keys
from neuroloop.core.errors import InvalidSource, NotFound, Unavailable
from servers.clouds import AWS_PACKAGES

FILES = {
    "Training/glioma/Tr-gl (1).jpg": b"first scan",
    "Training/notumor/a.png": bytes(range(256)) * 50 + b"\r",
    "Testing/notumor/same-as-a.png": bytes(range(256)) * 50 + b"\r",
}


@pytest.fixture(params=["folder", "gcs", "s3", "azure"])
def remote(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """(object store, its DVC remote as `bootstrap` opens it)"""
    if request.param == "folder":
        return FolderStore(str(tmp_path / "store")), DvcVersions(f"file://{tmp_path}/store/{keys.DVC_REMOTE}")
    if request.param == "gcs":
        bucket = request.getfixturevalue("gcs_bucket")
        return GcsStore(bucket), DvcVersions(f"gs://{bucket}/{keys.DVC_REMOTE}")
    if request.param == "s3":
        bucket = request.getfixturevalue("s3_bucket")
        with_the_extra_aws(monkeypatch)
        return CloudStore(S3, bucket, "below"), DvcVersions(f"s3://{bucket}/below/{keys.DVC_REMOTE}")
    container = request.getfixturevalue("azure_container")
    return CloudStore(AZURE, container, "below"), DvcVersions(f"az://{container}/below/{keys.DVC_REMOTE}")


def with_the_extra_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let DVC, which runs as a command, find what the extra `aws` would have installed."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(AWS_PACKAGES), os.environ.get("PYTHONPATH", "")]))


def fill(workspace: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = workspace / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return workspace


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", ["add", "push"])
def test_a_commit_waits_for_the_dvc_that_a_killed_process_has_left_at_work(command: str, tmp_path: Path):
    url, workspace = f"file://{tmp_path}/store/{keys.DVC_REMOTE}", fill(tmp_path / "one", FILES)
    program = "import sys, pathlib\nfrom neuroloop.adapters.dvc import DvcVersions\n"
    program += "DvcVersions(sys.argv[1]).commit(pathlib.Path(sys.argv[2]))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.Popen([sys.executable, "-c", program, url, str(workspace)], env=environment)

    def at_work() -> list[str]:
        found = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
        return [child for child in found if command in Path(f"/proc/{child}/cmdline").read_text().split("\0")]

    while not (left := at_work()):
        assert killed.poll() is None
        time.sleep(0.005)
    killed.kill()
    killed.wait()
    assert Path(f"/proc/{left[0]}").exists()
    version, _ = DvcVersions(url).commit(workspace)
    store = FolderStore(str(tmp_path / "store"))
    assert hashlib.md5(store.get(keys.image(f"{version}.dir"))).hexdigest() == version
    for data in FILES.values():
        assert store.get(keys.image(hashlib.md5(data).hexdigest())) == data


def test_a_version_lies_in_the_store_where_the_keys_say_and_comes_back_whole(remote, tmp_path: Path):
    store, versions = remote
    version, data_dvc = versions.commit(fill(tmp_path / "one", FILES))
    assert f"{version}.dir" in data_dvc.decode()
    for data in FILES.values():
        assert store.get(keys.image(hashlib.md5(data).hexdigest())) == data
    listing_bytes = store.get(keys.image(f"{version}.dir"))
    assert hashlib.md5(listing_bytes).hexdigest() == version  # so the same files are the same version everywhere
    listing = json.loads(listing_bytes)
    assert {entry["relpath"]: entry["md5"] for entry in listing} == {
        name: hashlib.md5(data).hexdigest() for name, data in FILES.items()
    }

    elsewhere = fill(tmp_path / "two", {"Training/glioma/Tr-gl (1).jpg": b"changed", "stray.txt": b"not of it"})
    versions.restore(data_dvc, elsewhere)
    assert contents(elsewhere / "data") == FILES


def test_a_changed_file_makes_another_version_and_the_first_one_stays(tmp_path: Path):
    store, versions = FolderStore(str(tmp_path)), DvcVersions(f"file://{tmp_path}/{keys.DVC_REMOTE}")
    first, _ = versions.commit(fill(tmp_path / "one", FILES))
    kept = store.get(keys.image(hashlib.md5(FILES["Training/notumor/a.png"]).hexdigest()))
    second, _ = versions.commit(fill(tmp_path / "one", {"Training/notumor/a.png": b"another"}))
    assert second != first
    for version in (first, second):
        assert len(json.loads(store.get(keys.image(f"{version}.dir")))) == len(FILES)
    assert store.get(keys.image(hashlib.md5(kept).hexdigest())) == FILES["Training/notumor/a.png"] == kept


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: (folder / "data").mkdir()])
def test_a_workspace_without_data_has_no_version(tmp_path: Path, make):
    make(tmp_path)
    with pytest.raises(InvalidSource, match="nothing to version"):
        DvcVersions(f"file://{tmp_path}/remote").commit(tmp_path)


def test_a_version_that_the_remote_has_not_is_unavailable(tmp_path: Path):
    data_dvc = f"outs:\n- md5: {'0' * 32}.dir\n  size: 1\n  nfiles: 1\n  hash: md5\n  path: data\n".encode()
    with pytest.raises(Unavailable, match="dvc pull failed"):
        DvcVersions(f"file://{tmp_path}/remote").restore(data_dvc, tmp_path / "new")


def test_bytes_that_are_no_data_dvc_are_refused_before_dvc_runs(tmp_path: Path):
    with pytest.raises(InvalidSource, match="names no version"):
        DvcVersions(f"file://{tmp_path}/remote").restore(b"<html>", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_missing_bucket_is_unavailable(gcs_bucket: str, tmp_path: Path):
    with pytest.raises(Unavailable, match="gs://no-such-bucket"):
        DvcVersions("gs://no-such-bucket/data/dvc").commit(fill(tmp_path, FILES))
    with pytest.raises(NotFound):
        GcsStore(gcs_bucket).get(keys.image(hashlib.md5(b"first scan").hexdigest()))


def test_without_the_extra_aws_the_error_names_it(s3_bucket: str, tmp_path: Path):
    if importlib.util.find_spec("dvc_s3"):
        pytest.skip("the extra aws is installed here")
    with pytest.raises(Unavailable, match=r"neuroloop\[aws\]"):
        DvcVersions(f"s3://{s3_bucket}/data/dvc").commit(fill(tmp_path, FILES))
