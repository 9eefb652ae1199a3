"""The policies of deploy/identities: that they are what the rights say, and that Amazon's are enforced (by moto)."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from neuroloop.adapters.folder import FolderStore
from neuroloop.core import keys
from neuroloop.core.errors import Forbidden, NotFound
from neuroloop.core.rights import PROCESSES, RIGHTS, Identity, Right, allowed
from neuroloop.records.backup import backup

FOLDER = Path(__file__).parents[2] / "deploy" / "identities"
DOCS = (Path(__file__).parents[2] / "docs" / "stores.md").read_text()
PREFIXES = (
    *(keys.PREDICTIONS, keys.INVALID, keys.CORRECTIONS, keys.BATCHES, keys.VERSIONS, keys.HISTORY),
    *(f"{keys.DVC_REMOTE}/", keys.RUNS, keys.MODELS, keys.MAIL, "elsewhere/"),
)


@pytest.fixture(scope="module")
def render():
    spec = importlib.util.spec_from_file_location("render", FOLDER / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_are_what_the_rights_make_of_them(render):
    made = dict(render.documents())
    lying = {path.relative_to(FOLDER).as_posix(): path.read_text() for path in FOLDER.rglob("*.json")}
    assert lying == made, "run deploy/identities/render.py"


def test_the_documentation_has_the_same_table():
    shown = {Right.LIST: "list", Right.READ: "read", Right.WRITE: "write", Right.DELETE: "delete"}
    for identity, rights in RIGHTS.items():
        assert identity in PROCESSES
        for prefix, granted in rights.items():
            assert f"| {identity} | `{prefix or '/'}` | {', '.join(shown[right] for right in granted)} |" in DOCS
    rows = re.findall(r"^\| \w+ \| `[\w/-]*/` \|", DOCS, re.MULTILINE)
    assert len(rows) == sum(map(len, RIGHTS.values()))


def test_listings_are_limited_to_the_prefixes_that_an_identity_needs():
    for identity in Identity:
        policy = json.loads((FOLDER / "aws" / f"{identity}.json").read_text())
        (listing,) = [one for one in policy["Statement"] if one["Action"] == ["s3:ListBucket"]]
        if "Condition" not in listing:
            assert identity is Identity.BACKUP
            continue
        (patterns,) = listing["Condition"]["StringLike"].values()
        for prefix in (*PREFIXES, keys.PROBE, ""):
            granted = any(prefix.startswith(pattern.removesuffix("*")) for pattern in patterns)
            assert granted == allowed(identity, Right.LIST, prefix), (identity, prefix)


@pytest.mark.parametrize("cloud", ["gcs", "azure"])
def test_the_conditions_of_google_and_azure_name_the_same_prefixes(cloud: str, render):
    for identity in Identity:
        for right in Right:
            found = google(identity, right) if cloud == "gcs" else microsoft(identity, right, render)
            for prefix in (*PREFIXES, keys.PROBE):
                granted = any(prefix.startswith(start) for start in found)
                assert granted == allowed(identity, right, prefix), (identity, right, prefix)


def google(identity: Identity, right: Right) -> list[str]:
    """The prefixes of the binding of this right."""
    bindings = json.loads((FOLDER / "gcs" / "policy.json").read_text())["bindings"]
    member = [f"serviceAccount:neuroloop-{identity}@${{project}}.iam.gserviceaccount.com"]
    mine = [one for one in bindings if one["members"] == member and one["role"].endswith(f"Store{right.title()}")]
    named = re.findall(r"startsWith\('(.*?)'\)", mine[0]["condition"]["expression"]) if mine else []
    return [name.removeprefix("projects/_/buckets/${bucket}/objects/") for name in named]


def microsoft(identity: Identity, right: Right, render) -> list[str]:
    """The prefixes of the clause about this right; a role without its action has no clause."""
    document = json.loads((FOLDER / "azure" / f"{identity}.json").read_text())
    if not document["condition"]:
        assert document["role"]["DataActions"] == list(render.cloud.AZURE.actions[Right.READ])
        return [""] if right in (Right.LIST, Right.READ) else []
    for clause in document["condition"].split("\nAND\n"):
        head, _, tests = clause.partition(") OR (")
        is_list = "AND SubOperationMatches" in head
        about = {Right.LIST: is_list, Right.READ: "blobs/read" in head and not is_list}
        about |= {Right.WRITE: "blobs/write" in head, Right.DELETE: "blobs/delete" in head}
        if about[right]:
            assert any(action in document["role"]["DataActions"] for action in render.cloud.AZURE.actions[right])
            return re.findall(r"StringStartsWith '(.*?)'", tests)
    # Nothing limits an action that no clause is about.
    assert not set(render.cloud.AZURE.actions[right]) & set(document["role"]["DataActions"]), (identity, right)
    return []


# --- enforced -----------------------------------------------------------------------------------


@pytest.mark.parametrize("identity", list(Identity))
def test_an_identity_may_do_what_its_rights_say_and_nothing_else(identity: Identity, s3_identities):
    with s3_identities.acting("owner") as owner:
        for prefix in PREFIXES:
            owner.put(f"{prefix}there", b"x")
    with s3_identities.acting(identity) as store:
        store.check()
        for prefix in PREFIXES:
            calls = {
                Right.READ: lambda prefix=prefix: store.get(f"{prefix}there"),
                Right.WRITE: lambda prefix=prefix: store.put(f"{prefix}new", b"x"),
                Right.DELETE: lambda prefix=prefix: store.delete(f"{prefix}there"),
            }
            for right, call in calls.items():
                if allowed(identity, right, prefix):
                    call()
                else:
                    with pytest.raises(Forbidden, match=f"lacks the right to {right} '{prefix}"):
                        call()


@pytest.mark.parametrize("key", ["mlflow/1/abc/artifacts/bundle.onnx", "runs/run-1/bundle.zip"])
def test_the_api_cannot_write_models_and_is_told_which_right_it_lacks(key: str, s3_identities):
    with s3_identities.acting(Identity.API) as store:
        for write in (store.put, store.create):
            with pytest.raises(Forbidden) as caught:
                write(key, b"a model that nobody trained")
    assert f"lacks the right to write '{key}'" in str(caught.value)
    assert "grant it s3:PutObject" in str(caught.value)
    with s3_identities.acting("owner") as owner:
        assert not owner.exists(key)


@pytest.mark.parametrize("prefix", [keys.PREDICTIONS + "glioma/", keys.INVALID])
def test_the_trainer_cannot_read_what_was_uploaded(prefix: str, s3_identities):
    with s3_identities.acting("owner") as owner:
        owner.put(f"{prefix}scan.png", b"a scan")
    with s3_identities.acting(Identity.TRAINER) as store:
        for read in (store.get, store.exists, store.modified):
            with pytest.raises(Forbidden, match=r"lacks the right to read 'InferenceLogs/.*grant it s3:GetObject"):
                read(f"{prefix}scan.png")


def test_a_backup_reads_all_of_a_store_and_changes_nothing(s3_identities, tmp_path):
    with s3_identities.acting("owner") as owner:
        for prefix in PREFIXES:
            owner.put(f"{prefix}kept", prefix.encode())
    target = FolderStore(str(tmp_path))
    with s3_identities.acting(Identity.BACKUP) as store:
        made = backup({}, store, target, say=print)
    assert {f"{prefix}kept" for prefix in PREFIXES} <= made.objects.keys()
    # Without a prefix, which no condition on one would let pass.
    assert None in s3_identities.server.listings(s3_identities.environments[Identity.BACKUP])


def test_what_is_not_there_is_not_found_also_where_it_could_not_be_read(s3_identities):
    with s3_identities.acting(Identity.TRAINER) as store:
        with pytest.raises(NotFound):
            store.get(f"{keys.PREDICTIONS}glioma/never-there.png")
        assert not store.exists(f"{keys.PREDICTIONS}glioma/never-there.png")
