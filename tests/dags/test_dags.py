"""The DAGs as Airflow parses them, in a process of its own with an empty environment."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DAGS = Path(__file__).parents[2] / "dags"

PARSE = """
import importlib.util, json, sys
out = {}
for path in sys.argv[1:]:
    spec = importlib.util.spec_from_file_location(path.rsplit("/", 1)[-1][:-3], path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from airflow.sdk import DAG
    dag = next(iter({id(v): v for v in vars(module).values() if isinstance(v, DAG)}.values()), None)
    dag = dag or getattr(module, spec.name)()
    out[dag.dag_id] = {
        "tasks": {task.task_id: sorted(task.downstream_task_ids) for task in dag.tasks},
        "retries": {task.task_id: task.retries for task in dag.tasks},
        "executor": {task.task_id: task.executor_config for task in dag.tasks if task.executor_config},
        "on_failure": all(bool(task.on_failure_callback) for task in dag.tasks),
        "doc": dag.doc_md,
        "params": {
            name: dag.params.get_param(name).schema | {"help": dag.params.get_param(name).description}
            for name in dag.params
        },
        "runs": dag.max_active_runs,
        "schedule": str(getattr(dag.timetable, "expression", None)),
    }
out["heavy"] = [name for name in ("tensorflow", "keras", "mlflow", "sklearn", "faiss") if name in sys.modules]
print("RESULT" + json.dumps(out))
"""


def parse(home: str, **settings: str):
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(DAGS.parent / "src")}
    environment |= {"AIRFLOW_HOME": home, "NEUROLOOP_HOME": home, "HOME": home} | settings
    done = subprocess.run(
        [sys.executable, "-c", PARSE, *map(str, sorted(DAGS.glob("*.py")))],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("RESULT", 1)[1])


@pytest.fixture(scope="module")
def parsed(tmp_path_factory):
    return parse(str(tmp_path_factory.mktemp("airflow")))


def test_the_dags_import_without_tensorflow_or_any_other_heavy_library(parsed):
    assert parsed["heavy"] == []


def test_the_build_has_the_named_tasks_in_their_order(parsed):
    assert parsed["data_and_model_build"]["tasks"] == {
        "check_source": ["download_data"],
        "download_data": ["list_shards"],
        "list_shards": ["audit_shard", "prepare_shard"],
        "audit_shard": ["audit_data"],
        "audit_data": ["prepare_shard", "transform_testing_data"],
        "prepare_shard": ["augment_input_data", "capture_statistics"],
        "capture_statistics": ["building_model"],
        "augment_input_data": ["building_model"],
        "transform_testing_data": ["building_model"],
        "building_model": ["evaluate_model"],
        "evaluate_model": ["register_model"],
        "register_model": ["promote_model"],
        "promote_model": ["send_email"],
        "send_email": [],
    }


def test_the_retraining_branches_on_the_flag(parsed):
    assert parsed["model_retraining"]["tasks"] == {
        "check_source_flag": ["flag_false", "flag_true"],
        "flag_false": [],
        "flag_true": ["retrain_model"],
        "retrain_model": ["evaluate_model"],
        "evaluate_model": ["register_model"],
        "register_model": ["promote_model"],
        "promote_model": ["send_email"],
        "send_email": [],
    }


@pytest.mark.parametrize("dag", ["data_and_model_build", "model_retraining", "housekeeping"])
def test_each_dag_explains_itself_retries_mails_failures_and_runs_once_at_a_time(parsed, dag):
    found = parsed[dag]
    assert "research only" in found["doc"]
    assert set(found["retries"].values()) == {1}
    assert found["on_failure"]
    assert found["runs"] == 1
    for name, schema in found["params"].items():
        assert schema.get("title"), name
        assert schema["help"] or schema.get("description_md"), name


def test_tasks_that_train_or_erase_start_from_pods_of_their_own_where_there_are_templates(parsed, tmp_path):
    assert [found["executor"] for found in parsed.values() if isinstance(found, dict)] == [{}, {}, {}]
    named = parse(str(tmp_path), NEUROLOOP_POD_TEMPLATES="/pods")
    pod = {"pod_template_file": "/pods/training.yaml"}
    assert named["data_and_model_build"]["executor"] == {"building_model": pod}
    assert named["model_retraining"]["executor"] == {"retrain_model": pod}
    assert named["housekeeping"]["executor"] == {"tidy": {"pod_template_file": "/pods/housekeeping.yaml"}}


def test_housekeeping_is_one_task_every_hour_unless_set_otherwise(parsed):
    assert parsed["housekeeping"]["tasks"] == {"tidy": []}
    assert parsed["housekeeping"]["schedule"] == "17 * * * *"


def test_the_retraining_is_scheduled_every_ten_minutes_unless_set_otherwise(parsed):
    assert parsed["model_retraining"]["schedule"] == "*/10 * * * *"
    assert parsed["data_and_model_build"]["schedule"] == "None"


@pytest.mark.parametrize("path", sorted(DAGS.glob("*.py")), ids=lambda path: path.stem)
def test_a_dag_file_stays_readable(path):
    assert len(path.read_text().splitlines()) <= 100
