"""The manifests of Kubernetes as kubectl builds them for each environment, judged without a cluster."""

import importlib.util
import json
import re
import runpy
import shutil
import subprocess
import sys
from functools import cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml

from neuroloop.cli import app
from neuroloop.core.credentials import parted
from neuroloop.core.settings import PREFIX, Settings
from neuroloop.embedded.roles import ROLES, environment

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
CLOUDS = ("gke", "eks", "aks")
ENVIRONMENTS = (*CLOUDS, "local")
SETTINGS = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
VALUES = yaml.safe_load((KUBERNETES / "airflow-values.yaml").read_text())
TRAINING_POD = yaml.safe_load((KUBERNETES / "base" / "training.yaml").read_text())
TASK_PODS = {
    "training": TRAINING_POD,
    "housekeeping": yaml.safe_load((KUBERNETES / "base" / "housekeeping.yaml").read_text()),
}
FOREIGN = {
    "ServiceMonitor": "monitoring.coreos.com/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
    "BackendConfig": "cloud.google.com/v1",
}
"""Kinds that operators of others bring; no schema of them is at hand."""
QUANTITY = re.compile(r"[1-9][0-9]*(Ki|Mi|Gi|Ti)")

needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None,
    reason="kubectl (1.21 or newer) is not installed; Debian's kubernetes-client is older",
)
each_environment = pytest.mark.parametrize("name", ENVIRONMENTS)
pytestmark = needs_kubectl


@cache
def built(name: str) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would send for an environment."""
    argv = ["kubectl", "kustomize", str(KUBERNETES / "overlays" / name)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(name: str, *kinds: str) -> list[dict[str, Any]]:
    return [found for found in built(name) if found["kind"] in kinds]


def workloads(name: str) -> dict[str, dict[str, Any]]:
    """Everything that starts pods, by name, and the pods of Airflow's tasks that have one of their own."""
    found = {each["metadata"]["name"]: each for each in of_kind(name, "Deployment", "StatefulSet", "Job")}
    found |= {each["metadata"]["name"]: each["spec"]["jobTemplate"] for each in of_kind(name, "CronJob")}
    return found | {who: {"kind": "Pod", "spec": {"template": each}} for who, each in TASK_PODS.items()}


def pod(workload: dict[str, Any]) -> dict[str, Any]:
    return workload["spec"]["template"]["spec"]


def labels(workload: dict[str, Any]) -> dict[str, str]:
    return workload["spec"]["template"]["metadata"]["labels"]


def containers(name: str) -> list[tuple[str, dict[str, Any]]]:
    return [(f"{who}/{each['name']}", each) for who, found in workloads(name).items() for each in _all(pod(found))]


