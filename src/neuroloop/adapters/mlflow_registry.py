"""Experiment tracking and the model registry on an MLflow server.

A version's artifacts are the bundle the platform serves (`bundle/`) and the same network as an MLflow model
(`model/`, ONNX flavour, no pickle) for whoever wants `mlflow models serve` or `mlflow.pyfunc`. The platform itself
only ever loads the bundle, whose hashes it checks.

What a server asks of the registry goes through `mlflow_rest`; the mlflow package, which is large and slow to import,
is loaded where a run is logged or a version registered.
"""

import contextlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version as installed
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from neuroloop.adapters.mlflow_rest import ARTIFACTS, MlflowRest, Refused
from neuroloop.core import keys
from neuroloop.core.errors import InvalidBundle, NeuroLoopError, NotFound, Unavailable
from neuroloop.core.schemas import RESEARCH_NOTICE, ModelVersion

MODEL = "brain-tumor-classifier"
_RUN_TAG = "neuroloop.run_id"
_SOURCES = {"file": "local", "gs": "gs", "s3": "s3"}  # scheme -> MLflow's name for sources of data of this kind
_DESCRIPTION_LETTERS = 5000  # the width of MLflow's database column
_PARENT_TAG = "mlflow.parentRunId"  # by which MLflow nests runs
_PATIENCE = 30.0  # seconds a write waits for a server that restarts: a training must not die of a live metric
_UNKNOWN_ALIAS = "INVALID_PARAMETER_VALUE"  # MLflow's answer for one
_Result = TypeVar("_Result")

_METADATA = {
    "input": "image: float32 (n, size, size, 1), grey values 0..255 of canonical images, that is the head cut out, "
    "padded to a square and stretched in contrast: neuroloop.imaging.canonical.canonicalize(pixels, size)",
    "output": "logits (n, 4) before the bundle's temperature, in the order of bundle.json's labels; cam, the class-"
    "activation map whose mean over the places is the logits; features, for the input gate",
    "notice": RESEARCH_NOTICE,
}
"""What an `mlflow models serve` of the network takes and gives; it has neither the platform's gate nor its log."""

