"""Backup and restore of a whole stack: real PostgreSQL, MLflow on it, a store; the API before and after."""

import contextlib
import json
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg2
import pytest
from typer.testing import CliRunner

from adapters.test_prediction_log import prediction
from conftest import free, mlflow_server
from neuroloop.adapters.folder import FolderStore
from neuroloop.adapters.postgres import PostgresLog
from neuroloop.adapters.postgres_dump import PostgresDump
from neuroloop.bootstrap import Services
from neuroloop.cli import app as cli
from neuroloop.core import keys
from neuroloop.core.errors import AlreadyExists, NeuroLoopError, NotFound
from neuroloop.core.schemas import LABELS, Erasure
from neuroloop.core.settings import Settings
from neuroloop.loop import feedback, retraining
from neuroloop.records.backup import MANIFEST, UNFINISHED, backup, read_manifest, restore
from serving.running import Api, head, noise, serving, write_bundle


@dataclass
class Stack:
    """Where one platform is; a restore goes into another one."""

    home: Path
    database: str
    mlflow_database: str

    @property
    def artifacts(self) -> Path:
        return self.home / "store" / "mlflow"

    def settings(self, mlflow_uri: str = "http://127.0.0.1:9") -> Settings:
        return Settings(
            home=self.home,
            database_url=self.database,
            mlflow_database_url=self.mlflow_database,
            mlflow_tracking_uri=mlflow_uri,
            notify_url="smtp://127.0.0.1:9",
            refresh_seconds=0.2,
            decode_seconds=10,
            feedback_threshold=2,
        )

    def variables(self) -> dict[str, str]:
        return {
            "NEUROLOOP_HOME": str(self.home),
            "NEUROLOOP_ENV_FILE": str(self.home / "none"),
            "NEUROLOOP_DATABASE_URL": self.database,
            "NEUROLOOP_MLFLOW_DATABASE_URL": self.mlflow_database,
        }

    @contextlib.contextmanager
    def running(self) -> Iterator[Services]:
        """With its MLflow server, which keeps what it has in the same database and store as the platform's does."""
        (self.home / "mlflow").mkdir(parents=True, exist_ok=True)
        with mlflow_server(
            self.home / "mlflow", free(), database=self.mlflow_database, artifacts=str(self.artifacts)
        ) as uri:
            yield Services(self.settings(uri))


@pytest.fixture
def new_stack(tmp_path, postgres_server):
    def make(name: str) -> Stack:
        return Stack(tmp_path / name, postgres_server.new_database(), postgres_server.new_database())

    return make


def silent(line: str) -> None:
    pass


def answers(api: Api, ids: list[str]) -> dict[str, object]:
    """All that a client can ask of it that must not change."""
    told: dict[str, object] = {each: api.client.get(f"/v1/predictions/{each}").json() for each in ids}
    told |= {f"{each} image": api.client.get(f"/v1/predictions/{each}/image").content for each in ids}
    models, figures = api.client.get("/v1/models").json(), api.client.get("/v1/monitoring").json()
    told |= {"models": {name: models[name] for name in ("serving", "versions", "promotions")}, "figures": figures}
    served = api.client.get("/v1/model").json()
    return told | {"served": {name: served[name] for name in ("version", "sha256", "data_version")}}


def counts(url: str) -> dict[str, int]:
    with contextlib.closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT quote_ident(tablename) FROM pg_tables WHERE schemaname = 'public'")
        found = {}
        for (table,) in cursor.fetchall():
            cursor.execute(f"SELECT count(*) FROM {table}")
            found[table] = cursor.fetchone()[0]
        return found


