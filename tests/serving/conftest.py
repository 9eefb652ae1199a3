"""A real store, PostgreSQL and MLflow for the API."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from neuroloop.adapters.mlflow_registry import MlflowRegistry
from neuroloop.bootstrap import Services
from neuroloop.core.settings import Settings
from serving.running import Api, serving, write_bundle


@pytest.fixture
def services(tmp_path: Path, postgres_url: str, mlflow_uri: str) -> Services:
    return Services(
        Settings(
            home=tmp_path,
            database_url=postgres_url,
            mlflow_tracking_uri=mlflow_uri,
            notify_url="smtp://127.0.0.1:9",
            refresh_seconds=0.2,
            max_upload_mb=1,
            decode_seconds=10,  # a busy machine is no reason to refuse an image
        )
    )


@pytest.fixture(scope="session")
def register(mlflow_uri: str) -> Callable[[Path], str]:
    """Register a bundle folder; returns its version."""
    registry = MlflowRegistry(mlflow_uri)

    def register(folder: Path) -> str:
        run = registry.open_run(f"serving-{uuid.uuid4()}", experiment="serving")
        return registry.register(run, folder, tags={}).version

    return register


@pytest.fixture(scope="session")
def standard(register: Callable[[Path], str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Version and folder of the one bundle that is registered for all tests that need no other."""
    folder = write_bundle(tmp_path_factory.mktemp("standard") / "bundle")
    return register(folder), folder


@pytest.fixture
def champion(standard: tuple[str, Path], mlflow_uri: str) -> str:
    """The standard bundle's version, made the champion."""
    MlflowRegistry(mlflow_uri).set_alias("champion", standard[0])
    return standard[0]


@pytest.fixture
def promote(register: Callable[[Path], str], mlflow_uri: str) -> Callable[[Path], str]:
    """Register a bundle folder and make it the champion; returns its version."""

    def promote(folder: Path) -> str:
        version = register(folder)
        MlflowRegistry(mlflow_uri).set_alias("champion", version)
        return version

    return promote


@pytest.fixture(scope="module")
def api(tmp_path_factory, postgres_server, mlflow_uri, standard) -> Iterator[Api]:
    """One API for a file of tests, serving the standard bundle."""
    MlflowRegistry(mlflow_uri).set_alias("champion", standard[0])
    settings = Settings(
        home=tmp_path_factory.mktemp("api"),
        database_url=postgres_server.new_database(),
        mlflow_tracking_uri=mlflow_uri,
        refresh_seconds=0.2,
        max_upload_mb=1,
        decode_seconds=10,
    )
    with serving(Services(settings)) as running:
        yield running
