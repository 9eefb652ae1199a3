"""The contract of `ports.Registry`, on a real MLflow server."""

import http.server
import json
import math
import shutil
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from neuroloop.adapters.mlflow_registry import MODEL, MlflowRegistry
from neuroloop.adapters.mlflow_rest import MlflowRest
from neuroloop.core.errors import InvalidBundle, NeuroLoopError, NotFound, Unavailable

SIDE = 8


@pytest.fixture
def registry(mlflow_uri: str) -> MlflowRegistry:
    return MlflowRegistry(mlflow_uri)


@pytest.fixture
def run(registry: MlflowRegistry) -> str:
    return registry.open_run(f"run-{uuid.uuid4()}", experiment="tests")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of a bundle; its network gives each image's mean as four logits."""
    shape = ["n", SIDE, SIDE, 1]
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["image", "axes"], ["mean"], keepdims=0),
            helper.make_node("Unsqueeze", ["mean", "last"], ["column"]),
            helper.make_node("Concat", ["column"] * 4, ["logits"], axis=1),
        ],
        "mean",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 4])],
        [
            helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3]),
            helper.make_tensor("last", TensorProto.INT64, [1], [1]),
        ],
    )
    folder = tmp_path_factory.mktemp("bundle")
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    (folder / "bundle.json").write_text(json.dumps({"labels": ["a"]}))
    return folder


def client(uri: str):
    from mlflow import MlflowClient

    return MlflowClient(uri)


def test_the_same_pipeline_run_always_opens_the_same_tracking_run(mlflow_uri: str):
    run_id = f"manual__2026-01-01T00:00:00+00:00 'quoted' {uuid.uuid4()}"
    first = MlflowRegistry(mlflow_uri).open_run(run_id, experiment="tests", tags={"data": "1"})
    assert MlflowRegistry(mlflow_uri).open_run(run_id, experiment="tests", tags={"seed": "0"}) == first
    tags = client(mlflow_uri).get_run(first).data.tags
    assert (tags["data"], tags["seed"]) == ("1", "0")


def test_threads_that_open_the_same_run_get_one(registry: MlflowRegistry):
    run_id = str(uuid.uuid4())
    with ThreadPoolExecutor(4) as pool:
        opened = set(pool.map(lambda _: registry.open_run(run_id, experiment="tests"), range(4)))
    assert opened == {registry.open_run(run_id, experiment="tests")}


def test_a_run_may_stand_below_another(registry: MlflowRegistry, run: str, mlflow_uri: str):
    run_id = str(uuid.uuid4())
    child = registry.open_run(run_id, experiment="tests", parent=run)
    assert registry.open_run(run_id, experiment="tests", parent=run) == child != run
    found = client(mlflow_uri).search_runs(
        [client(mlflow_uri).get_run(run).info.experiment_id], f"tags.`mlflow.parentRunId` = '{run}'"
    )
    assert [each.info.run_id for each in found] == [child]


def test_the_data_sets_of_a_run_are_on_it_once_with_what_they_were_read_for(
    registry: MlflowRegistry, run: str, mlflow_uri: str, tmp_path: Path
):
    import mlflow

    (tmp_path / "snapshot.json").write_text('{"images": 7}')
    source = f"file://{tmp_path}/snapshot.json"
    for _ in "ab":
        for part, context in (("train", "training"), ("test", "testing")):
            registry.log_dataset(
                run, f"grouped_{part}", f"{part}-{run}"[:36], context=context, source=source, profile={"images": 7}
            )
    inputs = client(mlflow_uri).get_run(run).inputs.dataset_inputs
    found = {each.dataset.name: each for each in inputs}
    assert len(inputs) == 2
    assert {tag.key: tag.value for tag in found["grouped_test"].tags} == {"mlflow.data.context": "testing"}
    assert json.loads(found["grouped_train"].dataset.profile) == {"images": 7}
    assert Path(mlflow.data.get_source(found["grouped_train"]).load()).read_text() == '{"images": 7}'