@pytest.mark.timeout(1200)
def test_a_restored_stack_gives_the_same_answers_and_retrains_on_nothing_twice(new_stack, tmp_path):
    old, new = new_stack("old"), new_stack("new")
    with old.running() as services:
        run = services.registry.open_run("r1", experiment="data_and_model_build")
        version = services.registry.register(run, write_bundle(tmp_path / "bundle"), tags={"data_version": "d1"})
        services.registry.set_alias("champion", version.version)
        with serving(services) as api:
            ids = [api.predict(head(label)).json()["id"] for label in LABELS] + [api.predict(noise()).json()["id"]]
            key = str(uuid.uuid4())
            upload = {"files": {"file": ("a.png", b"")}, "headers": {"Idempotency-Key": key}}
            upload["files"] = {"file": ("a.png", _png(head("glioma", width=230)))}
            first = api.client.post("/v1/predictions", **upload).json()
            for number, each in enumerate(ids[:3]):
                assert api.feedback(each, "correct", LABELS[number - 1]).status_code == 200
            assert retraining.check_source_flag(services, "run-1")["go"]
            assert retraining.flag_true(services, "run-1") == {"batch": 1, "corrections": 3}
            assert api.feedback(ids[3], "correct", "glioma").status_code == 200
            before = answers(api, [*ids, first["id"]])
            made = CliRunner().invoke(cli, ["backup", str(tmp_path / "backups")], env=old.variables())
            assert made.exit_code == 0, made.output + str(made.exception)
    (folder,) = (tmp_path / "backups").iterdir()
    assert (tmp_path / "backups").stat().st_mode & 0o077 == 0
    done = CliRunner().invoke(cli, ["restore", str(folder)], env=new.variables())
    assert done.exit_code == 0, done.output + str(done.exception)
    manifest = read_manifest(FolderStore(str(folder)))
    assert manifest.missing == ()
    assert counts(new.database) == {**counts(old.database)}
    assert counts(new.mlflow_database) == counts(old.mlflow_database)
    assert counts(new.mlflow_database)["model_versions"] == 1
    store = FolderStore(str(new.home / "store"))
    assert sorted(manifest.objects) == store.list("") == FolderStore(str(old.home / "store")).list("")
    with new.running() as services, serving(services) as api:
        assert answers(api, [*ids, first["id"]]) == before
        again = api.client.post("/v1/predictions", **upload).json()
        assert again == first
        assert not retraining.check_source_flag(services, "run-2")["go"]
        assert feedback.claim(services.store, "run-2", threshold=2) is None
        assert len(feedback.waiting(services.store)) == 1
        assert feedback.claim(services.store, "run-1", threshold=2).number == 1
        assert api.predict(head("pituitary")).status_code == 201
        assert services.registry.register(
            services.registry.open_run("r2", experiment="data_and_model_build"), tmp_path / "bundle", tags={}
        ).version == str(int(version.version) + 1)


def _png(pixels) -> bytes:
    from serving.running import encoded

    return encoded(pixels)


# --- the store and the prediction log alone -----------------------------------------------------


@pytest.fixture
def small(tmp_path, postgres_url) -> tuple[dict[str, PostgresDump], FolderStore, PostgresLog]:
    """A log with three predictions and the store with their images."""
    store, log = FolderStore(str(tmp_path / "store")), PostgresLog(postgres_url)
    for label in ("glioma", "pituitary", None):
        made = prediction(label)
        key = keys.prediction(label, made.id) if label else keys.invalid(made.id)
        store.put(key, made.id.encode())
        log.record_prediction(made.model_copy(update={"object_key": key}))
    return {"neuroloop": PostgresDump(postgres_url)}, store, log


def test_what_is_erased_while_the_backup_is_made_is_not_in_it(small, tmp_path):
    databases, store, log = small
    target = FolderStore(str(tmp_path / "backup"))
    erased: list[str] = []

    class WithAnErasure(FolderStore):
        """The same folder; an erasure happens while its objects are being copied."""

        def get(self, key: str) -> bytes:
            data = super().get(key)
            if not erased:
                erased.append(key)
                name = key.rsplit("/", 1)[-1].removesuffix(".png")
                log.mark_erased(Erasure(prediction_id=name, reason="mistake", by="ann"))
                self.delete(key)
                log.finish_erasure(name)
            return data

    manifest = backup(databases, WithAnErasure(str(tmp_path / "store")), target, say=silent)
    assert manifest.missing == ()
    assert sorted(manifest.objects) == store.list("")
    assert len(manifest.objects) == 2
    name = erased[0].rsplit("/", 1)[-1].removesuffix(".png")
    tables = {table.name: table.rows for table in manifest.databases["neuroloop"].tables}
    assert (tables["predictions"], tables["erasures"]) == (2, 1)
    predictions = [target.get(key) for key in target.list("databases/neuroloop/predictions/")]
    assert not any(name.encode() in data for data in predictions)
    assert not [key for key in target.list("objects/") if name in key]


