"""Each task of the DAGs, killed wherever it leaves something, then tried again: the end is the same as without.

Two platforms of real parts, each with a store, a database, an MLflow server and a mailbox of its own, go through a
build and a retraining with the same run ids. On one nothing happens. On the other each task is killed, again and again,
at what it was seen to do on the first, and at last left alone. After every task both must have left the same.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psycopg2
import psycopg2.extras
import pytest
from PIL import Image

from conftest import mlflow_server
from loop.tripwire import FolderWatch, Tripwire, relayed
from neuroloop.adapters.smtp import start_sink
from neuroloop.bootstrap import Services
from neuroloop.core import keys
from neuroloop.core.mail import parse_mail
from neuroloop.core.schemas import LABELS, Feedback, GateResult, Prediction, Verdict
from neuroloop.core.settings import Settings
from neuroloop.imaging.decode import encode_png
from neuroloop.imaging.phantom import scan
from neuroloop.records import corrections
from servers.relay import Relay
from serving.running import Api, serving
from serving.test_privacy import CARRIERS, MARK, marked

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

BUILD, RETRAINING = "data_and_model_build", "model_retraining"
BUILD_RUN = "manual__2026-01-01T00:00:00+00:00"
EARLY_RUN, RETRAINING_RUN = "manual__2026-01-02T00:00:00+00:00", "scheduled__2026-01-03T00:00:00+00:00"
IMAGES, THRESHOLD = 128, 6
FOR_EVER = 1e9
"""Minutes of training: the learning rate follows the clock, too, and no two clocks are the same."""
PARAMS = {
    BUILD: {"minutes": FOR_EVER, "epochs": 1, "architecture": "tiny", "image_size": 32},
    RETRAINING: {"minutes": FOR_EVER, "epochs": 1},
}
# `list_shards` only reads what `download_data` has written.
STEPS = [
    *((BUILD, BUILD_RUN, task) for task in ("check_source", "download_data", "audit_shard")),
    *((BUILD, BUILD_RUN, task) for task in ("audit_data", "prepare_shard", "capture_statistics")),
    *((BUILD, BUILD_RUN, task) for task in ("augment_input_data", "transform_testing_data", "building_model")),
    *((BUILD, BUILD_RUN, task) for task in ("evaluate_model", "register_model", "promote_model", "send_email")),
    *((RETRAINING, EARLY_RUN, task) for task in ("check_source_flag", "flag_false")),
    *((RETRAINING, RETRAINING_RUN, task) for task in ("check_source_flag", "flag_true", "retrain_model")),
    *((RETRAINING, RETRAINING_RUN, task) for task in ("evaluate_model", "register_model", "promote_model")),
    (RETRAINING, RETRAINING_RUN, "send_email"),
]
IN_EVERY_RUN = 8
"""Steps that the test suite takes each time, the quick ones; all of them: `make kills`."""
CORRECTED_AT = datetime(2026, 1, 1, tzinfo=UTC)
LONG = {"building_model", "retrain_model", "evaluate_model"}
"""Tasks that compute for long: killed at few points, which `moments` chooses."""


# --- a platform, its worker, and what it has left ---------------------------------------------------


class Worker:
    """The program `loop/worker.py`."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "worker.log"
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py"))],
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                "HOME": str(folder),
                "AIRFLOW_HOME": str(folder),
                "NEUROLOOP_HOME": str(folder),
                "MLFLOW_DISABLE_TELEMETRY": "true",
                **{f"TF_{name}": "1" for name in ("NUM_INTRAOP_THREADS", "NUM_INTEROP_THREADS", "DETERMINISTIC_OPS")},
            },
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("wb"),
            text=True,
        )
        assert self._line() == "ready"

    def start(self, job: dict[str, Any]) -> int:
        """The process of a try, which waits for `go`."""
        self._say(json.dumps(job))
        return int(self._line())

    def go(self) -> None:
        self._say("")

    def ended(self) -> int:
        """The exit code, -9 for a killed one."""
        return int(self._line())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(20)

    def _say(self, line: str) -> None:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _line(self) -> str:
        for line in self._process.stdout:
            if line.strip() == "ready" or re.fullmatch(r"-?\d+", line.strip()):
                return line.strip()
        raise AssertionError(self.log.read_text()[-3000:])