def test_a_data_set_from_where_mlflow_cannot_read_still_says_where(registry: MlflowRegistry, run: str, mlflow_uri: str):
    import mlflow

    registry.log_dataset(run, "grouped_train", "1", context="training", source="az://container/snapshot.json")
    (found,) = client(mlflow_uri).get_run(run).inputs.dataset_inputs
    assert mlflow.data.get_source(found).to_dict() == {"tags": {"source": "az://container/snapshot.json"}}


def test_parameters_metrics_tags_and_artifacts_arrive_on_the_run(registry: MlflowRegistry, run: str, mlflow_uri: str):
    registry.log_params(run, {"seed": 0, "augment": {"rotation": 10}})
    registry.log_params(run, {"seed": 0})
    for epoch in range(3):
        registry.log_metrics(run, {"loss": 1.0 / (epoch + 1)}, step=epoch)
    registry.set_tags(run, {"simulated": "true"})
    registry.log_bytes(run, "plots/grid.png", b"\x89PNG")
    registry.close_run(run)
    stored = client(mlflow_uri).get_run(run)
    assert stored.data.params["seed"] == "0"
    assert stored.data.metrics["loss"] == pytest.approx(1 / 3)
    assert [point.step for point in client(mlflow_uri).get_metric_history(run, "loss")] == [0, 1, 2]
    assert stored.data.tags["simulated"] == "true"
    assert stored.info.status == "FINISHED"
    assert [file.path for file in client(mlflow_uri).list_artifacts(run, "plots")] == ["plots/grid.png"]


def test_the_next_step_follows_the_last_that_was_logged(registry: MlflowRegistry, run: str):
    assert registry.next_step(run, "loss") == 0
    for step in (0, 1, 2, 1):
        registry.log_metrics(run, {"loss": 0.5}, step=step)
    assert registry.next_step(run, "loss") == 3
    assert registry.next_step(run, "accuracy") == 0


def test_a_failed_run_is_marked_so(registry: MlflowRegistry, run: str, mlflow_uri: str):
    registry.close_run(run, failed=True)
    assert client(mlflow_uri).get_run(run).info.status == "FAILED"


def test_a_parameter_does_not_change_its_value(registry: MlflowRegistry, run: str):
    registry.log_params(run, {"seed": 0})
    with pytest.raises(NeuroLoopError, match="seed"):
        registry.log_params(run, {"seed": 1})


def test_an_artifact_path_cannot_leave_the_run(registry: MlflowRegistry, run: str):
    with pytest.raises(NeuroLoopError):
        registry.log_bytes(run, "../other/grid.png", b"")


def test_another_bundle_of_a_run_that_has_a_version_is_refused_and_the_version_stays(
    registry: MlflowRegistry, run: str, bundle: Path, tmp_path: Path
):
    first = registry.register(run, bundle, tags={"data_version": "abc"})
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    (other / "bundle.json").write_text('{"labels": ["trained again"]}')
    with pytest.raises(NeuroLoopError, match=f"another model already, as version {first.version}.*new run"):
        registry.register(run, other, tags={"data_version": "def"})
    (again,) = [each for each in registry.versions() if each.run_id == run]
    assert again.tags["data_version"] == "abc"


def test_a_run_registers_one_version_however_often_it_is_asked(registry: MlflowRegistry, run: str, bundle: Path):
    registry.log_metrics(run, {"macro_f1": 0.93})
    first = registry.register(run, bundle, tags={"data_version": "abc"})
    again = registry.register(run, bundle, tags={"data_version": "abc"})
    assert again == first
    assert first.run_id == run
    assert first.metrics["macro_f1"] == pytest.approx(0.93)
    assert first.tags["data_version"] == "abc"
    assert [each for each in registry.versions() if each.run_id == run] == [first]


def test_versions_are_newest_first_and_show_their_aliases(registry: MlflowRegistry, bundle: Path):
    made = []
    for score in (0.8, 0.9):
        run = registry.open_run(str(uuid.uuid4()), experiment=f"tests-{score}")
        registry.log_metrics(run, {"macro_f1": score})
        made.append(registry.register(run, bundle, tags={}).version)
    registry.set_alias("challenger", made[1])
    registry.set_alias("previous", made[1])
    newest, older = registry.versions()[:2]
    assert [newest.version, older.version] == made[::-1]
    assert newest.aliases == ("challenger", "previous")
    assert [newest.metrics["macro_f1"], older.metrics["macro_f1"]] == pytest.approx([0.9, 0.8])


