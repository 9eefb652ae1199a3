"""Every path in the object store is made here.

```
data/dvc/files/md5/ab/cdef...                             images, in DVC's own remote layout
data/versions/<version>/...                               snapshot.json, split.json, statistics.json, data.dvc, ...
data/split-registry/000001.json                           which part an image has, for ever; each created once
data/history/000001.json                                  the data versions in the order in which they were accepted
data/test-openings/<run>-001.json                         each opening of a test part, created once
runs/<run>/...                                            hand-off between the tasks of one pipeline run
retraining/batches/000001.json                            corrections used by a retraining, created once
InferenceLogs/ImageLogs/<class>/<id>.png
InferenceLogs/ImageLogsWithFeedback/<class>/<id>.png
InferenceLogs/ImageLogsForInvalidImages/<id>.png
logs/airflow/<dag>/<run>/<task>/attempt=1.log             what a task on a worker said
mail/<time>-<id>.eml                                      the local sink's mails
mlflow/...                                                MLflow's own: runs and models
probe/                                                    always empty
```
"""

import re

from neuroloop.core.errors import NeuroLoopError
from neuroloop.core.schemas import LABELS

DATA = "data/"
DVC_REMOTE = "data/dvc"
VERSIONS = "data/versions/"
LATEST_AUDIT = "data/versions/latest-audit"
SPLIT_REGISTRY = "data/split-registry/"
FIRST_REGISTRY = "data/split-registry.json"
"""Where the parts stood, as one object, before their registry became a log; still read."""
HISTORY = "data/history/"
TEST_OPENINGS = "data/test-openings/"
RUNS = "runs/"
BATCHES = "retraining/batches/"
CORRECTIONS = "InferenceLogs/ImageLogsWithFeedback/"
PREDICTIONS = "InferenceLogs/ImageLogs/"
INVALID = "InferenceLogs/ImageLogsForInvalidImages/"
MAIL = "mail/"
MODELS = "mlflow/"
TASK_LOGS = "logs/airflow/"
EVERYTHING = ""
PROBE = "probe/"
"""Nothing lies here. Every process may list it, whatever else it may: that is how it sees that the store is there."""

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")


def _safe(part: str) -> str:
    if not _SAFE.fullmatch(part):
        raise NeuroLoopError(
            f"{part!r} cannot be part of an object key", why="it has characters outside A-Za-z0-9._+=-"
        )
    return part


def _label(label: str) -> str:
    if label not in LABELS:
        raise NeuroLoopError(f"{label!r} is no class", why=f"the classes are {', '.join(LABELS)}")
    return label


def checked(key: str) -> str:
    """`key` itself; raises `NeuroLoopError` unless it is relative, without NUL and empty, `.` or `..` parts."""
    if "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise NeuroLoopError(f"{key!r} is no object key", why="a key is relative, without empty, `.` or `..` parts")
    return key


def safe_run_id(run_id: str) -> str:
    """A pipeline run's id as one path part; Airflow's `manual__2026-01-01T00:00:00+00:00` has colons."""
    return re.sub(r"[^A-Za-z0-9._+=-]", "-", run_id)


def image(md5: str) -> str:
    """A snapshot image, where `dvc push` puts it."""
    return f"{DVC_REMOTE}/files/md5/{_safe(md5[:2])}/{_safe(md5[2:])}"


def snapshot(version: str) -> str:
    """The list of images of a data version."""
    return f"{VERSIONS}{_safe(version)}/snapshot.json"


def data_dvc(version: str) -> str:
    """The `data.dvc` file with which `dvc pull` restores a data version."""
    return f"{VERSIONS}{_safe(version)}/data.dvc"


def split(version: str) -> str:
    """The grouped split of a data version."""
    return f"{VERSIONS}{_safe(version)}/split.json"


def legacy_split(version: str) -> str:
    """The split of a data version that has the test part of its source."""
    return f"{VERSIONS}{_safe(version)}/legacy-split.json"


def audit(version: str) -> str:
    """What the audit of a data version found, for programs."""
    return f"{VERSIONS}{_safe(version)}/audit.json"


def audit_page(version: str) -> str:
    """The same as a page for people."""
    return f"{VERSIONS}{_safe(version)}/audit.html"


def statistics(version: str) -> str:
    """What the training images of a data version look like."""
    return f"{VERSIONS}{_safe(version)}/statistics.json"


def split_decisions(number: int) -> str:
    """The n-th addition to the registry of parts."""
    return f"{SPLIT_REGISTRY}{number:06d}.json"


def next_number(found: list[str]) -> int:
    """The number that follows the last of the sorted keys of numbered objects; 1 where there are none."""
    return int(found[-1].rsplit("/", 1)[-1].split(".")[0]) + 1 if found else 1


def accepted_version(number: int) -> str:
    """The n-th data version that was accepted."""
    return f"{HISTORY}{number:06d}.json"


def opening(run_id: str, number: int) -> str:
    """The n-th time that a run opened its test part."""
    return f"{TEST_OPENINGS}{_safe(safe_run_id(run_id))}-{number:03d}.json"


def run(run_id: str, name: str) -> str:
    """A hand-off object between the tasks of one pipeline run."""
    return f"{RUNS}{_safe(safe_run_id(run_id))}/{'/'.join(_safe(part) for part in name.split('/'))}"


def batch(number: int) -> str:
    """The manifest of the n-th retraining batch."""
    return f"{BATCHES}{number:06d}.json"


def prediction(label: str, prediction_id: str) -> str:
    """An accepted upload, under the class the model gave it."""
    return f"{PREDICTIONS}{_label(label)}/{_safe(prediction_id)}.png"


def correction(label: str, prediction_id: str) -> str:
    """A corrected upload, under the class a reader gave it."""
    return f"{CORRECTIONS}{_label(label)}/{_safe(prediction_id)}.png"


def invalid(prediction_id: str) -> str:
    """An upload that the gate refused."""
    return f"{INVALID}{_safe(prediction_id)}.png"


def images_of(prediction_id: str) -> tuple[str, ...]:
    """Every key under which an image of this prediction may lie."""
    placed = [make(label, prediction_id) for make in (prediction, correction) for label in LABELS]
    return (*placed, invalid(prediction_id))


def mail(name: str) -> str:
    """A mail kept by the local sink."""
    return f"{MAIL}{_safe(name)}.eml"


def task_log(path: str) -> str:
    """The log of one attempt of a task; `path` is Airflow's own, relative to its folder of logs."""
    return checked(f"{TASK_LOGS}{path}")
