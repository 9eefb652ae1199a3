"""What one browser session holds: the chosen scan and the outcome that belongs to exactly this choice."""

import hashlib
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from api_client import Answer, ApiProblem


@dataclass(frozen=True)
class Upload:
    """A chosen scan. `simulated` says in words what a sample shows; it is empty for a reader's own file.

    `frame` is the slice of it that a reader chose, from 1; None leaves the choice to the platform.
    """

    data: bytes
    name: str
    media_type: str
    simulated: str = ""
    frame: int | None = None
    choice: str = field(default_factory=lambda: uuid4().hex)

    @property
    def key(self) -> str:
        """Content and act of choosing: the same file chosen again is a new request with a new outcome."""
        return f"{hashlib.sha256(self.data).hexdigest()}-{self.choice}"


@dataclass(frozen=True)
class Outcome:
    """What came of one upload: an answer, or a problem in words."""

    upload_key: str
    answer: Answer | None = None
    problem: ApiProblem | None = None


def choose(state: MutableMapping[Any, Any], upload: Upload | None) -> None:
    """Make `upload` the current one (None: nothing is chosen); what the one before left is dropped."""
    state["upload"] = upload
    state["outcome"] = None


def current_upload(state: MutableMapping[Any, Any]) -> Upload | None:
    """The scan chosen last."""
    upload: Upload | None = state.get("upload")
    return upload


def outcome_of(state: MutableMapping[Any, Any], upload: Upload) -> Outcome | None:
    """The outcome of exactly this upload, None while there is none; another upload's is never returned."""
    outcome: Outcome | None = state.get("outcome")
    return outcome if outcome is not None and outcome.upload_key == upload.key else None