def test_an_alias_moves_from_one_version_to_another(registry: MlflowRegistry, bundle: Path):
    one, two = (
        registry.register(registry.open_run(str(uuid.uuid4()), experiment="tests"), bundle, tags={}) for _ in "12"
    )
    registry.set_alias("champion", one.version)
    assert registry.by_alias("champion").version == one.version
    registry.set_alias("champion", two.version)
    assert registry.by_alias("champion") == two.model_copy(update={"aliases": ("champion",)})


def test_an_alias_that_nobody_set_is_none(registry: MlflowRegistry, run: str, bundle: Path):
    registry.register(run, bundle, tags={})
    assert registry.by_alias("nobody") is None


def test_an_unknown_version_takes_no_alias_and_has_no_bundle(registry: MlflowRegistry, tmp_path: Path):
    with pytest.raises(NotFound):
        registry.set_alias("champion", "999999")
    with pytest.raises(NotFound):
        registry.download_bundle("999999", tmp_path)


def test_the_bundle_comes_back_byte_for_byte(registry: MlflowRegistry, run: str, bundle: Path, tmp_path: Path):
    version = registry.register(run, bundle, tags={}).version
    folder = registry.download_bundle(version, tmp_path / "new" / "folder")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        file.name: file.read_bytes() for file in bundle.iterdir()
    }


def test_the_registered_model_can_be_served_by_mlflow_and_holds_no_pickle(
    registry: MlflowRegistry, run: str, bundle: Path, mlflow_uri: str, tmp_path: Path
):
    import mlflow

    version = registry.register(run, bundle, tags={}).version
    folder = Path(client(mlflow_uri).download_artifacts(run, "model", str(tmp_path)))
    model = mlflow.pyfunc.load_model(str(folder))
    images = np.full((2, SIDE, SIDE, 1), 7, np.float32)
    np.testing.assert_allclose(model.predict({"image": images})["logits"], np.full((2, 4), 7))
    assert model.metadata.get_input_schema().inputs[0].shape == (-1, SIDE, SIDE, 1)
    assert model.metadata.get_output_schema().input_names() == ["logits"]
    assert model.metadata.saved_input_example_info is not None
    assert "canonical" in model.metadata.metadata["input"]
    assert "logits" in model.metadata.metadata["output"]
    assert not [file for file in folder.rglob("*") if file.suffix in (".pkl", ".pickle")]
    assert client(mlflow_uri).get_model_version(MODEL, version).source.endswith(f"{run}/artifacts/model")


def test_the_description_of_a_version_is_the_card_cut_at_a_heading_to_what_mlflow_takes(
    registry: MlflowRegistry, run: str, bundle: Path, mlflow_uri: str
):
    text = "# Model card\n\n**For research.**\n" + "".join(f"\n## Part {n}\n\n{'word ' * 200}\n" for n in range(8))
    version = registry.register(run, bundle, tags={}, description=text).version
    kept = client(mlflow_uri).get_model_version(MODEL, version).description
    assert len(kept) <= 5000
    body, note = kept.rsplit("\n\n", 1)
    assert text.startswith(body)
    assert text[len(body) :].lstrip().startswith("## Part")
    assert "bundle/card.md" in note
    registry.register(run, bundle, tags={}, description="short")
    assert client(mlflow_uri).get_model_version(MODEL, version).description == "short"


def test_threads_that_register_the_same_run_get_one_version(registry: MlflowRegistry, run: str, bundle: Path):
    with ThreadPoolExecutor(3) as pool:
        made = {each.version for each in pool.map(lambda _: registry.register(run, bundle, tags={}), range(3))}
    assert len(made) == 1
    assert [each.version for each in registry.versions() if each.run_id == run] == list(made)


def test_a_folder_without_a_network_is_no_bundle(registry: MlflowRegistry, run: str, tmp_path: Path):
    (tmp_path / "model.onnx").write_bytes(b"not a network")
    with pytest.raises(InvalidBundle):
        registry.register(run, tmp_path, tags={})
    assert not [each for each in registry.versions() if each.run_id == run]


