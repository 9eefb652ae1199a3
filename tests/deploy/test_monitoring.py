"""deploy/monitoring: every expression parses, and names what the running API and Airflow really tell."""

import json
import os
import re
import socket
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from neuroloop.core.schemas import Check, PipelineEnd, Promotion
from neuroloop.core.settings import Settings
from neuroloop.embedded.roles import ROLES, environment
from serving.running import Api, head, noise, wait

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "monitoring"
RULES = [rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((FOLDER / "grafana/dashboards/neuroloop.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = {f"alert {rule['alert']}": rule["expr"] for rule in RULES} | {
    f"panel {panel['title']} {target['refId']}": target["expr"] for panel in PANELS for target in panel["targets"]
}
PROMETHEUS_OWN = {"up": {"job", "instance"}, "ALERTS": {"alertname", "alertstate", "severity"}}
ADDED_BY_SCRAPE = {"job", "instance"}
MAPPING = yaml.safe_load((FOLDER / "statsd-mapping.yml").read_text())


def selectors(node) -> list[tuple[str, list]]:
    """Name and matchers of every metric in a parsed expression."""
    if isinstance(node, promql_parser.VectorSelector):
        return [(node.name, node.matchers.matchers)]
    below = [getattr(node, name, None) for name in ("expr", "lhs", "rhs", "vector_selector", "param")]
    below += list(getattr(node, "args", []))
    return [found for each in below if each is not None for found in selectors(each)]


def metrics_of(text: str) -> dict[str, list[dict[str, str]]]:
    """Sample name -> the labels of each of its samples."""
    found = defaultdict(list)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name].append(sample.labels)
    return found


@pytest.fixture(scope="module")
def exposed(live_api: Api) -> dict[str, list[dict[str, str]]]:
    """What the running API tells Prometheus after some traffic, one failed retraining, and verdicts."""
    ids = [live_api.predict(head("glioma", height=200 + n)).json()["id"] for n in range(3)]
    live_api.predict(noise())
    assert live_api.feedback(ids[0], "agree").status_code == 200
    assert live_api.feedback(ids[1], "correct", "pituitary").status_code == 200
    log = live_api.services.log
    for dag in ("model_retraining", "data_and_model_build"):
        log.record_end(PipelineEnd(dag=dag, outcome="promoted", run_id="r1", task="send_email"))
        log.record_end(PipelineEnd(dag=dag, outcome="failed", run_id="r2", task="retrain_model"))
    scores = {"candidate": {"macro_f1": 0.91}, "champion": {"macro_f1": 0.9}, "feedback": None}
    checks = (Check(name="c", passed=True, reason="r"),)
    log.record_promotion(
        Promotion(run_id="r1", version="1", previous=None, promoted=True, checks=checks, metrics=scores)
    )
    wait(lambda: "neuroloop_drift_psi{" in live_api.client.get("/metrics").text, 120)  # the first one loads SciPy
    return metrics_of(live_api.client.get("/metrics").text)


# --- Airflow ------------------------------------------------------------------------------------

SENDS = """
import sys, yaml
from pathlib import Path
import airflow.sdk._shared.observability.metrics as shared
from airflow.configuration import conf
from airflow.observability.metrics import stats_utils
from airflow._shared.observability.metrics import stats

legacy = conf.getboolean("metrics", "legacy_names_on")
stats.initialize(factory=stats_utils.get_stats_factory(), export_legacy_names=legacy)
known = yaml.safe_load((Path(shared.__file__).parent / "metrics_template.yaml").read_text())["metrics"]
tags = {"dag_id": "model_retraining", "task_id": "retrain_model", "state": "success", "run_type": "manual"}
for metric in known:
    if "{" not in metric["name"]:
        send = {"counter": stats.incr, "gauge": stats.gauge, "timer": stats.timing}[metric["type"]]
        send(metric["name"], *({"gauge": (1,), "timer": (1.5,)}.get(metric["type"], ())), tags=tags)
"""


def as_the_exporter_names_it(packet: str) -> tuple[str, str, dict[str, str]] | None:
    """Name, kind and labels that prom/statsd-exporter makes of a packet, by its rules and our mapping; None: none."""
    name, _, value = packet.partition(":")
    name, *tags = name.split(",")
    for rule in MAPPING["mappings"]:
        if re.fullmatch(rule["match"], name):
            if rule.get("action") == "drop":
                return None
            name = rule["name"]
            break
    return re.sub(r"[^a-zA-Z0-9_]", "_", name), value.split("|")[1], dict(tag.split("=") for tag in tags)


@pytest.fixture(scope="module")
def airflows(tmp_path_factory) -> dict[str, list[dict[str, str]]]:
    """Every metric that this Airflow knows, as its own client sends it with the variables of our roles."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_000_000)
        settings = Settings(
            home=tmp_path_factory.mktemp("airflow"), statsd_url=f"statsd://127.0.0.1:{receiver.getsockname()[1]}"
        )
        env = os.environ | environment(settings) | {"AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": "sqlite:////tmp/none.db"}
        done = subprocess.run(
            [sys.executable, "-c", SENDS], env=env, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        receiver.setblocking(False)
        found = defaultdict(list)
        try:
            while True:
                named = as_the_exporter_names_it(receiver.recv(65536).decode())
                if named:
                    name, kind, labels = named
                    for suffix in ("_sum", "_count", "_bucket") if kind == "ms" else ("",):
                        found[name + suffix].append(labels)
        except BlockingIOError:
            pass
    assert len(found) > 50
    return found


# --- queries ------------------------------------------------------------------------------------


def test_there_is_something_to_test():
    assert len(RULES) >= 10
    assert len(PANELS) >= 15
    assert len(EXPRESSIONS) > 40


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_every_expression_parses(where: str):
    promql_parser.parse(EXPRESSIONS[where])


def test_the_selectors_of_an_expression_are_found_wherever_they_stand():
    expression = "histogram_quantile(0.9, sum by (le) (rate(a_bucket[5m]))) > 2 and absent(b)"
    expression += " or -(c offset 5m) + topk(scalar(d), e)"
    assert sorted(name for name, _ in selectors(promql_parser.parse(expression))) == ["a_bucket", "b", "c", "d", "e"]


def test_every_metric_and_label_in_a_query_is_really_exposed(exposed, airflows):
    known = {name: [dict.fromkeys(labels, "")] for name, labels in PROMETHEUS_OWN.items()} | exposed | airflows
    for where, expression in EXPRESSIONS.items():
        for name, matchers in selectors(promql_parser.parse(expression)):
            assert name in known, f"{where}: nobody exposes {name}"
            for matcher in matchers:
                values = {labels.get(matcher.name) for labels in known[name]}
                if name in PROMETHEUS_OWN or matcher.name in ADDED_BY_SCRAPE:
                    continue
                assert values != {None}, f"{where}: {name} has no label {matcher.name}"
                if matcher.op == promql_parser.MatchOp.Equal:
                    assert matcher.value in values, f"{where}: no {name} has {matcher.name}={matcher.value}"


def test_every_label_that_a_query_groups_or_shows_by_exists(exposed, airflows):
    known = {name: [dict.fromkeys(labels, "")] for name, labels in PROMETHEUS_OWN.items()} | exposed | airflows
    shown = {f"panel {p['title']} {t['refId']}": t["legendFormat"] for p in PANELS for t in p["targets"]}
    for where, expression in EXPRESSIONS.items():
        names = [name for name, _ in selectors(promql_parser.parse(expression))]
        labels = {label for name in names for sample in known[name] for label in sample} | ADDED_BY_SCRAPE | {"le"}
        used = {part.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for part in group.split(",")}
        used |= set(re.findall(r"\{\{(\w+)\}\}", shown.get(where, "")))
        assert used <= labels, f"{where}: {used - labels}"


def test_the_loops_figures_are_right_after_that_traffic(live_api: Api, exposed):
    text = live_api.client.get("/metrics").text
    values = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert values[("neuroloop_loop_up",)] == 1
    assert values[("neuroloop_corrections_waiting",)] == 1
    assert values[("neuroloop_corrections_threshold",)] == 50
    outcome = ("neuroloop_pipeline_last_outcome", ("dag", "model_retraining"))
    assert values[(*outcome, ("outcome", "failed"))] == 1
    assert values[(*outcome, ("outcome", "promoted"))] == 0
    assert values[("neuroloop_ledger_macro_f1", ("model", "candidate"))] == 0.91
    (accuracy,) = [value for key, value in values.items() if key[0] == "neuroloop_live_accuracy"]
    assert accuracy == 0.5


# --- alerts and runbook -------------------------------------------------------------------------


def test_every_alert_has_a_section_in_the_runbook_to_which_it_links():
    text = (ROOT / "docs" / "operations.md").read_text()
    sections = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)
    }
    for rule in RULES:
        path, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert (ROOT / path).is_file()
        assert anchor in sections, rule["alert"]
        assert anchor == rule["alert"].lower()
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["for"]
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"]


def test_the_runbook_has_no_section_for_an_alert_that_is_gone():
    text = (ROOT / "docs" / "operations.md").read_text()
    assert set(re.findall(r"^### (\w+)$", text, re.M)) == {rule["alert"] for rule in RULES}


def test_what_the_issue_asks_to_be_alerted_of_is():
    names = {rule["alert"] for rule in RULES}
    asked = {
        "ErrorRate",
        "Latency",
        "GateRejectionRate",
        "Drift",
        "FeedbackNearThreshold",
        "RetrainingFailed",
        "ApiDown",
    }
    assert asked <= names


# --- the other files ----------------------------------------------------------------------------


def test_prometheus_reads_the_rules_and_asks_the_services_of_compose():
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    assert config["rule_files"] == ["/etc/prometheus/alerts.yml"]
    assert (
        jobs["neuroloop-api"]["dns_sd_configs"][0] | {"names": ["api"], "port": 8000}
        == jobs["neuroloop-api"]["dns_sd_configs"][0]
    )
    assert jobs["neuroloop-api"]["authorization"]["credentials_file"]
    assert jobs["airflow"]["static_configs"] == [{"targets": ["statsd-exporter:9102"]}]
    named = {name for job in re.findall(r'job="([^"]+)"', " ".join(EXPRESSIONS.values())) for name in [job]}
    assert named <= set(jobs)


def test_grafana_finds_its_dashboard_and_each_panel_its_data_source():
    (source,) = yaml.safe_load((FOLDER / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((FOLDER / "grafana/provisioning/dashboards/neuroloop.yml").read_text())["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in PANELS:
        assert panel["datasource"] == {"type": source["type"], "uid": source["uid"]}
        assert panel["description"], panel["title"]
        assert all(target["datasource"]["uid"] == source["uid"] for target in panel["targets"])
    rows = sorted((p["gridPos"]["y"], p["gridPos"]["x"], p["gridPos"]["w"]) for p in DASHBOARD["panels"])
    assert all(x + width <= 24 for _, x, width in rows)


# --- logs ---------------------------------------------------------------------------------------

AIRFLOW_LINE = """
import logging, structlog
from structlog.contextvars import bind_contextvars
from airflow.logging_config import configure_logging
configure_logging()
bind_contextvars(ti_id="0", dag_id="model_retraining", task_id="retrain_model", run_id="scheduled__1", try_number=1)
logging.getLogger("neuroloop.pipeline").info("epoch %d: %s", 1, "loss 0.5")
"""


@pytest.fixture(scope="module")
def airflow_line(tmp_path_factory) -> dict:
    """A line of a step, as Airflow writes it to stdout with the variables of our roles."""
    settings = Settings(home=tmp_path_factory.mktemp("airflow-log"), log_format="ecs")
    env = os.environ | environment(settings) | {"AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": "sqlite:////tmp/none.db"}
    env.pop("PYTEST_VERSION", None)
    done = subprocess.run([sys.executable, "-c", AIRFLOW_LINE], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return next(line for line in lines if line.get("logger") == "neuroloop.pipeline")


FILEBEAT = yaml.safe_load((FOLDER / "filebeat.yml").read_text())


def renames() -> dict[str, str]:
    (of_airflow,) = [processor for processor in FILEBEAT["processors"] if "if" in processor]
    (rename,) = [step["rename"] for step in of_airflow["then"] if "rename" in step]
    return {field["from"]: field["to"] for field in rename["fields"]}


def test_what_filebeat_renames_is_what_airflow_writes_of_a_step(airflow_line):
    (of_airflow,) = [processor for processor in FILEBEAT["processors"] if "if" in processor]
    assert set(of_airflow["if"]["has_fields"]) <= set(airflow_line)
    told = {new: airflow_line[old] for old, new in renames().items() if old in airflow_line}
    assert told == {
        "message": "epoch 1: loss 0.5",
        "log.level": "info",
        "log.logger": "neuroloop.pipeline",
        "neuroloop.dag": "model_retraining",
        "neuroloop.task": "retrain_model",
        "neuroloop.run": "scheduled__1",
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+(Z|\+00:00)", airflow_line["timestamp"])


def test_filebeat_reads_the_containers_lines_as_json_and_holds_no_password():
    (source,) = FILEBEAT["filebeat.inputs"]
    parsers = {name: options for parser in source["parsers"] for name, options in parser.items()}
    assert parsers["ndjson"]["target"] == ""
    assert parsers["ndjson"]["overwrite_keys"]
    assert FILEBEAT["output.elasticsearch"]["password"].startswith("${")
    pattern = FILEBEAT["setup.template"]["pattern"].rstrip("*")
    assert FILEBEAT["output.elasticsearch"]["index"].startswith(pattern)


def test_kibanas_objects_are_whole_and_name_fields_that_the_lines_have(live_api: Api, airflow_line, caplog):
    import logging

    from neuroloop.core import logs

    objects = [json.loads(line) for line in (FOLDER / "kibana.ndjson").read_text().splitlines()]
    ids = {(each["type"], each["id"]) for each in objects}
    assert len(ids) == len(objects)
    assert {kind for kind, _ in ids} == {"index-pattern", "visualization", "search", "dashboard"}
    text = json.dumps(objects)
    for each in objects:
        assert all((reference["type"], reference["id"]) in ids for reference in each["references"])
        for key in ("visState", "panelsJSON", "optionsJSON"):
            if key in each["attributes"]:
                json.loads(each["attributes"][key])
    with caplog.at_level(logging.INFO):
        live_api.predict(head("glioma"))
        line: set[str] = set()
        formatter = logs.formatter("api")
        try:
            raise ValueError("a fault")
        except ValueError:
            logging.getLogger("neuroloop.test").exception("it broke")
        for record in caplog.records:
            with logs.about(trace__id="t", http__request__id="r"):
                line |= flat(json.loads(formatter.format(record)))
    written = line | set(renames().values())
    assert "neuroloop.model.version" in line
    used = set(re.findall(r'\\"field\\": \\"([^"\\]+)', text)) | {
        column for each in objects if each["type"] == "search" for column in each["attributes"]["columns"]
    }
    used |= set(re.findall(r'\\"query\\": \\"([a-z.]+):', text.replace('\\\\\\"', "")))
    assert len(used) > 10
    assert used <= written | {"@timestamp"}, used - written


def flat(line: dict, above: str = "") -> set[str]:
    """The dotted names of all fields of a line."""
    found = set()
    for name, value in line.items():
        found |= flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}"}
    return found


def test_without_its_settings_airflow_sends_no_metrics_and_writes_text():
    made = environment(Settings())
    assert not any("STATSD" in name or "JSON_LOGS" in name for name in made)
    assert ROLES