def _all(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [*spec.get("initContainers", ()), *spec["containers"]]


def config(name: str, generated: str) -> dict[str, str]:
    """The data of the ConfigMap of that name, whatever hash follows it."""
    (found,) = (
        each
        for each in of_kind(name, "ConfigMap")
        if re.fullmatch(rf"{generated}(-[a-z0-9]{{10}})?", each["metadata"]["name"])
    )
    return found["data"]


def _make_secrets() -> Any:
    loader = SourceFileLoader("make_secrets", str(KUBERNETES / "make-secrets"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("make_secrets", loader))
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def env_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What deploy/make-env writes, with a mail server and Kaggle's key."""
    file = tmp_path_factory.mktemp("secrets") / "env"
    subprocess.run([sys.executable, DEPLOY / "make-env", file], check=True)
    with file.open("a") as stream:
        stream.write("NEUROLOOP_NOTIFY_URL=smtps://mail.example.org:465\nKAGGLE_USERNAME=ann\nKAGGLE_KEY=abc\n")
    return file


@pytest.fixture(scope="module")
def secrets(env_file: Path) -> dict[str, dict[str, str]]:
    """Each Secret that make-secrets makes for the overlay `local`."""
    argv = [KUBERNETES / "make-secrets", env_file, "postgres"]
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, check=True)
    made = json.loads(done.stdout)["items"]
    return {each["metadata"]["name"]: each["stringData"] for each in made}


# --- schemas ------------------------------------------------------------------------------------


@each_environment
def test_every_manifest_keeps_the_schema_of_its_kind_strictly(name: str):
    foreign = set()
    for manifest in built(name):
        if manifest["kind"] in FOREIGN:
            assert manifest["apiVersion"] == FOREIGN[manifest["kind"]]
            foreign.add(manifest["kind"])
            continue
        kubernetes_validate.validate(manifest, "1.34", strict=True)
    assert len(built(name)) - len(foreign) > 25


def test_a_pod_that_trains_keeps_the_schema_too_and_the_one_with_a_gpu_differs_in_the_gpu_only():
    for each in TASK_PODS.values():
        kubernetes_validate.validate(each, "1.34", strict=True)
    with_gpu = yaml.safe_load((KUBERNETES / "components" / "gpu" / "training.yaml").read_text())
    assert with_gpu["spec"]["containers"][0]["resources"]["limits"].pop("nvidia.com/gpu") == "1"
    assert with_gpu == TRAINING_POD
    assert [each["key"] for each in TRAINING_POD["spec"]["tolerations"]] == ["nvidia.com/gpu"]


def test_the_schema_check_would_notice_a_misspelt_field():
    broken = json.loads(json.dumps(of_kind("gke", "Deployment")[0]))
    broken["spec"]["template"]["spec"]["containers"][0]["resourcs"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.34", strict=True)


# --- containers ---------------------------------------------------------------------------------


@each_environment
def test_every_container_says_in_units_what_it_needs_and_what_it_may_take(name: str):
    for who, container in containers(name):
        for which in ("requests", "limits"):
            resources = container["resources"][which]
            assert QUANTITY.fullmatch(resources["memory"]), (who, which)
            assert re.fullmatch(r"[1-9][0-9]*m?", str(resources["cpu"])), (who, which)


@each_environment
def test_every_volume_and_claim_has_a_size_in_units(name: str):
    sizes = [
        volume["emptyDir"]["sizeLimit"]
        for found in workloads(name).values()
        for volume in pod(found)["volumes"]
        if "emptyDir" in volume
    ]
    claims = [each["spec"] for each in of_kind(name, "PersistentVolumeClaim")]
    claims += [c["spec"] for each in of_kind(name, "StatefulSet") for c in each["spec"]["volumeClaimTemplates"]]
    sizes += [claim["resources"]["requests"]["storage"] for claim in claims]
    assert sizes
    assert all(QUANTITY.fullmatch(size) for size in sizes)


@each_environment
def test_no_container_is_root_or_may_become_it_or_write_to_its_image(name: str):
    for who, found in workloads(name).items():
        security = pod(found)["securityContext"]
        assert security["runAsNonRoot"] is True, who
        assert security["runAsUser"] >= 999, who
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, who
    for who, container in containers(name):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, who


@each_environment
def test_every_server_is_probed_while_it_starts_while_it_lives_and_before_it_gets_requests(name: str):
    for found in of_kind(name, "Deployment", "StatefulSet"):
        (server,) = pod(found)["containers"]
        ports = {port["name"] for port in server["ports"]}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            (how,) = (server[probe][kind] for kind in ("httpGet", "tcpSocket", "exec") if kind in server[probe])
            assert "command" in how or how["port"] in ports, (server["name"], probe)


def test_the_probes_ask_the_routes_that_there_are():
    asked = {
        (found["metadata"]["name"], probe): pod(found)["containers"][0][probe]["httpGet"]["path"]
        for found in of_kind("gke", "Deployment")
        for probe in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    rules = importlib.import_module("neuroloop.serving.access").RULES
    assert {asked["api", "livenessProbe"], asked["api", "readinessProbe"]} == {"/health/live", "/health/ready"}
    assert all(rules[f"GET {path}"] is None for (who, _), path in asked.items() if who == "api")
    images = (ROOT / "deploy" / "Dockerfile").read_text()
    for who, port in (("frontend", 8501), ("mlflow", 5000)):
        assert f'"http://127.0.0.1:{port}{asked[who, "readinessProbe"]}"' in images


@each_environment
def test_no_pod_gets_a_token_of_the_cluster_or_variables_that_look_like_settings(name: str):
    for who, found in workloads(name).items():
        assert pod(found)["automountServiceAccountToken"] is False, who
        assert pod(found)["enableServiceLinks"] is False, who
    # For a Service `neuroloop-api`, Kubernetes sets NEUROLOOP_API_PORT=tcp://... in pods of Airflow's chart.
    assert not [each for each in of_kind(name, "Service") if each["metadata"]["name"].startswith("neuroloop")]


@each_environment
def test_every_image_has_a_version(name: str):
    for who, container in containers(name):
        if not who.endswith("/base"):  # KubernetesExecutor puts in the chart's image
            _, _, tag = container["image"].rpartition("/")[2].partition(":")
            assert re.match(r"\d", tag), (who, container["image"])


@pytest.mark.parametrize("name", CLOUDS)
def test_the_images_of_a_cloud_come_from_its_registry_all_in_one_version(name: str):
    ours = {each["image"] for who, each in containers(name) if not who.endswith("/base")}
    airflow = yaml.safe_load((KUBERNETES / "overlays" / name / "airflow-values.yaml").read_text())
    ours.add(f"{airflow['defaultAirflowRepository']}:{airflow['defaultAirflowTag']}")
    registries, names = zip(*(image.rsplit("/", 1) for image in ours), strict=True)
    assert len(set(registries)) == 1
    assert {each.partition(":")[0] for each in names} == {
        f"neuroloop-{part}" for part in ("api", "frontend", "mlflow", "airflow")
    }
    assert len({each.partition(":")[2] for each in names}) == 1


# --- settings and secrets -----------------------------------------------------------------------


def variables(name: str, container: dict[str, Any], secrets: dict[str, dict[str, str]]) -> dict[str, str]:
    """The environment of a container, as the cluster makes it."""
    made: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        if "configMapRef" in source:
            made |= config(name, re.sub(r"-[a-z0-9]{10}$", "", source["configMapRef"]["name"]))
        else:
            made |= secrets[source["secretRef"]["name"]]
    return made | {each["name"]: each["value"] for each in container.get("env", ()) if "value" in each}


@each_environment
def test_every_variable_of_ours_is_a_setting_and_the_settings_load(name: str, secrets, tmp_path: Path):
    checked = 0
    for who, container in containers(name):
        given = variables(name, container, secrets)
        assert {key for key in given if key.startswith(PREFIX)} <= SETTINGS, who
        if who.startswith("postgres/"):
            continue
        store = urlsplit(given.pop("NEUROLOOP_STORE_URL"))
        assert store.scheme == {"gke": "gs", "eks": "s3", "aks": "az", "local": "file"}[name]
        loaded = Settings.load(given | {"NEUROLOOP_ENV_FILE": str(tmp_path / "none")})
        assert loaded.bind == "0.0.0.0"
        checked += 1
    assert checked >= 5


@each_environment
def test_every_service_of_ours_is_called_by_the_address_that_the_settings_name(name: str):
    given = config(name, "settings")
    services = {each["metadata"]["name"]: each["spec"]["ports"][0]["port"] for each in of_kind(name, "Service")}
    for setting in ("NEUROLOOP_API_URL", "NEUROLOOP_MLFLOW_TRACKING_URI"):
        url = urlsplit(given[setting])
        assert services[str(url.hostname)] == url.port
    assert given["NEUROLOOP_AIRFLOW_INTERNAL_URL"] == "http://airflow-api-server:8080"


@each_environment
def test_a_container_listens_where_its_role_does_and_its_service_sends_there(name: str):
    ports = {"api": "api_port", "ui": "ui_port", "mlflow": "mlflow_port", "mail": "mail_port"}
    roles = set()
    for found in of_kind(name, "Deployment"):
        (server,) = pod(found)["containers"]
        (role,) = server["args"]
        assert role in ROLES
        assert server["ports"][0]["containerPort"] == Settings.model_fields[ports[role]].default
        roles.add(role)
    assert roles == {"api", "ui", "mlflow"} | ({"mail"} if name == "local" else set())
    for service in of_kind(name, "Service"):
        (target,) = (w for w in workloads(name).values() if service["spec"]["selector"].items() <= labels(w).items())
        named = {port["name"] for port in pod(target)["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= named


@each_environment
def test_every_secret_that_is_named_is_one_that_make_secrets_makes(name: str, secrets):
    text = json.dumps([*built(name), TASK_PODS, VALUES])
    named = set(re.findall(r'"(?:secretRef|secretKeyRef)": \{[^}]*?"name": "([a-z-]+)"', text))
    named |= set(re.findall(r'"secretName": "([a-z-]+)"', text)) - {"frontend-tls", "api-tls", "airflow-tls"}
    named |= {VALUES[key] for key in ("fernetKeySecretName", "apiSecretKeySecretName", "jwtSecretName")}
    assert {"database", "mlflow-login", "airflow-keys", "notify"} <= named
    assert named <= set(secrets)
    assert {"connection", "fernet-key", "api-secret-key", "jwt-secret", "passwords.json"} == set(
        secrets["airflow-keys"]
    )


def test_no_secret_stands_in_the_repository():
    for name in ENVIRONMENTS:
        assert not of_kind(name, "Secret")
        for each in of_kind(name, "ConfigMap"):
            assert not [key for key in each["data"] if re.search("PASSWORD|SECRET|KEY|DATABASE_URL", key)]


def test_each_part_gets_the_secrets_that_it_needs_and_no_others():
    got = {
        who: {source["secretRef"]["name"] for source in each.get("envFrom", ()) if "secretRef" in source}
        for who, each in containers("gke")
    }
    assert got == {
        "api/api": {"database", "mlflow-api-login", "api-key", "metrics-key", "notify"},
        "frontend/frontend": {"api-key", "frontend-login"},
        "mlflow/mlflow": {"mlflow-database", "mlflow-login", "mlflow-api-login"},
        "migrate/migrate": {"database"},
        "backup/backup": {"database", "mlflow-database"},
        "training/base": {"database", "mlflow-login", "notify", "kaggle"},
        "housekeeping/base": {"database", "mlflow-login", "notify"},
    }


@pytest.mark.parametrize(
    "url", ["", "smtp://mail.example.org", "smtp://mail.example.org:25", "smtp://ann:a/b@mail.example.org:587"]
)
def test_a_cloud_without_a_mail_server_that_its_pods_reach_is_refused(env_file: Path, tmp_path: Path, url: str):
    text = re.sub("(?<=NOTIFY_URL=).*", url, env_file.read_text())
    (tmp_path / "env").write_text(text)
    for host, refused in (("10.1.2.3", True), ("postgres", False)):
        argv = [sys.executable, KUBERNETES / "make-secrets", tmp_path / "env", host]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == refused
        assert ("NEUROLOOP_NOTIFY_URL=smtps://" in done.stderr) is refused
        assert "a/b" not in done.stderr


def test_make_secrets_knows_the_ports_by_which_mail_leaves_a_cloud():
    made = _make_secrets()
    (policy,) = (each["spec"] for each in of_kind("gke", "NetworkPolicy") if each["metadata"]["name"] == "reaches-mail")
    assert tuple(each["port"] for each in policy["egress"][0]["ports"]) == made.MAIL_PORTS
    for url in ("smtps://ann@mail.example.org", "smtps://mail.example.org:465", "smtp://ann@mail.example.org:587"):
        assert made.mail_leaves(url)


def test_secrets_for_a_managed_database_ask_for_tls_and_leave_its_superuser_out(env_file: Path):
    given = dict(line.split("=", 1) for line in env_file.read_text().splitlines())
    made = {each["metadata"]["name"]: each for each in _make_secrets().secrets(given, "10.1.2.3")}
    assert "postgres" not in made
    url = made["database"]["stringData"]["NEUROLOOP_DATABASE_URL"]
    assert url.endswith("@10.1.2.3:5432/neuroloop?sslmode=require")
    Settings.load({"NEUROLOOP_DATABASE_URL": url, "NEUROLOOP_ENV_FILE": "/none"})
    for secret in made.values():
        kubernetes_validate.validate(secret, "1.34", strict=True)


def test_what_the_environment_file_lacks_is_named(tmp_path: Path):
    file = tmp_path / "env"
    file.write_text("POSTGRES_PASSWORD=x\n")
    argv = [sys.executable, KUBERNETES / "make-secrets", file, "postgres"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "has no NEUROLOOP_AIRFLOW_JWT_SECRET" in done.stderr
    assert done.stdout == ""


# --- network, scaling, identities ---------------------------------------------------------------


@each_environment
def test_nothing_is_let_in_or_out_unless_a_policy_says_so_and_each_policy_means_a_pod(name: str):
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind(name, "NetworkPolicy")}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    airflow = {"tier": "airflow", "component": "api-server"} | VALUES["labels"]
    pods = [labels(each) for each in workloads(name).values()] + [airflow]
    for who, spec in policies.items():
        peers = [peer for rule in spec.get("ingress", ()) for peer in rule.get("from", ())]
        peers += [peer for rule in spec.get("egress", ()) for peer in rule.get("to", ())]
        for selector in (spec["podSelector"], *(peer["podSelector"] for peer in peers if "podSelector" in peer)):
            assert any(_selects(selector, each) for each in pods), (who, selector)


@each_environment
def test_every_part_is_let_out_to_what_its_settings_name_and_into_by_who_asks_it(name: str):
    pods = {who: labels(each) for who, each in workloads(name).items()}
    edges = {("frontend", "api", 8000), ("api", "mlflow", 5000), ("training", "mlflow", 5000)}
    if name == "local":
        edges |= {(who, "postgres", 5432) for who in ("api", "mlflow", "migrate", "backup", "training")}
        edges |= {(who, "mail", 1025) for who in ("api", "training")}
    for source, target, port in edges:
        assert _allowed(name, "Egress", pods[source], pods[target], port), (source, target)
        assert _allowed(name, "Ingress", pods[target], pods[source], port), (source, target)
    for source, target, port in {("frontend", "mlflow", 5000), ("backup", "mlflow", 5000), ("mlflow", "api", 8000)}:
        assert not _allowed(name, "Egress", pods[source], pods[target], port), (source, target)
        assert not _allowed(name, "Ingress", pods[target], pods[source], port), (source, target)


@each_environment
def test_autoscalers_and_disruption_budgets_mean_deployments_that_there_are(name: str):
    deployments = {each["metadata"]["name"]: each for each in of_kind(name, "Deployment")}
    scaled = of_kind(name, "HorizontalPodAutoscaler")
    assert {each["spec"]["scaleTargetRef"]["name"] for each in scaled} == {"api", "frontend"}
    for each in scaled:
        target = deployments[each["spec"]["scaleTargetRef"]["name"]]
        assert "replicas" not in target["spec"], "kubectl apply would undo what the autoscaler chose"
        assert each["spec"]["minReplicas"] >= (1 if name == "local" else 2)
    for each in of_kind(name, "PodDisruptionBudget"):
        selector = each["spec"]["selector"]["matchLabels"]
        assert any(selector.items() <= labels(found).items() for found in deployments.values())


@each_environment
def test_what_is_published_has_tls_and_only_frontend_and_api_are(name: str):
    published = of_kind(name, "Ingress")
    assert {each["metadata"]["name"] for each in published} == {"frontend", "api"}
    for each in published:
        hosts = {rule["host"] for rule in each["spec"]["rules"]}
        assert hosts == {host for tls in each["spec"]["tls"] for host in tls["hosts"]}
        controller = (
            each["spec"].get("ingressClassName") or each["metadata"]["annotations"]["kubernetes.io/ingress.class"]
        )
        assert controller
    assert all(each["spec"].get("type", "ClusterIP") == "ClusterIP" for each in of_kind(name, "Service"))


@pytest.mark.parametrize("name", CLOUDS)
def test_who_reaches_the_store_has_an_identity_of_its_own_and_nobody_else_has_one(name: str):
    accounts = {
        each["metadata"]["name"]: each["metadata"].get("annotations", {}) for each in of_kind(name, "ServiceAccount")
    }
    tied = {who: next(iter(annotations.values())) for who, annotations in accounts.items() if annotations}
    assert set(tied) == {"api", "mlflow", "trainer", "housekeeper", "backup"}
    if name != "aks":  # whose ids are made by Azure
        assert len(set(tied.values())) == len(tied)
    for who, found in workloads(name).items():
        reaches = "neuroloop.io/reaches-store" in labels(found)
        assert reaches == (pod(found)["serviceAccountName"] in tied), who
        if reaches and name == "aks":
            assert labels(found)["azure.workload.identity/use"] == "true"


@each_environment
def test_every_night_a_backup_is_made_outside_the_store_by_a_command_that_there_is(name: str):
    (found,) = of_kind(name, "CronJob")
    (container,) = pod(found["spec"]["jobTemplate"])["containers"]
    *_, command, target = container["args"]
    assert command in {each.name or each.callback.__name__ for each in app.registered_commands}
    assert target == "$(BACKUP_TO)"
    to, store = config(name, "settings")["BACKUP_TO"], config(name, "settings")["NEUROLOOP_STORE_URL"]
    if name == "local":
        volumes = {each["mountPath"]: each for each in container["volumeMounts"]}
        assert volumes[urlsplit(store).path]["readOnly"]
        assert not volumes[to].get("readOnly")
    else:
        assert urlsplit(to).scheme == urlsplit(store).scheme
        assert not f"{to}/".startswith(f"{store}/")


@each_environment
def test_the_runbooks_restore_writes_as_another_identity_than_the_backups(name: str):
    text = (ROOT / "docs" / "operations.md").read_text()
    (patch,) = re.findall(r"kubectl patch --local -f - -o yaml -p '(.*?)'", text, re.DOTALL)
    (cron,) = of_kind(name, "CronJob")
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "restore"},
        "spec": cron["spec"]["jobTemplate"]["spec"],
    }
    argv = ["kubectl", "patch", "--local", "-f", "-", "-o", "yaml", "-p", patch]
    done = subprocess.run(argv, input=json.dumps(job), capture_output=True, text=True, check=True)
    made = yaml.safe_load(done.stdout)
    kubernetes_validate.validate(made, "1.34", strict=True)
    assert pod(made)["serviceAccountName"] not in {each["metadata"]["name"] for each in of_kind(name, "ServiceAccount")}
    (container,) = pod(made)["containers"]
    *_, command, source = container["args"]
    assert command in {each.name or each.callback.__name__ for each in app.registered_commands}
    assert re.fullmatch(r"gs://[a-z-]+/neuroloop-\w+", source)
    (backup,) = pod(cron["spec"]["jobTemplate"])["containers"]
    assert container["envFrom"] == backup["envFrom"]
    assert {each["name"]: each["value"] for each in container["env"]} == {
        "HOME": "/tmp",
        "NEUROLOOP_STORE_URL": "gs://the-empty-bucket",
    }


def test_the_monitor_asks_the_port_of_the_api_with_the_key_that_the_api_has(secrets):
    (monitor,) = (each for each in of_kind("gke", "ServiceMonitor") if each["metadata"]["name"] == "api")
    (service,) = (each for each in of_kind("gke", "Service") if each["metadata"]["name"] == "api")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]
    key = endpoint["authorization"]["credentials"]
    (api,) = (each for who, each in containers("gke") if who == "api/api")
    assert variables("gke", api, secrets)[key["key"]] == secrets[key["name"]][key["key"]]
    assert parted(secrets["metrics-key"]["NEUROLOOP_METRICS_KEY"])


def test_alerts_and_dashboard_find_the_jobs_by_the_names_that_they_have_in_compose():
    prometheus = yaml.safe_load((DEPLOY / "monitoring" / "prometheus.yml").read_text())
    jobs = {job["job_name"] for job in prometheus["scrape_configs"]} - {"prometheus"}
    made = [
        relabeling
        for monitor in of_kind("gke", "ServiceMonitor")
        for endpoint in monitor["spec"]["endpoints"]
        for relabeling in endpoint["relabelings"]
    ]
    assert {each["targetLabel"] for each in made} == {"job"}
    assert {each["replacement"] for each in made} == jobs


@each_environment
def test_the_operator_of_prometheus_gets_the_rules_of_alerts_yml(name: str):
    (rule,) = of_kind(name, "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((DEPLOY / "monitoring" / "alerts.yml").read_text())
    render = runpy.run_path(str(DEPLOY / "monitoring" / "render.py"))
    assert render["MANIFEST"].read_text() == render["manifest"](), "run deploy/monitoring/render.py"


# --- Airflow's chart and Argo CD ----------------------------------------------------------------


def test_the_chart_is_told_the_version_of_airflow_that_the_image_holds():
    (pinned,) = re.findall(r"^apache-airflow==(.+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert VALUES["airflowVersion"] == pinned


def test_airflow_in_the_chart_gets_what_the_roles_give_it_elsewhere():
    given = {each["name"]: each["value"] for each in VALUES["env"]}
    elsewhere = environment(Settings.load(config("gke", "airflow-settings") | {"NEUROLOOP_STORE_URL": ""}))
    outside = {
        name: value for name, value in elsewhere.items() if not name.startswith(("AIRFLOW", PREFIX, "STREAMLIT"))
    }
    assert given == outside
    core = VALUES["config"]["core"]
    assert core["execution_api_server_url"] == elsewhere["AIRFLOW__CORE__EXECUTION_API_SERVER_URL"]
    assert core["dags_are_paused_at_creation"] == elsewhere["AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION"]


@each_environment
def test_airflow_is_linked_to_where_the_chart_publishes_it(name: str):
    values = _merged(VALUES, yaml.safe_load((KUBERNETES / "overlays" / name / "airflow-values.yaml").read_text()))
    assert values["config"]["api"]["base_url"] == config(name, "settings")["NEUROLOOP_AIRFLOW_URL"]
    if name != "local":
        assert values["ingress"]["apiServer"]["hosts"][0]["tls"]["enabled"]
        host = urlsplit(config(name, "settings")["NEUROLOOP_AIRFLOW_URL"]).hostname
        assert values["ingress"]["apiServer"]["hosts"][0]["name"] == host


def test_every_part_of_airflow_has_limits_in_units():
    parts = (
        "scheduler",
        "dagProcessor",
        "triggerer",
        "apiServer",
        "workers",
        "migrateDatabaseJob",
        "cleanup",
        "statsd",
    )
    for part in parts:
        for which in ("requests", "limits"):
            assert QUANTITY.fullmatch(VALUES[part]["resources"][which]["memory"]), part


def test_airflows_figures_have_the_names_that_they_have_in_compose():
    elsewhere = environment(Settings(statsd_url="statsd://airflow-statsd:9125"))
    for name, value in VALUES["config"]["metrics"].items():
        assert elsewhere[f"AIRFLOW__METRICS__{name.upper()}"] == value
    mapping = yaml.safe_load((DEPLOY / "monitoring" / "statsd-mapping.yml").read_text())
    assert VALUES["statsd"]["overrideMappings"] == mapping["mappings"]


def test_the_dag_processor_reports_a_killed_task_as_its_own_pod_would():
    given, workers = ({each["name"]: each for each in VALUES[part]["env"]} for part in ("dagProcessor", "workers"))
    wanted = ("DATABASE_URL", "MLFLOW_USER", "MLFLOW_PASSWORD", "NOTIFY_URL")  # what `loop.failures.report` uses
    assert given == {PREFIX + name: workers[PREFIX + name] for name in wanted}
    reached = VALUES["labels"] | VALUES["dagProcessor"]["labels"]
    assert {f"neuroloop.io/reaches-{what}" for what in ("database", "mlflow", "mail")} <= set(reached)
    assert "neuroloop.io/reaches-store" not in reached


def test_the_pod_templates_lie_where_the_setting_says_and_run_as_the_other_tasks_do():
    settings = Settings(pod_templates=config("gke", "airflow-settings")["NEUROLOOP_POD_TEMPLATES"])
    for task, template in (("building_model", "training"), ("retrain_model", "training"), ("tidy", "housekeeping")):
        path = Path(settings.executor_config(task)["pod_template_file"])
        assert str(path.parent) == VALUES["scheduler"]["extraVolumeMounts"][0]["mountPath"]
        assert yaml.safe_load(config("gke", "airflow-pod-templates")[path.name]) == TASK_PODS[template]
    assert VALUES["scheduler"]["extraVolumes"][0]["configMap"]["name"] == "airflow-pod-templates"
    spec = TRAINING_POD["spec"]
    assert spec["serviceAccountName"] == VALUES["workers"]["serviceAccount"]["name"]
    home = {each["name"]: each.get("value") for each in spec["containers"][0]["env"]}["AIRFLOW_HOME"]
    assert home == VALUES["airflowHome"]
    assert spec["securityContext"] == VALUES["securityContexts"]["pod"]
    assert VALUES["workers"]["labels"].items() <= labels({"spec": {"template": TRAINING_POD}}).items()
    assert "NEUROLOOP_POD_TEMPLATES" not in config("local", "airflow-settings")


@each_environment
def test_argo_follows_the_overlay_and_the_chart_with_both_files_of_values(name: str):
    application = yaml.safe_load((DEPLOY / "argocd" / f"{name}.yaml").read_text())
    (chart,) = (source for source in application["spec"]["sources"] if "chart" in source)
    (path,) = (source["path"] for source in application["spec"]["sources"] if "path" in source)
    assert ROOT / path == KUBERNETES / "overlays" / name
    files = [ROOT / file.removeprefix("$values/") for file in chart["helm"]["valueFiles"]]
    assert files == [KUBERNETES / "airflow-values.yaml", KUBERNETES / "overlays" / name / "airflow-values.yaml"]
    assert all(file.is_file() for file in files)
    assert f"airflow {chart['targetRevision']};" in (KUBERNETES / "airflow-values.yaml").read_text()
    assert chart["helm"]["releaseName"] == "airflow"
    assert application["spec"]["destination"]["namespace"] == "neuroloop"


def test_there_is_one_application_for_each_environment():
    assert {file.stem for file in (DEPLOY / "argocd").glob("*.yaml")} == set(ENVIRONMENTS)
    assert {folder.name for folder in (KUBERNETES / "overlays").iterdir()} == set(ENVIRONMENTS)


def _merged(below: Any, above: Any) -> Any:
    """Values as Helm lays one file on another."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return below | {key: _merged(below.get(key), value) for key, value in above.items()}


def _selects(selector: dict[str, Any], found: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {})
    return wanted.items() <= found.items() and all(
        found.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", ())
    )


def _allowed(name: str, direction: str, pod_labels: dict[str, str], peer: dict[str, str], port: int) -> bool:
    """Whether a policy of this pod lets this traffic pass in this direction."""
    rules, peers = ("ingress", "from") if direction == "Ingress" else ("egress", "to")
    for policy in of_kind(name, "NetworkPolicy"):
        spec = policy["spec"]
        if direction not in spec["policyTypes"] or not _selects(spec["podSelector"], pod_labels):
            continue
        for rule in spec.get(rules, ()):
            ports = {each["port"] for each in rule.get("ports", ())}
            named = [each["podSelector"] for each in rule.get(peers, ()) if "podSelector" in each]
            if (not ports or port in ports) and any(_selects(selector, peer) for selector in named):
                return True
    return False