@dataclass
class Platform:
    """Real parts, each behind something that tells the tripwire when a task has used it."""

    home: Path
    services: Services  # by the direct way, for the test itself
    environment: dict[str, str]  # of a task
    artifacts: Path
    wire: Tripwire
    watch: FolderWatch
    worker: Worker
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.home / "tasks.log"

    def attempt(
        self,
        step: tuple[str, str, str],
        at: int = 0,
        *,
        group: bool = True,
        when: Callable[[int], bool] | None = None,
    ) -> int:
        """One try of a task; it is killed at its `at`-th event, or as soon as `when(pid)`. The exit code."""
        dag, run_id, task = step
        result = self.home / "result.json"
        result.unlink(missing_ok=True)
        params = PARAMS[dag] | ({"data_url": self.environment["NEUROLOOP_DATA_URL"]} if dag == BUILD else {})
        job = {"dag": dag, "run_id": run_id, "task": task, "params": params, "environment": self.environment}
        pid = self.worker.start({**job, "log": str(self.log), "result": str(result)})
        self.watch.add_deletions(self.home / "store" / keys.run(run_id, "shards/x").rpartition("/")[0])
        self.wire.arm(pid, at, group=group)
        self.worker.go()
        if when is not None:
            while Path(f"/proc/{pid}").exists() and not when(pid):
                time.sleep(0.002)
            self.wire.kill()
        code = self.worker.ended()
        time.sleep(0.05)  # what was told last may still be on its way
        self.wire.disarm()
        if code == 0:
            self.results[task] = json.loads(result.read_text())
        return code

    def finish(self, step: tuple[str, str, str]) -> list[str]:
        """A try that nothing disturbs, which has to succeed; what it did."""
        code = self.attempt(step)
        assert code == 0, self.log.read_text()[-4000:]
        return self.wire.events

    def correct(self, numbers: range) -> None:
        """Corrected uploads, as the API and their readers leave them."""
        for number in numbers:
            label, wrong = LABELS[number % 4], LABELS[(number + 1) % 4]
            data = encode_png(scan(label, number, seed=3, scanner="B", size=64).pixels)
            name = str(uuid.UUID(int=number))
            row = Prediction(
                id=name,
                created_at=CORRECTED_AT,
                sha256=hashlib.sha256(data).hexdigest(),
                object_key=keys.prediction(wrong, name),
                label=wrong,
                probabilities={wrong: 1.0},
                gate=GateResult(accepted=True, score=0.9, threshold=0.5, reason=""),
                model_version="1",
                data_version="d1",
                simulated_model=True,
                seconds=0.1,
                width=64,
                height=64,
                consent="training",
            )
            self.services.store.put(row.object_key, data)
            self.services.log.record_prediction(row)
            self.services.log.record_feedback(
                Feedback(
                    prediction_id=name, reader="ann", verdict=Verdict.CORRECT, label=label, created_at=CORRECTED_AT
                )
            )
            corrections.settle(self.services.log, self.services.store, row)

    def left(self) -> dict[str, Any]:
        """All that is in store, database, registry and mailbox, but for ids and times; comparable."""
        from mlflow import MlflowClient

        client = MlflowClient(self.services.settings.mlflow_tracking_uri)
        experiments = client.search_experiments(order_by=["name ASC"])
        runs = client.search_runs([each.experiment_id for each in experiments])
        said = {run.info.run_id: f"<run {run.data.tags['neuroloop.run_id']}>" for run in runs}
        found: dict[str, Any] = {}
        for key in self.services.store.list(""):
            if not key.startswith(keys.MAIL):
                found[f"store {key}"] = content(key, self.services.store.get(key))
        for run in runs:
            name = said[run.info.run_id]
            found[f"{name}"] = found.get(name, 0) + 1
            found[f"{name} status"] = run.info.status
            found[f"{name} params"] = run.data.params
            found[f"{name} tags"] = {k: v for k, v in run.data.tags.items() if not k.startswith("mlflow.")}
            found[f"{name} metrics"] = {k: v for k, v in run.data.metrics.items() if "second" not in k}
            found[f"{name} inputs"] = sorted(
                (each.dataset.name, each.dataset.digest, each.tags[0].value) for each in run.inputs.dataset_inputs
            )
        for file in sorted(path for path in self.artifacts.rglob("*") if path.is_file()):
            path = file.relative_to(self.artifacts).as_posix()
            for run_id, name in said.items():
                path = path.replace(run_id, name)
            found[f"artifact {path}"] = content(path, file.read_bytes())
        for model in client.search_registered_models():
            found["aliases"] = dict(model.aliases)
        for version in client.search_model_versions():
            found[f"version {version.version}"] = (said[version.run_id], version.description, version.tags)
        for mail in map(parse_mail, map(self.services.store.get, self.services.store.list(keys.MAIL))):
            found[f"mail {mail.subject}"] = (*found.get(f"mail {mail.subject}", ()), mail.body)
        with contextlib.closing(psycopg2.connect(self.services.settings.database_url)) as connection:
            cursor = connection.cursor(cursor_factory=psycopg2.extras.RealDictCursor)
            # The migrations' own tables say when and under which id each was applied; the schema is in the others.
            cursor.execute(
                "SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename !~ 'yoyo' ORDER BY 1"
            )
            for table in [row["tablename"] for row in cursor.fetchall()]:
                cursor.execute(f"SELECT * FROM {table} t ORDER BY t::text")
                found[f"table {table}"] = [
                    {k: v for k, v in row.items() if not k.endswith("_at")} for row in cursor.fetchall()
                ]
        return {name: timeless(value) for name, value in found.items()}


