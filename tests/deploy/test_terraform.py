"""Terraform's modules: read as text everywhere, validated and applied to a mocked provider where there is one."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import hcl2
import pytest
import yaml

from neuroloop.core import keys

ROOT = Path(__file__).parents[2]
TERRAFORM = ROOT / "deploy" / "terraform"
CLOUDS = {"gcp": "gke", "aws": "eks", "azure": "aks"}
MODULES = [TERRAFORM / "modules" / name for name in (*CLOUDS, "rights")]
ENVIRONMENTS = [TERRAFORM / "environments" / name for name in CLOUDS]
FOLDERS = [*MODULES, *ENVIRONMENTS]
PLUGIN_FOLDERS = (
    Path(os.environ.get("TF_PLUGIN_DIR") or "/none"),
    Path.home() / ".terraform.d" / "plugins",
    *(Path(folder) for folder in ("/usr/local/share/terraform/plugins", "/usr/share/terraform/plugins")),
    *sorted(Path("/opt").glob("*")),
)
"""Where Terraform looks for providers by itself, and where images of machines put them."""
each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: "/".join(folder.parts[-2:]))


@cache
def source(folder: Path) -> str:
    """All of a folder's configuration, without comments."""
    text = "\n".join(path.read_text() for path in sorted(folder.glob("*.tf")))
    return re.sub(r"(^|\s)#.*", "", text)


@cache
def blocks(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The parsed blocks by their kind."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.tf")):
        for kind, parsed in _plain(hcl2.loads(path.read_text())).items():
            found.setdefault(kind, []).extend(parsed)
    return found