def test_what_comes_and_is_corrected_while_the_backup_is_made_is_not_in_it_without_its_row(small, tmp_path):
    """Restored without a row, nobody could erase it, and a retraining would learn from it."""
    databases, store, log = small
    store.put(elsewhere := keys.correction("glioma", str(uuid.uuid4())), b"brought here by hand, before")
    before, came = store.list(""), prediction("glioma")
    came = came.model_copy(update={"object_key": keys.prediction("glioma", came.id)})
    at_once = threading.Lock()

    class Busy(FolderStore):
        """The same folder; a scan comes and is corrected while objects are being copied."""

        def get(self, key: str) -> bytes:
            with at_once:
                if not self.exists(came.object_key):
                    self.put(came.object_key, b"an image")
                    log.record_prediction(came)
                    self.put(keys.correction("pituitary", came.id), b"an image")
            return super().get(key)

    target = FolderStore(str(tmp_path / "backup"))
    manifest = backup(databases, Busy(str(tmp_path / "store")), target, say=silent)
    assert sorted(manifest.objects) == before
    assert elsewhere in manifest.objects
    assert [key for key in target.list("") if came.id in key] == []
    again = backup(databases, store, FolderStore(str(tmp_path / "later")), say=silent)
    assert {came.object_key, keys.correction("pituitary", came.id)} <= again.objects.keys()


@pytest.mark.parametrize("moment", ["before it is read", "once it was read", "while it is listed"])
def test_a_corrected_copy_that_moves_to_another_class_while_the_backup_is_made_is_in_it(small, tmp_path, moment: str):
    databases, store, _ = small
    old, new = keys.correction("glioma", "x"), keys.correction("meningioma", "x")
    store.put(old, b"a corrected scan")

    class Moving(FolderStore):
        """The same folder; a reader changes the class of a correction at this moment."""

        def move(self) -> None:
            if self.exists(old):
                self.put(new, super().get(old))
                self.delete(old)

        def get(self, key: str) -> bytes:
            if key == old and moment == "before it is read":
                self.move()
            data = super().get(key)
            if key == old and moment == "once it was read":
                self.move()
            return data

        def list(self, prefix: str) -> list[str]:
            found = super().list(prefix)
            if moment == "while it is listed" and target.exists(f"objects/{old}") and old in found:
                found.remove(old)  # the listing has passed the new class, then it moves, then comes the old class
                self.move()
            return found

    target = FolderStore(str(tmp_path / "backup"))
    manifest = backup(databases, Moving(str(tmp_path / "store")), target, say=silent)
    assert sorted(manifest.objects) == store.list("")
    assert target.get(f"objects/{new}") == b"a corrected scan"
    assert not target.exists(f"objects/{old}")


def test_the_logs_of_tasks_are_not_in_a_backup(small, tmp_path):
    databases, store, _ = small
    before = store.list("")
    store.put(keys.task_log("model_retraining/run-1/retrain_model/attempt=1.log"), b"what a task said")
    target = FolderStore(str(tmp_path / "backup"))
    assert sorted(backup(databases, store, target, say=silent).objects) == before
    assert [key.removeprefix("objects/") for key in target.list("objects/")] == before


def test_an_image_that_was_lost_before_is_named_and_costs_no_backup(small, tmp_path):
    databases, store, _ = small
    lost = store.list(keys.INVALID)[0]
    store.delete(lost)
    manifest = backup(databases, store, FolderStore(str(tmp_path / "backup")), say=silent)
    assert manifest.missing == (lost,)
    assert len(manifest.objects) == 2


def test_a_restore_refuses_whatever_is_not_empty_and_writes_nothing(small, tmp_path, postgres_server):
    databases, store, _ = small
    target = FolderStore(str(tmp_path / "backup"))
    backup(databases, store, target, say=silent)
    fresh = {"neuroloop": PostgresDump(postgres_server.new_database())}
    with pytest.raises(AlreadyExists, match="store is not empty"):
        restore(fresh, store, target, say=silent)
    assert fresh["neuroloop"].empty()
    empty = FolderStore(str(tmp_path / "empty"))
    with pytest.raises(AlreadyExists, match="neuroloop is not empty"):
        restore(databases, empty, target, say=silent)
    assert empty.list("") == []
    with pytest.raises(AlreadyExists):
        backup(databases, store, target, say=silent)


def test_a_restore_that_broke_off_goes_on_and_another_one_is_refused(small, tmp_path, postgres_server):
    databases, store, log = small
    target, later = FolderStore(str(tmp_path / "backup")), FolderStore(str(tmp_path / "later"))
    backup(databases, store, target, say=silent)
    backup(databases, store, later, say=silent)
    url = postgres_server.new_database()
    fresh, empty = {"neuroloop": PostgresDump(url)}, FolderStore(str(tmp_path / "empty"))
    gone = target.list("objects/")[-1]
    data = target.get(gone)
    target.delete(gone)
    with pytest.raises(NotFound):
        restore(fresh, empty, target, say=silent)
    assert empty.exists(UNFINISHED)
    with pytest.raises(AlreadyExists, match="another restore"):
        restore(fresh, empty, later, say=silent)
    target.put(gone, data + b"!")
    with pytest.raises(NeuroLoopError, match="damaged"):
        restore(fresh, empty, target, say=silent)
    assert fresh["neuroloop"].empty()
    target.put(gone, data)
    restore(fresh, empty, target, say=silent)
    assert empty.list("") == store.list("")
    assert PostgresLog(url).monitoring() == log.monitoring()