VOLATILE = {"at", "created_at", "seconds", "bundle_sha256", "sha256s", "files", "subject"}


def timeless(value: Any) -> Any:
    """Without ids, times, durations, and hashes of what has them."""
    if isinstance(value, dict):
        return {key: timeless(each) for key, each in value.items() if key not in VOLATILE}
    if isinstance(value, list | tuple):
        return [timeless(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, str):
        value = re.sub(r"(\| (?:[a-z ]*)seconds \|) [\d.]+", r"\1 <seconds>", value)  # a row of the model card
        value = re.sub(r"20\d\d-\d\d-\d\d(?!T00)[T ]?[\d:.]*(Z|\+00:00| UTC)?", "<time>", value)
        return re.sub(r"\b[0-9a-f]{32}\b", "<id>", value)
    return value


def content(name: str, data: bytes) -> Any:
    """What stands in a file: JSON and text to compare without times, of everything else the hash."""
    if name.endswith(".json"):
        return json.loads(data)
    if name.endswith(".npz"):
        arrays = np.load(io.BytesIO(data), allow_pickle=False)
        return {each: digest(arrays[each].tobytes()) for each in arrays.files}
    if name.endswith(".zip"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {each: content(each, archive.read(each)) for each in archive.namelist()}
    if name.endswith(".onnx"):  # its exporter numbers the names as it likes
        graph = onnx.load_from_string(data).graph
        weights = b"".join(sorted(each.raw_data for each in graph.initializer))
        return {"operations": [node.op_type for node in graph.node], "weights": digest(weights)}
    if name.endswith("MLmodel"):
        own = re.compile("uuid|utc_time|model_id|run_id|size_bytes")
        kept = (line for line in data.decode().splitlines() if not own.search(line))
        return "\n".join(kept)
    if name.endswith((".md", ".csv", ".html", ".txt", ".yaml", ".dvc")):
        return data.decode()
    return digest(data)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:20]


def differences(here: Any, there: Any, name: str = "") -> dict[str, tuple[str, str]]:
    """Where two of what `left` gives differ: path -> both."""
    if isinstance(here, dict) and isinstance(there, dict):
        found = {}
        for key in sorted(here.keys() | there.keys()):
            found |= differences(here.get(key), there.get(key), f"{name}/{key}")
        return found
    if here == there:
        return {}
    texts = repr(here), repr(there)
    apart = next((at for at, pair in enumerate(zip(*texts, strict=False)) if pair[0] != pair[1]), 0)
    return {name: (texts[0][max(apart - 100, 0) : apart + 300], texts[1][max(apart - 100, 0) : apart + 300])}


# --- the two of them ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A folder of small scans, since simulating large ones takes longer than all the tasks."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(IMAGES):
        file = folder / LABELS[number % 4] / f"{number:03d}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(encode_png(scan(LABELS[number % 4], number, seed=0, size=64).pixels))
    return folder


@pytest.fixture(scope="module")
def worker(tmp_path_factory) -> Iterator[Worker]:
    running = Worker(tmp_path_factory.mktemp("worker"))
    yield running
    running.close()


@contextlib.contextmanager
def platform(
    home: Path, database: str, source: Path, worker: Worker, free_port: Callable[[], int]
) -> Iterator[Platform]:
    (home / "mlflow").mkdir()
    (home / "store" / ".neuroloop-tmp").mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        wire = Tripwire()
        watch = FolderWatch(wire.happened)
        watch.add(home / "store" / ".neuroloop-tmp")
        direct = stack.enter_context(mlflow_server(home / "mlflow", free_port()))
        mlflow = stack.enter_context(relayed(direct, free_port(), wire.happened))
        before, _, after = database.rpartition("@")
        address, _, name = after.partition("/")
        relay = stack.enter_context(Relay(int(address.rpartition(":")[2]), free_port()))
        relay.tell_of(b"COMMIT", lambda: wire.happened("database: commit"))
        mail_port = free_port()
        settings = {
            "home": str(home),
            "notify_url": f"smtp://127.0.0.1:{mail_port}",
            "mlflow_url": "http://mlflow.example.org",
            "data_url": str(source),
            "feedback_threshold": str(THRESHOLD),
        }
        services = Services(Settings(**settings, database_url=database, mlflow_tracking_uri=direct))
        sink = start_sink(services.store, "127.0.0.1", mail_port)
        stack.callback(sink.stop)
        by_relay = {"database_url": f"{before}@127.0.0.1:{relay.port}/{name}", "mlflow_tracking_uri": mlflow}
        environment = {f"NEUROLOOP_{key.upper()}": value for key, value in (settings | by_relay).items()}
        yield Platform(home, services, environment, home / "mlflow" / "artifacts", wire, watch, worker)


@dataclass
class Reference:
    """The platform on which nothing happens, taken as far as is asked; what each step did and left."""

    platform: Platform
    after: dict[tuple[str, str, str], tuple[list[str], dict[str, Any]]] = field(default_factory=dict)

    def of(self, step: tuple[str, str, str]) -> tuple[list[str], dict[str, Any]]:
        for each in STEPS[: STEPS.index(step) + 1]:
            if each not in self.after:
                prepare(self.platform, each)
                self.after[each] = (self.platform.finish(each), self.platform.left())
        return self.after[step]


def prepare(platform: Platform, step: tuple[str, str, str]) -> None:
    """What happens between the runs: a first model is there in any case, and readers correct."""
    if step == (RETRAINING, EARLY_RUN, "check_source_flag"):
        platform.services.registry.set_alias("champion", "1")
        platform.correct(range(THRESHOLD))
    if step == (RETRAINING, RETRAINING_RUN, "check_source_flag"):
        platform.correct(range(THRESHOLD, THRESHOLD + 2))


@pytest.fixture(scope="module")
def reference(tmp_path_factory, postgres_server, source, worker, free_port) -> Iterator[Reference]:
    with platform(tmp_path_factory.mktemp("quiet"), postgres_server.new_database(), source, worker, free_port) as quiet:
        yield Reference(quiet)


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory, postgres_server, source, worker, free_port) -> Iterator[Platform]:
    with platform(tmp_path_factory.mktemp("killed"), postgres_server.new_database(), source, worker, free_port) as loud:
        yield loud


