"""Who may do what in the object store: each process runs as an identity that has the rights it needs and no more.

`deploy/identities/` holds the same as policies of each cloud, written by its `render.py`; docs/stores.md says what is
enforced where. A folder store knows one user and enforces nothing of it.
"""

from collections.abc import Mapping
from enum import StrEnum

from neuroloop.core import keys


class Right(StrEnum):
    """What can be done below a prefix. Writing may replace; reading includes asking whether there is an object."""

    LIST = "list"
    READ = "read"
    WRITE = "write"
    DELETE = "delete"


class Identity(StrEnum):
    """As whom a process comes to the store."""

    API = "api"
    TRAINER = "trainer"
    MLFLOW = "mlflow"
    HOUSEKEEPER = "housekeeper"
    MAIL = "mail"
    BACKUP = "backup"
    AIRFLOW = "airflow"


PROCESSES: Mapping[Identity, str] = {
    Identity.API: "the role `api`: takes uploads and verdicts, erases them on request",
    Identity.TRAINER: "Airflow's tasks of `data_and_model_build` and `model_retraining`",
    Identity.MLFLOW: "the role `mlflow`: keeps the models",
    Identity.HOUSEKEEPER: "`housekeeping`, or `neuroloop sweep`",
    Identity.MAIL: "the role `mail`, where there is no mail server",
    Identity.AIRFLOW: "the role `airflow-api` beside workers: shows the logs of their tasks",
    Identity.BACKUP: "`neuroloop backup`, where it has an identity of its own; a restore comes as the store's owner",
}

_L, _R, _W, _D = Right.LIST, Right.READ, Right.WRITE, Right.DELETE

RIGHTS: Mapping[Identity, Mapping[str, tuple[Right, ...]]] = {
    Identity.API: {
        keys.PREDICTIONS: (_R, _W, _D),
        keys.INVALID: (_R, _W, _D),
        keys.CORRECTIONS: (_L, _R, _W, _D),
        keys.BATCHES: (_L, _R),  # how many corrections wait
        keys.VERSIONS: (_R,),  # the audit's pages
        keys.MAIL: (_L, _R),
    },
    Identity.TRAINER: {
        keys.DATA: (_L, _R, _W),
        keys.RUNS: (_L, _R, _W, _D),
        keys.BATCHES: (_L, _R, _W),
        keys.CORRECTIONS: (_L, _R),
        keys.TASK_LOGS: (_W,),
    },
    Identity.MLFLOW: {keys.MODELS: (_L, _R, _W, _D)},
    Identity.HOUSEKEEPER: {
        keys.PREDICTIONS: (_L, _R, _D),
        keys.INVALID: (_L, _R, _D),
        keys.CORRECTIONS: (_L, _R, _W, _D),
        keys.RUNS: (_L, _R, _D),  # what broken-off trainings left of uploads
        keys.TASK_LOGS: (_W,),
    },
    Identity.MAIL: {keys.MAIL: (_L, _W)},  # listed to know a mail that was sent again
    Identity.BACKUP: {keys.EVERYTHING: (_L, _R)},
    Identity.AIRFLOW: {keys.TASK_LOGS: (_R,)},
}


def allowed(identity: Identity, right: Right, key: str) -> bool:
    """Whether an identity has a right on a key; all may list where nothing lies, to see that the store is there."""
    if right is Right.LIST and key.startswith(keys.PROBE):
        return True
    return any(key.startswith(prefix) and right in rights for prefix, rights in RIGHTS[identity].items())
