"""Which object store a folder or URL is, in the settings and for `neuroloop backup` and `restore`."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from neuroloop.adapters.folder import FolderStore
from neuroloop.bootstrap import Services, open_source, open_store
from neuroloop.cli import app as cli
from neuroloop.core.errors import InvalidSetting, InvalidSource, NeuroLoopError
from neuroloop.core.settings import Settings

DATABASES = {
    "NEUROLOOP_DATABASE_URL": "postgresql://u@127.0.0.1:9/a",
    "NEUROLOOP_MLFLOW_DATABASE_URL": "postgresql://u@127.0.0.1:9/b",
}


@pytest.mark.parametrize("url", ["gcs://bucket/backups", "/srv/backups", "http://host/backups", ""])
def test_a_scheme_that_is_no_stores_is_refused_with_those_that_are(url: str):
    with pytest.raises(InvalidSetting, match=r"unknown.*file://, gs://, s3://, az://"):
        open_store(url)


@pytest.mark.parametrize("url", ["gs://", "s3:///backups", "az://?endpoint=http://127.0.0.1:1"])
def test_a_store_without_a_bucket_is_refused(url: str):
    with pytest.raises(InvalidSetting, match="names no bucket"):
        open_store(url)
    with pytest.raises(ValueError, match="names no bucket"):
        Settings(store_url=url)


@pytest.mark.parametrize("url", ["file://srv/backups", "file://localhost/srv/backups", "file:backups"])
def test_a_folder_with_a_host_is_refused(url: str):
    with pytest.raises(InvalidSetting, match="three slashes: file:///"):
        open_store(url)


@pytest.mark.parametrize("url", ["http://[x", "gs://[x", "~nobody-here/scans", "file://~nobody-here/scans"])
def test_a_source_that_cannot_be_understood_is_refused_in_words(url: str):
    with pytest.raises(InvalidSource, match="cannot be read as a data source"):
        open_source(url, images=120, seed=0)


@pytest.mark.parametrize("place", ["gs://[x", "~nobody-here/backups"])
def test_a_backup_that_cannot_be_understood_is_refused_in_words(tmp_path: Path, place: str):
    done = CliRunner().invoke(cli, ["restore", place], env={"NEUROLOOP_HOME": str(tmp_path), **DATABASES})
    assert isinstance(done.exception, NeuroLoopError)
    assert place in str(done.exception)


def test_a_backup_to_an_unknown_scheme_makes_no_local_folder(tmp_path: Path):
    environment = {"NEUROLOOP_HOME": str(tmp_path / "home"), "NEUROLOOP_ENV_FILE": str(tmp_path / "none")}
    done = CliRunner().invoke(cli, ["backup", f"gcs://bucket{tmp_path}/backups"], env={**environment, **DATABASES})
    assert "the scheme gcs:// is unknown" in str(done.exception)
    assert not (tmp_path / "backups").exists()


def test_a_backup_to_an_emulated_bucket_lies_in_a_folder_of_that_bucket(
    gcs_server, postgres_server, tmp_path, monkeypatch
):
    gcs_server.buckets["backups"] = {}
    place = f"gs://backups/nightly?endpoint={gcs_server.url}"
    environment = {"NEUROLOOP_HOME": str(tmp_path / "home"), "NEUROLOOP_ENV_FILE": str(tmp_path / "none")}
    environment |= {name: postgres_server.new_database() for name in DATABASES}
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    done = CliRunner().invoke(cli, ["backup", place], env=environment)
    assert done.exit_code == 0, done.output
    (url,) = re.findall(r"^(gs://\S+): ", done.stdout, re.MULTILINE)
    assert re.fullmatch(rf"gs://backups/nightly/neuroloop-\w+\?endpoint={gcs_server.url}", url)
    folder = url.removeprefix("gs://backups/").partition("?")[0]
    assert f"{folder}/manifest.json" in gcs_server.buckets["backups"]
    environment |= {name: postgres_server.new_database() for name in DATABASES}
    environment["NEUROLOOP_HOME"] = str(tmp_path / "new")
    assert CliRunner().invoke(cli, ["restore", url], env=environment).exit_code == 0


@pytest.mark.parametrize("name", ["scans #1", "why?", "100%25"])
def test_no_sign_in_a_folders_name_cuts_it_off(tmp_path: Path, name: str):
    open_store(f"file://{tmp_path}/{name}/store").put("a", b"1")
    assert FolderStore(str(tmp_path / name / "store")).get("a") == b"1"
    settings = Settings(home=tmp_path / name)
    Services(settings).store.put("b", b"2")
    assert settings.store == f"file://{tmp_path}/{name}/store"
    assert FolderStore(str(tmp_path / name / "store")).list("") == ["a", "b"]
    assert Settings(store_url=f"file://{tmp_path}/{name}").store == f"file://{tmp_path}/{name}"


def test_data_is_versioned_in_a_folder_with_any_name(tmp_path: Path):
    services = Services(Settings(home=tmp_path / "scans #1"))
    (tmp_path / "work" / "data").mkdir(parents=True)
    (tmp_path / "work" / "data" / "a.png").write_bytes(b"a scan")
    services.versions.commit(tmp_path / "work")
    assert any(services.store.get(key) == b"a scan" for key in services.store.list("data/dvc/"))
