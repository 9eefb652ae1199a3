"""Which corrected images are still waiting for a retraining."""

import json
from collections.abc import Iterable


def unused(corrections: Iterable[str], batches: Iterable[bytes]) -> list[str]:
    """Keys of `corrections` that no batch manifest names, sorted.

    A correction is known by its file name (the prediction's id): a reader who later moves it to another class does
    not make it new.
    """
    used = {_name(key) for batch in batches for key in json.loads(batch)["corrections"]}
    return sorted(key for key in corrections if _name(key) not in used)


def _name(key: str) -> str:
    return key.rsplit("/", 1)[-1]
