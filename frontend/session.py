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

    `frame` is the slice of it that a reader chose, from 1; None leaves the choice to the platform. `frames` is how many
    it has, as far as an answer has said. `consent` is what was ticked when it was chosen. A `recorded` one is not sent:
    it is the id of a prediction that is opened again.
    """

    data: bytes
    name: str
    media_type: str
    simulated: str = ""
    frame: int | None = None
    frames: int = 1
    consent: str = "record"
    recorded: str = ""
    choice: str = field(default_factory=lambda: uuid4().hex)

    @property
    def key(self) -> str:
        """Content and act of choosing: the same file chosen again is a new request with a new outcome."""
        return f"{hashlib.sha256(self.data).hexdigest()}-{self.choice}"


@dataclass(frozen=True)
class Outcome:
    """What came of one upload: an answer, or a problem in words.

    `history` is what happened to a prediction, in words, where it was opened again. `simulated` says of a simulated
    scan what it shows; it is empty for any other.
    """

    upload_key: str
    answer: Answer | None = None
    problem: ApiProblem | None = None
    history: tuple[str, ...] = ()
    simulated: str = ""

    @property
    def seen(self) -> Answer | ApiProblem | None:
        """What tells how many slices the file has, and which was looked at: an answer, or the gate's refusal."""
        return self.answer or (self.problem if self.problem is not None and self.problem.gate is not None else None)


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