def test_a_server_that_is_down_is_unavailable_within_seconds(free_port):
    registry = MlflowRegistry(f"http://127.0.0.1:{free_port()}")
    for call in (lambda: registry.by_alias("champion"), registry.check):
        start = time.monotonic()
        with pytest.raises(Unavailable, match="NEUROLOOP_MLFLOW_TRACKING_URI"):
            call()
        assert time.monotonic() - start < 15


def test_what_a_server_asks_of_the_registry_does_without_the_mlflow_package(
    registry: MlflowRegistry, run: str, bundle: Path, mlflow_uri: str, tmp_path: Path
):
    version = registry.register(run, bundle, tags={}).version
    code = (
        "import sys; from pathlib import Path; from neuroloop.adapters.mlflow_registry import MlflowRegistry as R\n"
        "uri, version, folder = sys.argv[1:]; r = R(uri)\n"
        "r.set_alias('light', version); assert r.by_alias('light').version == version\n"
        "r.versions(); r.check(); assert (r.download_bundle(version, Path(folder)) / 'bundle.json').is_file()\n"
        "assert not {'mlflow', 'pandas', 'sklearn', 'sqlalchemy', 'tensorflow', 'keras'} & set(sys.modules)"
    )
    path = ":".join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", code, mlflow_uri, version, str(tmp_path)],
        env={"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_metric_that_is_no_number_comes_back_as_one_that_is_none(registry: MlflowRegistry, run: str, bundle: Path):
    registry.log_metrics(run, {"macro_f1": float("nan"), "worst": float("inf"), "loss": 0.25})
    metrics = registry.register(run, bundle, tags={}).metrics
    assert math.isnan(metrics["macro_f1"])
    assert metrics["loss"] == 0.25
    assert metrics["worst"] > 1e300


def test_an_answer_that_is_no_json_is_a_server_that_cannot_be_used(free_port):
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>a login page</html>")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", free_port()), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(Unavailable, match="no JSON"):
            MlflowRegistry(f"http://127.0.0.1:{server.server_port}").by_alias("champion")
        server.shutdown()


@pytest.mark.parametrize("body", [b"<html>404: no such route</html>", b'{"error": "not found"}', b"[]", b""])
def test_a_404_that_is_not_mlflows_own_is_a_server_that_cannot_be_used(free_port, tmp_path: Path, body: bytes):
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", free_port()), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        registry = MlflowRegistry(f"http://127.0.0.1:{server.server_port}")
        for call in (
            lambda: registry.by_alias("champion"),
            registry.versions,
            lambda: registry.download_bundle("1", tmp_path),
        ):
            with pytest.raises(Unavailable, match="it answered 404"):
                call()
        server.shutdown()


def test_what_mlflow_itself_does_not_have_is_not_found(mlflow_uri: str, run: str, tmp_path: Path):
    rest = MlflowRest(mlflow_uri)
    where = rest.get("runs/get", run_id=run)["run"]["info"]["artifact_uri"].partition(":")[2].strip("/")
    for call in (
        lambda: rest.get("registered-models/alias", name="no such model", alias="champion"),
        lambda: rest.get("registered-models/get", name="no such model"),
        lambda: rest.get("model-versions/get", name="no such model", version="1"),
        lambda: rest.get("runs/get", run_id="0" * 32),
        lambda: rest.download(f"{where}/bundle", tmp_path),
        lambda: rest._fetch(f"/api/2.0/mlflow-artifacts/artifacts/{where}/none.json", tmp_path / "none.json"),
    ):
        with pytest.raises(NotFound):
            call()


def test_the_registry_never_imports_tensorflow(mlflow_uri: str, tmp_path: Path):
    code = (
        "import sys; from neuroloop.adapters.mlflow_registry import MlflowRegistry as R\n"
        "r = R(sys.argv[1]); r.log_params(r.open_run('light', experiment='tests'), {'a': 1})\n"
        "assert 'mlflow' in sys.modules and not {'tensorflow', 'keras'} & set(sys.modules)"
    )
    path = ":".join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", code, mlflow_uri], env={"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
