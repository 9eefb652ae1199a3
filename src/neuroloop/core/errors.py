"""Errors that say what is wrong, why, and how to mend it.

Rejections (an image the gate refuses) are results, not errors; faults are these exceptions.
"""


class NeuroLoopError(Exception):
    """A fault with three parts in words; `str()` joins them into one line a person can act on."""

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what.rstrip("."), why.rstrip("."), fix.rstrip(".")
        super().__init__(". ".join(part for part in (self.what, self.why, self.fix) if part) + ".")


class InvalidSetting(NeuroLoopError):
    """A setting is missing, unknown or malformed."""


class InvalidImage(NeuroLoopError):
    """Bytes that cannot be read as an image within the limits."""


class UnsupportedImage(InvalidImage):
    """Bytes in no image format that is read here."""


class ImageTooLarge(InvalidImage):
    """The body or its pixels exceed the limits."""


class InvalidSource(NeuroLoopError):
    """A training source is missing, empty, malformed or out of reach."""


class InvalidBundle(NeuroLoopError):
    """A model bundle is damaged, incomplete or not what its hash says."""


class OutdatedBundle(InvalidBundle):
    """A sound bundle of another version of this program, which this one can neither serve nor compare."""


class NotFound(NeuroLoopError):
    """The named object, row, version or alias does not exist."""


class AlreadyExists(NeuroLoopError):
    """A create-once write found the key taken."""


class Unavailable(NeuroLoopError):
    """A store, database, registry or mail server is out of reach for now."""


class Busy(Unavailable):
    """The service itself cannot answer for now. Its words are for clients: they name nothing of the inside."""


class Forbidden(Unavailable):
    """The store refuses this process's identity: it lacks the right that the error names."""


class OutOfSpace(Unavailable):
    """A store or database has no room left for a write."""


class Uncertain(Unavailable):
    """The connection broke while a write was being confirmed: it may have happened or not."""


class Erased(NeuroLoopError):
    """What was named has been erased on purpose; only the mark of its erasure is left."""


def unknown_prediction(prediction_id: str) -> NotFound:
    """There is none, or none that the caller may know of: both in the same words."""
    return NotFound(f"there is no prediction {prediction_id!r}", fix="use the id of an answer, as it was given")


class KeyReused(NeuroLoopError):
    """An idempotency key came with another request than the one it was first used for."""


class NamesNobody(NeuroLoopError):
    """A request that acts in a person's name, with a key that speaks for others, says for whom in no way."""