def _plain(value: Any) -> Any:
    """Names and texts without the quotes that the parser leaves on them."""
    if isinstance(value, dict):
        return {str(name).strip('"'): _plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value.strip('"') if isinstance(value, str) else value


def named(folder: Path, kind: str) -> dict[str, dict[str, Any]]:
    """Blocks with one label, such as variables, by that."""
    return {name: body for block in blocks(folder).get(kind, []) for name, body in block.items() if name[:2] != "__"}


def resources(folder: Path) -> set[str]:
    return {
        f"{kind}.{name}"
        for block in blocks(folder).get("resource", [])
        for kind, body in block.items()
        if kind[:2] != "__"
        for name in body
    }


def pins(folder: Path) -> tuple[str, dict[str, dict[str, str]]]:
    """The version of Terraform, and the providers with theirs."""
    (block,) = (each for each in blocks(folder)["terraform"] if "required_version" in each)
    (providers,) = block["required_providers"]
    return block["required_version"], {name: body for name, body in providers.items() if name[:2] != "__"}


def rights() -> dict[str, dict[str, list[str]]]:
    """The table of modules/rights."""
    table: dict[str, dict[str, list[str]]] = blocks(MODULES[-1])["locals"][0]["rights"]
    return table


@each_folder
def test_every_variable_is_typed_described_and_used_and_every_output_described(folder: Path):
    for name, body in named(folder, "variable").items():
        assert body.get("type"), name
        assert len(body.get("description", "")) > 10, name
        assert re.search(rf"\bvar\.{name}\b", re.sub(rf'variable "{name}" \{{.*?\n\}}', "", source(folder), flags=re.S))
    for name, body in named(folder, "output").items():
        assert len(body.get("description", "")) > 5, name


@each_folder
def test_whatever_is_named_is_declared(folder: Path):
    text = source(folder)
    provider = r"(?:aws|google|azurerm)_[a-z0-9_]+\.[a-z][a-z0-9_]*"
    assert set(re.findall(rf"(?<![\w.\"/]){provider}", text)) <= resources(folder)
    assert set(re.findall(r"\bvar\.(\w+)", text)) == set(named(folder, "variable"))
    local = {name for block in blocks(folder).get("locals", []) for name in block if name[:2] != "__"}
    assert set(re.findall(r"\blocal\.(\w+)", text)) == local
    assert set(re.findall(r"\bmodule\.(\w+)", text)) == set(named(folder, "module"))


@pytest.mark.parametrize("folder", ENVIRONMENTS, ids=lambda folder: folder.name)
def test_an_environment_gives_its_module_what_it_takes_and_all_that_it_needs(folder: Path):
    call = {name for name in named(folder, "module")["platform"] if name[:2] != "__"} - {"source"}
    taken = named(TERRAFORM / "modules" / folder.name, "variable")
    assert call <= set(taken)
    assert {name for name, body in taken.items() if "default" not in body} <= call
    assert re.search(r'backend "(s3|gcs|azurerm)"', source(folder)), "the state is remote"


@pytest.mark.parametrize("folder", ENVIRONMENTS, ids=lambda folder: folder.name)
def test_the_readme_names_what_an_environment_cannot_do_without(folder: Path):
    text = (TERRAFORM / "README.md").read_text()
    (row,) = re.findall(rf"^\| {folder.name} \|.*$", text, re.MULTILINE)
    for name, body in named(folder, "variable").items():
        assert "default" in body or re.search(rf"`(TF_VAR_)?{name}`", row), name
    assert "api_from" in text


@pytest.mark.parametrize("folder", [*MODULES[:-1], *ENVIRONMENTS], ids=lambda folder: "/".join(folder.parts[-2:]))
def test_terraform_and_its_provider_are_pinned_alike_in_module_and_environment(folder: Path):
    assert pins(folder) == pins(TERRAFORM / "environments" / folder.name)
    required, providers = pins(folder)
    assert required == ">= 1.11, < 2.0"
    assert [re.fullmatch(r"~> \d+\.\d+", each["version"]) is not None for each in providers.values()] == [True]


@each_folder
def test_no_secret_stands_in_the_configuration_or_gets_into_the_state(folder: Path):
    for name, value in re.findall(r"^\s*(\w*(?:password|secret|token)\w*)\s*=\s*(.+)$", source(folder), re.M):
        assert value in ("true", "var.database_superuser", "var.superuser_version", '"required"'), name
    for name, body in named(folder, "variable").items():
        if "superuser" in name and "version" not in name:
            assert (body["ephemeral"], body["sensitive"]) == (True, True)


# --- rights -------------------------------------------------------------------------------------


def test_every_prefix_of_the_rights_is_one_of_the_store():
    made = [
        *(keys.prediction("glioma", "x"), keys.correction("glioma", "x"), keys.invalid("x"), keys.snapshot("v")),
        *(keys.batch(1), keys.run("r", "x"), keys.mail("x"), keys.image("ab" * 16), "mlflow/1/x", keys.task_log("x")),
    ]
    prefixes = {prefix for granted in rights().values() for prefix in granted}
    for prefix in prefixes:
        assert prefix.endswith("/") or prefix == keys.EVERYTHING
        assert any(key.startswith(prefix) for key in made), prefix


def test_all_of_the_store_is_read_by_the_backup_alone_which_changes_nothing_in_it():
    assert rights()["backup"] == {keys.EVERYTHING: ["list", "read"]}
    assert [who for who, granted in rights().items() if keys.EVERYTHING in granted] == ["backup"]


def test_the_api_reaches_no_model_and_the_trainer_no_log():
    table = rights()
    assert not any(prefix.startswith("mlflow/") for prefix in table["api"])
    assert not [prefix for prefix in table["trainer"] if keys.prediction("glioma", "x").startswith(prefix)]
    assert not [prefix for prefix in table["trainer"] if keys.invalid("x").startswith(prefix)]
    assert table["trainer"][keys.CORRECTIONS] == ["list", "read"]
    assert set(table["mlflow"]) == {"mlflow/"}


@pytest.mark.skipif(
    importlib.util.find_spec("neuroloop.core.rights") is None, reason="this version has no table of rights of its own"
)
def test_the_rights_are_those_that_the_stores_know():
    known = importlib.import_module("neuroloop.core.rights").RIGHTS
    table = rights()
    # In Kubernetes there is a mail server, and the logs of tasks go to the cluster's own service.
    assert set(table) == {str(identity) for identity in known} - {"mail", "airflow"}
    for identity, granted in known.items():
        if str(identity) in table:
            assert table[str(identity)] == {
                prefix: [str(right) for right in rights_of] for prefix, rights_of in granted.items()
            }


@pytest.mark.parametrize(("cloud", "overlay"), CLOUDS.items())
def test_each_identity_belongs_to_a_service_account_of_the_overlay(cloud: str, overlay: str):
    text = (ROOT / "deploy" / "kubernetes" / "overlays" / overlay / "identities.yaml").read_text()
    accounts = {each["metadata"]["name"] for each in yaml.safe_load_all(text) if each["kind"] == "ServiceAccount"}
    assert accounts == set(rights())
    assert f"environments/{cloud}." in text


# --- nodes --------------------------------------------------------------------------------------

MACHINES = {
    "e2-standard-4": (4, 16),
    "g2-standard-8": (8, 32),
    "m7i.xlarge": (4, 16),
    "g6.xlarge": (4, 16),
    "Standard_D4s_v5": (4, 16),
    "Standard_NC4as_T4_v3": (4, 28),
}
"""vCPU and GiB of the default types of nodes."""


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("template", ["base", "components/gpu"])
def test_a_pod_that_trains_finds_room_on_a_node_of_the_default_type(cloud: str, template: str):
    pod = yaml.safe_load((ROOT / "deploy" / "kubernetes" / template / "training.yaml").read_text())
    asked = pod["spec"]["containers"][0]["resources"]["requests"]
    variables = named(TERRAFORM / "modules" / cloud, "variable")
    for pool in ("nodes", "gpu_nodes"):
        node = variables[pool]["default"]
        cores, memory = MACHINES[node.get("type") or node["size"]]
        # A node keeps up to 0.2 cores and 3 GiB for itself, and the cluster's DaemonSets ask for half a core and 1 GiB.
        assert float(asked["cpu"]) <= cores - 0.7
        assert int(asked["memory"].removesuffix("Gi")) <= memory - 4


# --- terraform itself ---------------------------------------------------------------------------


def terraform(*argv: str, folder: Path, data: Path | None = None) -> subprocess.CompletedProcess[str]:
    """One command, without the network and without whatever this machine has configured."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
    environ |= {"CHECKPOINT_DISABLE": "1", "TF_IN_AUTOMATION": "1"} | ({"TF_DATA_DIR": str(data)} if data else {})
    return subprocess.run(
        ["terraform", *argv, "-no-color"] if argv[0] != "fmt" else ["terraform", *argv],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )


needs_terraform = pytest.mark.skipif(shutil.which("terraform") is None, reason="terraform is not installed")


@needs_terraform
def test_the_configuration_is_formatted():
    done = terraform("fmt", "-check", "-recursive", "-diff", folder=TERRAFORM)
    assert done.returncode == 0, done.stdout + done.stderr


def _plugins(provider: str) -> Path | None:
    for folder in PLUGIN_FOLDERS:
        if any(folder.glob(f"*/hashicorp/{provider}/*")):
            return folder
    return None


@needs_terraform
@pytest.mark.parametrize("cloud", CLOUDS)
def test_an_environment_is_valid_and_its_tests_pass_with_a_mocked_provider(cloud: str, tmp_path: Path):
    provider = {"gcp": "google", "azure": "azurerm"}.get(cloud, cloud)
    plugins = _plugins(provider)
    if plugins is None:
        pytest.skip(f"the provider {provider} is in no plugin folder (TF_PLUGIN_DIR names one)")
    shutil.copytree(TERRAFORM, tmp_path / "terraform", ignore=shutil.ignore_patterns(".terraform*"))
    folder, data = tmp_path / "terraform" / "environments" / cloud, tmp_path / "data"
    init = ("init", "-backend=false", "-input=false", f"-plugin-dir={plugins}")
    for argv in (init, ("validate",), ("test",)):
        done = terraform(*argv, folder=folder, data=data)
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    if (folder / "tests").is_dir():
        assert re.search(r"[1-9]\d* passed, 0 failed", done.stdout), json.dumps(done.stdout)
