"""Composition root: settings become services, chosen by URL scheme. The only place that names adapters."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from neuroloop.core.errors import InvalidSetting, InvalidSource
from neuroloop.core.ports import (
    ApiKeys,
    Database,
    DataSource,
    DataVersions,
    Notifier,
    ObjectStore,
    PredictionLog,
    Registry,
)
from neuroloop.core.settings import STORES, Settings, endpoint_of, folder_of, masked

if TYPE_CHECKING:
    from neuroloop.adapters.postgres import PostgresLog


@dataclass(frozen=True)
class Services:
    """The outside world of one process; each service is connected at first use."""

    settings: Settings

    @cached_property
    def store(self) -> ObjectStore:
        """The object store of `STORE_URL`."""
        return open_store(self.settings.store_url or self.settings.store)

    @cached_property
    def log(self) -> PredictionLog:
        """The database of `DATABASE_URL`, migrated."""
        return self._database

    @cached_property
    def keys(self) -> ApiKeys:
        """The API keys, which stand in the same database."""
        return self._database

    @cached_property
    def registry(self) -> Registry:
        """The MLflow server of `MLFLOW_TRACKING_URI`."""
        from neuroloop.adapters.mlflow_registry import MlflowRegistry

        user, password = self.settings.mlflow_login
        return MlflowRegistry(self.settings.mlflow_tracking_uri, user=user, password=password)

    @cached_property
    def notifier(self) -> Notifier:
        """The mail server of `NOTIFY_URL`."""
        from neuroloop.adapters.smtp import SmtpNotifier

        return SmtpNotifier(self.settings.notify_url, self.settings.notify_from, self.settings.notify_to)

    @cached_property
    def versions(self) -> DataVersions:
        """DVC with the object store as its remote."""
        from neuroloop.adapters.dvc import DvcVersions
        from neuroloop.core.keys import DVC_REMOTE

        return DvcVersions(f"{self.settings.store}/{DVC_REMOTE}", self.settings.store_endpoint)

    def migrate(self) -> list[str]:
        """Bring the database up to date now; the names of the steps that were missing."""
        return self._database.migrate()

    @cached_property
    def _database(self) -> "PostgresLog":
        from neuroloop.adapters.postgres import PostgresLog

        self.settings.require("database_url")
        return PostgresLog(self.settings.database_url)

    @cached_property
    def databases(self) -> Mapping[str, Database]:
        """What a backup holds: the prediction log, and MLflow's tracking and registry."""
        from neuroloop.adapters.postgres_dump import PostgresDump

        self.settings.require("database_url", "mlflow_database_url")
        urls = {"neuroloop": self.settings.database_url, "mlflow": self.settings.mlflow_database_url}
        return {name: PostgresDump(url) for name, url in urls.items()}

    def pretrained(self, architecture: str) -> Path | None:
        """The file of pretrained weights an architecture starts from, fetched if need be; None for random weights."""
        from neuroloop.adapters.pretrained import locate

        return locate(self.settings.pretrained, architecture, self.settings.home / "weights")

    def source(self, url: str, *, seed: int) -> DataSource:
        """The training source of `url`; `seed` is for simulated scans."""
        settings = self.settings
        return open_source(url, images=settings.simulated_images, seed=seed, licence=settings.data_licence)


def open_store(url: str) -> ObjectStore:
    """`file:///folder`, or `gs://bucket`, `s3://bucket` or `az://container`, each with or without a `/prefix`.

    `gs://bucket?endpoint=http://host:4443` is the bucket of an emulator. Raises `InvalidSetting` for any other URL.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InvalidSetting(f"{masked(url)!r} is no object store", why=str(error)) from None
    match parts.scheme:
        case "gs" | "s3" | "az" if not parts.netloc:
            raise InvalidSetting(f"{masked(url)!r} is no object store", why="it names no bucket")
        case "gs":
            from neuroloop.adapters.gcs import GcsStore

            return GcsStore(parts.netloc, parts.path, endpoint_of(url))
        case "s3" | "az":
            from neuroloop.adapters import cloud

            vendor = cloud.S3 if parts.scheme == "s3" else cloud.AZURE
            return cloud.CloudStore(vendor, parts.netloc, parts.path)
        case "file":
            from neuroloop.adapters.folder import FolderStore

            try:
                return FolderStore(folder_of(url))
            except ValueError as error:
                raise InvalidSetting(f"{masked(url)!r} is no object store", why=str(error)) from None
    raise InvalidSetting(
        f"{masked(url)!r} is no object store",
        why=f"the scheme {parts.scheme}:// is unknown",
        fix=f"use one of {', '.join(f'{scheme}://' for scheme in STORES)}",
    )


def open_source(url: str, *, images: int, seed: int, licence: str = "") -> DataSource:
    """`phantom://`, a folder, a bucket (as `open_store`) or `kaggle://owner/dataset`; `licence`: of real images."""
    from neuroloop.adapters.folder import FolderStore
    from neuroloop.data import source

    try:
        parts = urlsplit(url)
        folder = Path(url.removeprefix("file://")).expanduser().absolute()
    except (ValueError, RuntimeError) as error:  # [ without ], and ~ann, where there is no ann
        fix = "write a whole path, or a URL such as s3://bucket/prefix"
        raise InvalidSource(f"{masked(url)!r} cannot be read as a data source", why=str(error), fix=fix) from None
    match parts.scheme:
        case "phantom":
            return source.PhantomSource(images=images, seed=seed)
        case "gs" | "s3" | "az":
            return source.ObjectSource(url, open_store(url), licence)
        case "kaggle":
            from neuroloop.adapters.kaggle import download

            return source.ObjectSource(
                url, FolderStore(download(parts.netloc + parts.path), follow_links=True), licence
            )
        case "" | "file":
            return source.ObjectSource(url, FolderStore(str(folder), follow_links=True), licence)
        case other:
            raise InvalidSource(
                f"{masked(url)!r} cannot be read as a data source",
                why=f"the scheme {other}:// is unknown",
                fix="use phantom://, a folder, gs://, s3:// or az://bucket/prefix, or kaggle://owner/dataset",
            )


def services(settings: Settings | None = None) -> Services:
    """The services of the current settings; this process then asks them past a proxy meant for the internet."""
    settings = settings or Settings.load()
    settings.past_proxies(os.environ)
    return Services(settings)