def moments(task: str, events: list[str]) -> list[int]:
    """At which of its events a task is killed; the last one ends it, and a repeat stands for that."""
    last = len(events) - 1
    if task in LONG:
        first_metrics = events.index("mlflow: POST runs/log-batch")
        stored = [number for number, event in enumerate(events, 1) if "written" in event]
        if task == "evaluate_model":
            return [first_metrics + 1, last]
        return [first_metrics + 1, stored[-2]]  # stored[-2]: the bundle, after which only the result is missing
    if last <= 4:
        return list(range(1, last + 1))
    return sorted({1, *(round(last * share) for share in (0.4, 0.7)), last})


@pytest.mark.parametrize(
    "step",
    [pytest.param(step, marks=[pytest.mark.kills] * (n >= IN_EVERY_RUN)) for n, step in enumerate(STEPS)],
    ids=lambda step: f"{step[0]}-{step[1][:1]}{step[1].split('T')[0][-2:]}-{step[2]}",
)
def test_a_task_that_is_killed_and_tried_again_leaves_what_an_undisturbed_one_leaves(
    reference: Reference, disturbed: Platform, step: tuple[str, str, str]
):
    events, left = reference.of(step)
    prepare(disturbed, step)
    task, killed = step[2], 0
    if task == "download_data":
        killed += killed_while_dvc_works(disturbed, step)
    points = moments(task, events)
    for number, at in enumerate(points):
        code = disturbed.attempt(step, at, group=number % 2 == 0)
        assert code in (0, -9), disturbed.log.read_text()[-4000:]  # 0: the folder's watcher was a moment too late
        killed += code == -9
    assert killed >= max(1, len(points) - 2), (points, events)
    disturbed.finish(step)
    if task not in LONG:
        disturbed.finish(step)  # Airflow has not learned that it was done
    different = differences(disturbed.left(), left)
    assert not different, json.dumps(different, indent=1)