def test_a_restore_killed_once_a_database_was_loaded_goes_on_unless_it_has_changed_since(
    small, tmp_path, postgres_server
):
    databases, store, log = small
    target = FolderStore(str(tmp_path / "backup"))
    backup(databases, store, target, say=silent)

    class Killed(PostgresDump):
        """The same database; the process ends as soon as the rows are in it."""

        def load(self, dump, read) -> None:
            super().load(dump, read)
            raise KeyboardInterrupt

    url, empty = postgres_server.new_database(), FolderStore(str(tmp_path / "empty"))
    with pytest.raises(KeyboardInterrupt):
        restore({"neuroloop": Killed(url)}, empty, target, say=silent)
    assert empty.exists(UNFINISHED)
    stranger = prediction()
    PostgresLog(url).record_prediction(stranger)
    with pytest.raises(AlreadyExists, match="holds other rows than the backup"):
        restore({"neuroloop": PostgresDump(url)}, empty, target, say=silent)
    with contextlib.closing(psycopg2.connect(url)) as connection, connection, connection.cursor() as cursor:
        cursor.execute("DELETE FROM predictions WHERE id = %s", (stranger.id,))
    restore({"neuroloop": PostgresDump(url)}, empty, target, say=silent)
    assert empty.list("") == store.list("")
    assert PostgresLog(url).monitoring() == log.monitoring()


def test_a_folder_without_a_whole_backup_is_told_from_one(small, tmp_path, postgres_server):
    databases, store, _ = small
    target = FolderStore(str(tmp_path / "backup"))
    fresh, empty = {"neuroloop": PostgresDump(postgres_server.new_database())}, FolderStore(str(tmp_path / "empty"))
    with pytest.raises(NotFound, match="no whole backup"):
        restore(fresh, empty, target, say=silent)
    backup(databases, store, target, say=silent)
    document = json.loads(target.get(MANIFEST)) | {"format": 2, "new": 1}
    target.put(MANIFEST, json.dumps(document).encode())
    with pytest.raises(NeuroLoopError, match="later version"):
        restore(fresh, empty, target, say=silent)


@pytest.mark.parametrize(("place", "told"), [("models", True), ("old/store/artifacts", False)])
def test_that_a_backup_is_without_models_which_lie_outside_of_the_store_is_said_by_it_and_by_its_restore(
    new_stack, tmp_path, place: str, told: bool
):
    old, new, url = new_stack("old"), new_stack("new"), f"file://{tmp_path / place}"
    FolderStore(url.removeprefix("file://")).put("1/bundle.onnx", b"a model")
    outside = old.variables() | {"NEUROLOOP_MLFLOW_ARTIFACTS_URL": url}
    made = CliRunner().invoke(cli, ["backup", str(tmp_path / "backups")], env=outside)
    (folder,) = (tmp_path / "backups").iterdir()
    done = CliRunner().invoke(cli, ["restore", str(folder)], env=new.variables())
    for each in (made, done):
        assert each.exit_code == 0, each.output + str(each.exception)
        assert ("WITHOUT THE MODELS" in each.output and url in each.output) == told
    manifest = read_manifest(FolderStore(str(folder)))
    assert manifest.mlflow_elsewhere == (url if told else "")
    assert list(manifest.objects) == ([] if told else ["artifacts/1/bundle.onnx"])


def test_a_backup_cannot_lie_in_its_own_store(new_stack):
    stack = new_stack("old")
    done = CliRunner().invoke(cli, ["backup", str(stack.home / "store" / "backups")], env=stack.variables())
    assert done.exit_code != 0
    assert "cannot lie in the store" in str(done.exception)


def test_a_name_with_an_end_of_line_of_unicodes_own_costs_no_backup(small, tmp_path, postgres_server):
    databases, store, log = small
    made = prediction("glioma").model_copy(
        update={"owner": "Ann\u2028Lee", "object_key": keys.prediction("glioma", "x")}
    )
    store.put(made.object_key, b"image")
    log.record_prediction(made)
    target = FolderStore(str(tmp_path / "backup"))
    assert backup(databases, store, target, say=print).missing == ()
    url = postgres_server.new_database()
    restore({"neuroloop": PostgresDump(url)}, FolderStore(str(tmp_path / "new")), target, say=print)
    assert PostgresLog(url).prediction(made.id) == made
