#!/usr/bin/env python3
"""Writes the policies of this folder from `neuroloop/core/rights.py`; a test compares them with what it would write.

    deploy/identities/render.py

`${bucket}` and `${project}` stay as they are: Terraform's `templatefile` or `envsubst` fills them in.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "src"))

from neuroloop.adapters import cloud, gcs  # noqa: E402
from neuroloop.core import keys  # noqa: E402
from neuroloop.core.rights import PROCESSES, RIGHTS, Identity, Right  # noqa: E402

BLOBS = "Microsoft.Storage/storageAccounts/blobServices/containers/blobs"


def prefixes(identity: Identity, right: Right) -> list[str]:
    """Where an identity has a right, the probe included."""
    found = [prefix for prefix, rights in RIGHTS[identity].items() if right in rights]
    return [*found, keys.PROBE] if right is Right.LIST else found


def aws(identity: Identity) -> dict[str, Any]:
    """A policy of IAM, to be attached to the role (or user) of the identity."""
    statements = []
    for right in Right:
        where = prefixes(identity, right)
        if not where:
            continue
        statement = {"Sid": right.title(), "Effect": "Allow", "Action": list(cloud.S3.actions[right])}
        if right is Right.LIST:
            statement["Resource"] = ["arn:aws:s3:::${bucket}"]
            if keys.EVERYTHING not in where:  # who lists all names no prefix, and no pattern fits what is not there
                statement["Condition"] = {"StringLike": {"s3:prefix": [f"{prefix}*" for prefix in where]}}
        else:
            statement["Resource"] = [f"arn:aws:s3:::${{bucket}}/{prefix}*" for prefix in where]
        statements.append(statement)
    return {"Version": "2012-10-17", "Statement": statements}


def gcs_roles() -> dict[str, Any]:
    """The custom roles of Google Cloud's project: one a right."""
    return {_gcs_role(right): {"includedPermissions": list(gcs.ACTIONS[right])} for right in Right}


def gcs_policy() -> dict[str, Any]:
    """The IAM policy of the bucket, which wants uniform bucket-level access."""
    bindings = []
    for identity in Identity:
        for right in Right:
            tests = [_gcs_test(right, prefix) for prefix in prefixes(identity, right)]
            if tests:
                binding = {
                    "role": f"projects/${{project}}/roles/{_gcs_role(right)}",
                    "members": [f"serviceAccount:neuroloop-{identity}@${{project}}.iam.gserviceaccount.com"],
                    "condition": {"title": f"{identity} may {right}", "expression": " || ".join(tests)},
                }
                bindings.append(binding)
    return {"version": 3, "bindings": bindings}


def azure(identity: Identity) -> dict[str, Any]:
    """A role of one's own and the condition with which it is assigned to the identity, on the container."""
    rights = [right for right in Right if prefixes(identity, right)]
    actions = sorted({action for right in rights for action in cloud.AZURE.actions[right]})
    return {
        "role": {
            "Name": f"NeuroLoop {identity}",
            "Description": PROCESSES[identity],
            "Actions": [],
            "DataActions": actions,
        },
        "conditionVersion": "2.0",
        "condition": _azure_condition(actions, identity),  # empty: assigned without one
    }


def documents() -> Iterator[tuple[str, str]]:
    """Every file of this folder that is written, by its path in it."""
    for identity in Identity:
        yield f"aws/{identity}.json", _text(aws(identity))
        yield f"azure/{identity}.json", _text(azure(identity))
    yield "gcs/roles.json", _text(gcs_roles())
    yield "gcs/policy.json", _text(gcs_policy())


def _gcs_role(right: Right) -> str:
    return f"neuroloopStore{right.title()}"


def _gcs_test(right: Right, prefix: str) -> str:
    if right is Right.LIST:
        return f"api.getAttribute('storage.googleapis.com/objectListPrefix', '').startsWith('{prefix}')"
    return f"resource.name.startsWith('projects/_/buckets/${{bucket}}/objects/{prefix}')"


def _azure_clause(right: Right, where: list[str]) -> str:
    """Either it is another action, or the blob (of a listing: its prefix) begins with one of these."""
    if right is Right.LIST:
        concerned, named = f"ActionMatches{{'{BLOBS}/read'}} AND SubOperationMatches{{'Blob.List'}}", "@Request"
        named += f"[{BLOBS}:prefix]"
    else:
        concerned = " OR ".join(f"ActionMatches{{'{action}'}}" for action in cloud.AZURE.actions[right])
        if right is Right.READ:
            concerned += " AND NOT SubOperationMatches{'Blob.List'}"
        named = f"@Resource[{BLOBS}:path]"
    tests = " OR ".join(f"{named} StringStartsWith '{prefix}'" for prefix in where)
    return f"(!({concerned}) OR ({tests}))" if tests else f"(!({concerned}))"


def _azure_condition(actions: list[str], identity: Identity) -> str:
    """A clause for each right that an action opens: who may only list has the action that reads, too."""
    opened = [right for right in Right if set(cloud.AZURE.actions[right]) & set(actions)]
    where = {right: prefixes(identity, right) for right in opened}
    return "\nAND\n".join(_azure_clause(right, named) for right, named in where.items() if keys.EVERYTHING not in named)


def _text(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2) + "\n"


if __name__ == "__main__":
    for name, text in documents():
        (HERE / name).parent.mkdir(exist_ok=True)
        (HERE / name).write_text(text)