def killed_while_dvc_works(platform: Platform, step: tuple[str, str, str]) -> int:
    """Killed while images arrive and in each of DVC's commands, together with DVC and without it."""

    def fetching(_: int) -> bool:
        return len(list(platform.home.glob("dvc/*/data/*/*"))) > 30

    def in_dvc(command: str) -> Callable[[int], bool]:
        def running(pid: int) -> bool:
            with contextlib.suppress(OSError):
                children = " ".join(file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children")).split()
                return any(command in Path(f"/proc/{child}/cmdline").read_text().split("\0") for child in children)
            return False

        return running

    codes = [platform.attempt(step, when=fetching)]
    for command, group in (("add", True), ("add", False), ("push", True), ("push", False)):
        codes.append(platform.attempt(step, when=in_dvc(command), group=group))
    assert set(codes) == {-9}, codes
    return len(codes)


# --- what the whole run comes to ------------------------------------------------------------------------


@pytest.mark.kills
def test_the_killed_runs_registered_promoted_claimed_and_told_once(reference: Reference, disturbed: Platform):
    reference.of(STEPS[-1])
    services = disturbed.services
    assert [each.version for each in services.registry.versions()] == ["2", "1"]
    assert sorted(row.run_id for row in services.log.promotions()) == [BUILD_RUN, RETRAINING_RUN]
    assert services.store.list(keys.BATCHES) == [keys.batch(1)]
    batch = json.loads(services.store.get(keys.batch(1)))
    assert (batch["run_id"], len(set(batch["corrections"]))) == (RETRAINING_RUN, THRESHOLD + 2)
    subjects = [parse_mail(services.store.get(key)).subject for key in services.store.list(keys.MAIL)]
    assert len(subjects) == len(set(subjects)) == 3


# --- what uploads say of people, after a retraining on them ---------------------------------------------

PRIVATE_RUN, READER = "manual__2026-01-04T00:00:00+00:00", "Trillian-McMillan"


@pytest.mark.kills
def test_of_a_corrected_upload_only_pixels_reach_training_registry_and_logs(reference: Reference, disturbed: Platform):
    """Marks wherever a file can carry a name, as `serving.test_privacy` plants them, and a reader's name."""
    reference.of(STEPS[-1])
    services = disturbed.services
    with serving(services) as api:
        ids = [corrected_upload(api, make, number * 100) for number, make in enumerate(CARRIERS.values())]
        rows = [row for row in api.rows() if READER not in row]  # her verdicts name her, in the database only
    for task in ("check_source_flag", "flag_true", "retrain_model"):
        disturbed.finish((RETRAINING, PRIVATE_RUN, task))
    result = disturbed.results["retrain_model"]
    assert result["trained_on"] + result["held_out"] + result["left_out"] == THRESHOLD + 2 + len(ids)
    run = services.registry.open_run(PRIVATE_RUN, experiment=RETRAINING)
    (named,) = disturbed.artifacts.glob(f"*/{run}/artifacts/data/corrections.json")
    assert all(each in named.read_text() for each in ids)

    read = list(readable(disturbed.home))
    assert {"train.npz", "bundle.zip", "mlflow.db", "tasks.log", "server.log"} <= {path.name for path, _ in read}
    for path, data in read:
        assert not marked(data), path
        assert not marked(str(path).encode()), path
        assert READER.encode() not in data, path
    assert rows
    assert not [row for row in rows if marked(row.encode())]
    pictures = [path for path, _ in read if path.suffix == ".png"]
    assert not [path for path in pictures if MARK in repr(Image.open(path).info)]


def corrected_upload(api: Api, make: Callable[[np.ndarray], bytes], first: int) -> str:
    """The id of an upload that the gate let in, corrected to a class that the model did not say."""
    for number in range(first, first + 40):
        scanned = scan(LABELS[number % 4], number, seed=5, size=128).pixels
        answer = api.upload(make(scanned), f"{MARK}.dcm")
        if answer.status_code == 201:
            said = answer.json()
            other = LABELS[(LABELS.index(said["label"]) + 1) % 4]
            assert api.feedback(said["id"], "correct", other, READER).status_code == 200
            return said["id"]
    raise AssertionError("the gate lets no scan in")


def readable(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file below, with what archives hold unpacked."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                data = b"".join(archive.read(name) for name in archive.namelist())
        yield path, data