# MLflow's defaults wait minutes for a server that is down, draw progress bars into logs and report usage.
_CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class MlflowRegistry:
    """`ports.Registry` on the MLflow server at `uri`. Thread-safe; MLflow is imported at the first call that logs.

    `password` is empty where the server asks for none.

    Reads fail with `Unavailable` within seconds of a server being down; writes wait for it for half a minute.
    """

    def __init__(self, uri: str, *, user: str = "", password: str = "") -> None:
        self._uri = uri
        # By variables, because MLflow's client has no other way to take them.
        self._login = {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password} if password else {}
        self._rest = MlflowRest(uri, user=user, password=password)
        self._opening = threading.Lock()

    def open_run(self, run_id: str, *, experiment: str, tags: Mapping[str, str] = {}, parent: str | None = None) -> str:
        """The tracking run of a pipeline run; the same `run_id` always gives the same run.

        `parent` is the tracking run below which a new one is shown, as a search's trials are below the search.
        """
        tag = keys.safe_run_id(run_id)
        fixed = {_RUN_TAG: tag} | ({_PARENT_TAG: parent} if parent else {})

        def find(experiment_id: str) -> str | None:
            found = self._client.search_runs(
                [experiment_id], f"tags.`{_RUN_TAG}` = '{tag}'", max_results=1, order_by=["attributes.start_time ASC"]
            )
            return found[0].info.run_id if found else None

        def opened() -> str:
            experiment_id = self._experiment(experiment)
            run = find(experiment_id)
            if run is None:
                made = self._client.create_run(experiment_id, tags=fixed, run_name=run_id).info.run_id
                run = find(experiment_id) or made
                if run != made:  # another process was first
                    self._client.delete_run(made)
            return run

        with self._opening:
            run = self._write(opened)
        self.set_tags(run, tags)
        return run

    def runs_page(self, run: str) -> str:
        """Without the workflow in the address MLflow opens its pages for language models."""
        with self._errors():
            experiment = self._client.get_run(run).info.experiment_id
        return f"#/experiments/{experiment}?workflowType=machine_learning"

    def log_params(self, run: str, params: Mapping[str, Any]) -> None:
        """Parameters; a repeated key with the same value is fine, another value raises `NeuroLoopError`."""
        from mlflow.entities import Param

        for some in _batched(params.items(), 100):  # MLflow's limit for one request
            self._write(self._client.log_batch, run, params=[Param(name, str(value)) for name, value in some])

    def log_metrics(self, run: str, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Metrics, at once (live); `step` counts epochs."""
        from mlflow.entities import Metric

        at = int(time.time() * 1000)
        for some in _batched(metrics.items(), 500):
            entities = [Metric(name, float(value), at, step or 0) for name, value in some]
            self._write(self._client.log_batch, run, metrics=entities)

    def next_step(self, run: str, metric: str) -> int:
        """The step after the last one at which this metric was logged; 0 where it never was."""
        points = self._write(self._client.get_metric_history, run, metric)  # as patient as the writes it goes before
        return max((int(point.step) + 1 for point in points), default=0)

    def log_bytes(self, run: str, path: str, data: bytes) -> None:
        """One artifact file at `path` below the run's artifacts."""
        above, _, name = keys.checked(path).rpartition("/")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / name
            file.write_bytes(data)
            self._write(self._client.log_artifact, run, str(file), above or None)

    def log_dataset(
        self, run: str, name: str, digest: str, *, context: str, source: str = "", profile: Mapping[str, Any] = {}
    ) -> None:
        """That the run read a data set; MLflow shows it on the run's page. A repeat changes nothing.

        `source` is the URL of a file that says what is in it; where `mlflow.data.get_source` can fetch such, it does.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        kind = _SOURCES.get(urlsplit(source).scheme)
        where = (kind, {"uri": source}) if kind else ("code", {"tags": {"source": source}})
        found = Dataset(name, digest, where[0], json.dumps(where[1]), profile=json.dumps(dict(profile)))
        read = DatasetInput(found, [InputTag("mlflow.data.context", context)])
        self._write(self._client.log_inputs, run, datasets=[read])

    def set_tags(self, run: str, tags: Mapping[str, str]) -> None:
        """Tags of a run."""
        from mlflow.entities import RunTag

        for some in _batched(tags.items(), 100):
            self._write(self._client.log_batch, run, tags=[RunTag(name, str(value)) for name, value in some])

    def close_run(self, run: str, *, failed: bool = False) -> None:
        """Mark the run finished or failed."""
        self._write(self._client.set_terminated, run, "FAILED" if failed else "FINISHED")

    def register(self, run: str, bundle: Path, *, tags: Mapping[str, str], description: str = "") -> ModelVersion:
        """Register the bundle folder (see `model.bundle`) as a new version; once per run, then the same one.

        `description` is Markdown for people, cut at a heading to what the server takes. Raises `InvalidBundle` where
        the folder has no readable `model.onnx`, `NotFound` for an unknown run, and `NeuroLoopError` where the run's
        version is another bundle.
        """
        existing = self._version_of(run)
        if existing is not None:
            self._refuse_another(run, existing, bundle)
        else:
            with tempfile.TemporaryDirectory() as folder:
                _save_mlflow_model(bundle, Path(folder) / "model")
                self._write(self._client.log_artifacts, run, str(bundle), "bundle")
                self._write(self._client.log_artifacts, run, str(Path(folder) / "model"), "model")
            existing = self._write(self._create_version, run)
        for name, value in tags.items():
            self._write(self._client.set_model_version_tag, MODEL, existing, name, str(value))
        if description:
            self._write(self._client.update_model_version, MODEL, existing, _described(description))
        return self._version(existing)

    def by_alias(self, alias: str) -> ModelVersion | None:
        """The version an alias points to, None where the alias or the model does not exist."""
        found = _or_none(self._rest.get, "registered-models/alias", name=MODEL, alias=alias)
        return None if found is None else self._entity(found["model_version"])

    def set_alias(self, alias: str, version: str) -> None:
        """Point `alias` at `version`, atomically. Raises `NotFound` for an unknown version."""
        self._patiently(self._rest.post, "registered-models/alias", name=MODEL, alias=alias, version=version)

    def versions(self) -> list[ModelVersion]:
        """All versions with metrics and aliases, newest first."""
        model = _or_none(self._rest.get, "registered-models/get", name=MODEL)
        pages = self._rest.pages("model-versions/search", "model_versions", filter=f"name = '{MODEL}'")
        found = list(pages)
        metrics = self._metrics({each["run_id"] for each in found})
        aliases: dict[str, list[str]] = {}
        for each in model["registered_model"].get("aliases", []) if model else []:
            aliases.setdefault(str(each["version"]), []).append(each["alias"])
        records = [
            _record(each, tuple(sorted(aliases.get(str(each["version"]), []))), metrics.get(each["run_id"], {}))
            for each in found
        ]
        return sorted(records, key=lambda each: int(each.version), reverse=True)

    def download_bundle(self, version: str, folder: Path) -> Path:
        """Fetch the bundle of `version` into `folder`; returns the folder that holds `bundle.json`."""
        found = self._rest.get("model-versions/get", name=MODEL, version=version)["model_version"]
        run = self._rest.get("runs/get", run_id=found["run_id"])["run"]["info"]
        parts = urlsplit(run["artifact_uri"])
        target = folder / "bundle"
        target.mkdir(parents=True, exist_ok=True)
        if parts.scheme == ARTIFACTS:
            self._rest.download(f"{parts.path.strip('/')}/bundle", target)
            return target
        with self._errors():  # a server that leaves its artifacts to the clients: theirs are in the mlflow package
            return Path(self._client.download_artifacts(run["run_id"], "bundle", str(folder)))

    def check(self) -> None:
        """Raise `Unavailable` unless the server answers."""
        self._rest.get("experiments/search", max_results=1)

    @cached_property
    def _client(self) -> Any:
        for name, value in (_CLIENT_SETTINGS | self._login).items():
            os.environ.setdefault(name, value)  # read at each request; what an operator sets stays
        from mlflow import MlflowClient

        return MlflowClient(self._uri, self._uri)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """MLflow's errors as ours."""
        from mlflow.exceptions import MlflowException, RestException

        try:
            yield
        except (MlflowException, OSError) as error:
            message = " ".join(str(error).split())
            if isinstance(error, RestException) and error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise NotFound(f"the MLflow server {self._uri} does not have it", why=message[:500]) from error
            if isinstance(error, RestException) and error.get_http_status_code() < 500:
                raise NeuroLoopError(f"the MLflow server {self._uri} refused a request", why=message[:500]) from error
            raise Unavailable(
                f"the MLflow server {self._uri} cannot be used",
                why=message[-500:],  # the cause stands at the end of a long chain
                fix="check that it runs and that NEUROLOOP_MLFLOW_TRACKING_URI names it",
            ) from error

    def _write(self, call: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
        """Call MLflow's client, and again while the server is away."""

        def called() -> _Result:
            with self._errors():
                return call(*args, **kwargs)

        return self._patiently(called)

    def _patiently(self, call: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
        """Call, and again while the server is away. Every write here gives the same result when repeated."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return call(*args, **kwargs)
            except Unavailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import RestException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                # MLflow's own mark of an experiment that trains models, not one of language-model traces.
                kind = {"mlflow.experimentKind": "custom_model_development"}
                return self._client.create_experiment(name, tags=kind)
            except RestException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self._client.get_experiment_by_name(name)
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def _create_version(self, run: str) -> str:
        """The number of the run's version, made unless another call was first."""
        from mlflow.exceptions import RestException

        try:
            self._client.create_registered_model(MODEL, description="Brain-MRI tumour classifier. Research use only.")
        except RestException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{self._client.get_run(run).info.artifact_uri}/model"
        first = self._version_of(run)
        if first is None:
            made = str(self._client.create_model_version(MODEL, source, run_id=run).version)
            first = self._version_of(run) or made
            if first != made:
                self._client.delete_model_version(MODEL, made)
        return first

    def _refuse_another(self, run: str, version: str, bundle: Path) -> None:
        """A model trained again must not be described, and promoted, under the version that holds the first one."""
        with tempfile.TemporaryDirectory() as folder, self._errors():
            kept = Path(self._client.download_artifacts(run, "bundle/bundle.json", folder)).read_bytes()
        if kept != (bundle / "bundle.json").read_bytes():
            raise NeuroLoopError(
                f"this run has registered another model already, as version {version}",
                why="it was trained once more after its registration, and a run registers one version",
                fix="trigger a new run",
            )

    def _version_of(self, run: str) -> str | None:
        """The lowest version that came from `run`."""
        found = self._rest.pages("model-versions/search", "model_versions", filter=f"run_id = '{run}'")
        return min((str(each["version"]) for each in found if each["name"] == MODEL), key=int, default=None)

    def _version(self, version: str) -> ModelVersion:
        return self._entity(self._rest.get("model-versions/get", name=MODEL, version=version)["model_version"])

    def _entity(self, found: dict[str, Any]) -> ModelVersion:
        run = self._rest.get("runs/get", run_id=found["run_id"])["run"]
        return _record(found, tuple(sorted(found.get("aliases", []))), _latest(run))

    def _metrics(self, runs: set[str]) -> dict[str, dict[str, float]]:
        """The last value of each metric of each run."""
        pages = self._rest.pages("experiments/search", "experiments", max_results=1000)
        experiments = [each["experiment_id"] for each in pages]
        metrics = {}
        for some in _batched(sorted(runs), 100):
            condition = f"attributes.run_id IN ({', '.join(repr(run) for run in some)})"
            found = self._rest.post("runs/search", experiment_ids=experiments, filter=condition, max_results=len(some))
            for run in found.get("runs", []):
                metrics[run["info"]["run_id"]] = _latest(run)
        return metrics


def _batched(items: Iterable[_Result], size: int) -> Iterator[tuple[_Result, ...]]:
    rest = iter(items)
    while some := tuple(islice(rest, size)):
        yield some


def _or_none(ask: Callable[..., dict[str, Any]], *args: Any, **asked: Any) -> dict[str, Any] | None:
    try:
        return ask(*args, **asked)
    except NotFound:
        return None
    except Refused as error:
        if error.code == _UNKNOWN_ALIAS:
            return None
        raise


def _described(text: str) -> str:
    """Markdown that fits MLflow's column, cut before a heading."""
    if len(text) <= _DESCRIPTION_LETTERS:
        return text
    note = "\n\n*The rest stands in the run's artifacts, under bundle/card.md.*"
    short = text[: _DESCRIPTION_LETTERS - len(note)]
    end = short.rfind("\n## ")
    return (short[:end] if end > 0 else short).rstrip() + note


def _record(found: dict[str, Any], aliases: tuple[str, ...], metrics: dict[str, float]) -> ModelVersion:
    """A version as MLflow's REST interface describes it."""
    return ModelVersion(
        version=str(found["version"]),
        run_id=found["run_id"],
        aliases=aliases,
        metrics=metrics,
        tags={each["key"]: each.get("value", "") for each in found.get("tags", [])},
        created_at=datetime.fromtimestamp(int(found["creation_timestamp"]) / 1000, UTC),
    )


def _latest(run: dict[str, Any]) -> dict[str, float]:
    """The last value of each metric of a run; JSON has words for those that are no numbers, which `float` reads."""
    return {each["key"]: float(each["value"]) for each in run.get("data", {}).get("metrics", [])}


def _save_mlflow_model(bundle: Path, folder: Path) -> None:
    """The bundle's network as an MLflow model with signature and input example, read from its own graph.

    What it takes and gives is not what a client of the platform sees, so its metadata says so: canonical images in, raw
    logits out, without gate, calibration or record.
    """
    import mlflow.onnx
    import numpy as np
    import onnx
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    try:
        network = onnx.load(str(bundle / "model.onnx"))
    except Exception as error:  # onnx raises protobuf's DecodeError, OSError and ValueError
        raise InvalidBundle(f"{bundle / 'model.onnx'} is no ONNX model", why=str(error)) from error

    def specs(values: Any) -> list[Any]:
        tensors = []
        for value in values:
            tensor = value.type.tensor_type
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            tensors.append(TensorSpec(dtype, [each.dim_value or -1 for each in tensor.shape.dim], value.name))
        return tensors

    inputs = specs(network.graph.input)
    example = {each.name: np.zeros([max(side, 1) for side in each.shape], each.type) for each in inputs}
    mlflow.onnx.save_model(
        network,
        str(folder),
        signature=ModelSignature(inputs=Schema(inputs), outputs=Schema(specs(network.graph.output))),
        input_example=example,
        # Named here because MLflow would otherwise run the model in a new process to find them out.
        pip_requirements=[f"{name}=={installed(name)}" for name in ("mlflow", "onnx", "onnxruntime", "numpy")],
        onnx_execution_providers=["CPUExecutionProvider"],
        save_as_external_data=False,
        metadata=_METADATA,
    )
