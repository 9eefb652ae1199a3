"""A bundle: the folder that holds everything one model version needs to be served, and nothing that runs code.

| file | what |
| --- | --- |
| `bundle.json` | the manifest: labels, image size, versions, calibration, metrics, sha256 of every other file |
| `model.onnx` | the network; outputs `logits`, `cam`, `features` |
| `gate.json`, `gate.onnx` | the input gate: what was measured, and its network |
| `statistics.json` | statistics of the training data, the reference for drift |
| `weights.npz` | weights for the warm start of a retraining; optional |
| `canary.npz` | images whose answers are known (`model.canary`), asked at every load; optional |
| `card.md`, `card.json` | the model card (`model.card`), for people and for machines; once the model is evaluated |

Needs ONNX Runtime, not TensorFlow.
"""

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from neuroloop.core.errors import InvalidBundle, OutdatedBundle
from neuroloop.core.schemas import LABELS, ArchitectureName, Record, SplitName, now
from neuroloop.imaging.canonical import CANONICAL_VERSION
from neuroloop.model.calibration import Calibration
from neuroloop.model.canary import Canary
from neuroloop.model.card import Card, as_markdown
from neuroloop.model.explanation import heat_map
from neuroloop.model.gate import FittedGate, Gate, InputGate
from neuroloop.model.onnx_session import open_session

Images = NDArray[np.uint8]
_Record = TypeVar("_Record", bound=Record)

MANIFEST, MODEL, STATISTICS, WEIGHTS = "bundle.json", "model.onnx", "statistics.json", "weights.npz"
GATE, GATE_MODEL = "gate.json", "gate.onnx"
CARD, CARD_DATA, CANARY = "card.md", "card.json", "canary.npz"
FORMAT = 4
BUNDLE_TAG = "bundle_sha256"
"""Tag of a registered version: the sha256 of its manifest."""
_REQUIRED, _OPTIONAL = {MODEL, GATE, GATE_MODEL, STATISTICS}, {WEIGHTS, CARD, CARD_DATA, CANARY}
_BATCH = 64  # images a forward pass; bounds the memory of a large set


class Manifest(Record):
    """What `bundle.json` says."""

    format: int = FORMAT
    labels: tuple[str, ...]
    image_size: int = Field(gt=0, description="Side of the canonical image, pixels")
    canonical_version: str = Field(description="Of the canonical form the model was trained on")
    architecture: ArchitectureName = Field(description="Of the network, for a retraining; see `model.architectures`")
    hyperparameters: dict[str, bool | int | float | str] = Field(
        default={}, description="What a person or a search chose for its training, for a retraining"
    )
    calibration: Calibration
    map_offset: tuple[float, float] = Field(
        description="How far the activation map lies beside what it speaks of: down, right, shares of the width; see "
        "`explanation.displacement`"
    )
    data_version: str
    split: SplitName = Field(description="Of the data; a model of the legacy split has seen twins of its test images")
    simulated: bool = Field(description="Trained on simulated scans")
    metrics: dict[str, float]
    created_at: datetime
    files: dict[str, str] = Field(description="name -> sha256 of the other files")


class RawOutputs(NamedTuple):
    """What the network says of n images, all float32."""

    logits: NDArray[np.float32]
    """(n, classes)"""
    cam: NDArray[np.float32]
    """(n, h, w, classes); its mean over h and w is `logits`"""
    features: NDArray[np.float32]
    """(n, f)"""


class Outputs(NamedTuple):
    """What a bundle says of n images; numbers are float32."""

    logits: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    """(n, classes), calibrated, rows sum to 1"""
    cam: NDArray[np.float32]
    features: NDArray[np.float32]
    sets: dict[str, NDArray[np.bool_]]
    """level ("0.90", "0.95") -> (n, classes): the conformal prediction set"""
    novelty: NDArray[np.float64]
    """(n,), from 0: how unlike the training images; beyond 1 more than 99 % of validation images (`gate`)"""
    refer: NDArray[np.bool_]
    """(n,): too uncertain or too novel to answer, a reader should look"""


class OnnxModel:
    """An exported network in ONNX Runtime on the CPU; may be used from several threads at once."""

    def __init__(self, onnx: bytes, *, threads: int = 1) -> None:
        """Load `onnx`; `threads` is the number of cores one call may use. Raises `InvalidBundle`."""
        self._session = open_session(onnx, "the network", threads=threads)
        outputs = tuple(output.name for output in self._session.get_outputs())
        inputs = [(value.name, len(value.shape)) for value in self._session.get_inputs()]
        if outputs != RawOutputs._fields or inputs != [("image", 4)]:
            raise InvalidBundle(
                "the network has other inputs or outputs than expected",
                why=f"it takes {inputs} and gives {outputs}; expected image -> {RawOutputs._fields}",
            )
        self.size = int(self._session.get_inputs()[0].shape[1])

    def run(self, images: Images) -> RawOutputs:
        """Forward pass of `images` uint8 (n, size, size), n >= 1. Raises `ValueError` on another shape or type."""
        if (
            images.dtype != np.uint8
            or images.ndim != 3
            or images.shape[1:] != (self.size, self.size)
            or not len(images)
        ):
            raise ValueError(f"expected uint8 (n, {self.size}, {self.size}), not {images.dtype} {images.shape}")
        parts = []
        for start in range(0, len(images), _BATCH):
            batch = images[start : start + _BATCH, :, :, None].astype(np.float32)
            parts.append(self._session.run(list(RawOutputs._fields), {"image": batch}))
        return RawOutputs(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def answers(self, images: Images) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits (n, classes) and features (n, f) of `images`, as `run` gives them."""
        raw = self.run(images)
        return raw.logits, raw.features


class Bundle:
    """A verified model version in memory. Immutable; `predict` may be called from several threads at once."""

    def __init__(self, manifest: Manifest, files: Mapping[str, bytes], sha256: str, *, threads: int = 1) -> None:
        """From verified parts; use `Bundle.load`."""
        self.manifest = manifest
        self.sha256 = sha256
        """Identity of the whole bundle: the hash of `bundle.json`, which holds the hashes of the rest."""
        self._files = files
        self.gate = InputGate(_parsed(Gate, files[GATE], GATE), files[GATE_MODEL], threads=threads)
        self.card = _parsed(Card, files[CARD_DATA], CARD_DATA) if CARD_DATA in files else None
        """The model card, None before the model was evaluated."""
        self._network = OnnxModel(files[MODEL], threads=threads)
        if self._network.size != manifest.image_size:
            raise InvalidBundle(
                "the network takes another image size than the manifest says",
                why=f"{self._network.size} is not {manifest.image_size}",
            )
        # One pass on an empty image: allocates, and shows that network, labels and gate fit together.
        empty = np.zeros((1, manifest.image_size, manifest.image_size), np.uint8)
        outputs = self._network.run(empty)
        classes = len(manifest.labels)
        if outputs.logits.shape != (1, classes) or outputs.cam.shape[0::3] != (1, classes):
            raise InvalidBundle(
                "the network has another number of classes than the manifest",
                why=f"its logits are {outputs.logits.shape} for {classes} labels",
            )
        ramp = np.linspace(0, 255, empty.size).reshape(empty.shape).astype(np.uint8)
        for said in (outputs, self._network.run(ramp)):
            if not all(np.isfinite(values).all() for values in said):
                raise InvalidBundle("the network answers with what is no number", fix="build the model again")
        try:
            self.gate.facts.novelty(outputs.features)
            gate_says = self.gate.scores(ramp)
        except ValueError as error:
            raise InvalidBundle("the gate does not fit the network", why=str(error)) from error
        if not np.isfinite(gate_says).all():
            raise InvalidBundle("the gate answers with what is no number", fix="build the model again")
        self.canary = Canary.from_bytes(files[CANARY]) if CANARY in files else None
        """Reference images, None in a bundle of before they were kept."""
        if self.canary is not None:
            if self.canary.images.shape[1:] != (self.image_size, self.image_size):
                raise InvalidBundle("the canaries have another size than the network takes")
            self.canary.verify(self.predict(self.canary.images).probabilities)

    @classmethod
    def load(cls, folder: Path, *, threads: int = 1, sha256: str | None = None) -> "Bundle":
        """Read and verify the bundle in `folder`; `threads` is the number of cores one prediction may use.

        `sha256` is what its registration says of the manifest, which vouches for the other files. Raises
        `OutdatedBundle` on another format or a canonical form of another version, `InvalidBundle` on a missing or
        altered file, a file that no bundle has, labels other than this program's, or a network or gate that does not
        fit.
        """
        raw = _read(folder / MANIFEST)
        if sha256 and _sha256(raw) != sha256:
            why = "its hash is not the one it was registered with"
            raise InvalidBundle(f"{MANIFEST} is damaged", why=why, fix="restore the bundle, or build the model again")
        fix = "build the model again with this version of NeuroLoop"
        if (found := _format(raw)) != FORMAT:
            raise OutdatedBundle(f"the bundle has format {found}", why=f"this program reads format {FORMAT}", fix=fix)
        manifest = _parsed(Manifest, raw, MANIFEST)
        if manifest.labels != LABELS:
            raise InvalidBundle(f"the bundle's labels are {manifest.labels}", why=f"expected {LABELS}", fix=fix)
        if manifest.canonical_version != CANONICAL_VERSION:
            raise OutdatedBundle(
                f"the bundle was trained on canonical form {manifest.canonical_version}",
                why=f"this program makes {CANONICAL_VERSION}, so predictions would be skewed",
                fix=fix,
            )
        unnamed = _REQUIRED - manifest.files.keys()
        if unnamed:
            raise InvalidBundle(f"the manifest does not name {', '.join(sorted(unnamed))}")
        foreign = manifest.files.keys() - _REQUIRED - _OPTIONAL
        if foreign:
            known = ", ".join(sorted(_REQUIRED | _OPTIONAL))
            raise InvalidBundle(f"the manifest names {min(foreign)!r}", why=f"a bundle holds only {known}")
        files = {}
        for name, sha256 in manifest.files.items():
            files[name] = _read(folder / name)
            if _sha256(files[name]) != sha256:
                raise InvalidBundle(
                    f"{folder / name} is damaged", why="its hash is not the manifest's", fix="fetch the bundle again"
                )
        return cls(manifest, files, _sha256(raw), threads=threads)

    @property
    def image_size(self) -> int:
        """Side of the canonical image, pixels."""
        return self.manifest.image_size

    @property
    def statistics(self) -> bytes:
        """The JSON of the training data's statistics."""
        return self._files[STATISTICS]

    @property
    def weights(self) -> bytes | None:
        """The weights for a warm start (`export.load_weights`), None where the bundle has none."""
        return self._files.get(WEIGHTS)

    @property
    def onnx(self) -> bytes:
        """The network's ONNX file."""
        return self._files[MODEL]

    @property
    def fitted_gate(self) -> FittedGate:
        """The gate as `write` takes it."""
        return FittedGate(self.gate.facts, self._files[GATE_MODEL])

    @property
    def size(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(map(len, self._files.values()))

    def predict(self, images: Images) -> Outputs:
        """Classify canonical `images`, uint8 (n, image_size, image_size). Raises `ValueError` on another shape."""
        raw = self._network.run(images)
        calibration = self.manifest.calibration
        probabilities = calibration.probabilities(raw.logits)
        sets = {level: calibration.prediction_sets(probabilities, level) for level in calibration.conformal}
        novelty = self.gate.facts.novelty(raw.features)
        refer = calibration.refer(probabilities) | (novelty > 1)
        return Outputs(raw.logits, probabilities, raw.cam, raw.features, sets, novelty, refer)

    def refer_reason(self, largest: float, novelty: float) -> str:
        """Why an image with this largest probability and this novelty is left to a reader, in words."""
        if novelty > 1:
            return (
                f"The scan is beyond what the model has learned (novelty {novelty:.2f}, limit 1): another scanner, "
                "sequence or state. On such scans it is often wrong, mostly by seeing no tumour."
            )
        return (
            f"The largest probability, {100 * largest:.1f} %, is below "
            f"{100 * self.manifest.calibration.refer_below:.1f} %: this is among the least certain answers, which are "
            "left to a reader."
        )

    def heat(self, cam: NDArray[np.float32], class_index: int) -> NDArray[np.float32]:
        """The class-activation map of one class, float32 (image_size, image_size) in 0..1; see `heat_map`.

        `cam` (h, w, classes) as in `Outputs`.
        """
        return heat_map(cam, class_index, self.image_size, self.manifest.map_offset)


def write(
    folder: Path,
    *,
    onnx: bytes,
    gate: FittedGate,
    statistics: bytes,
    image_size: int,
    architecture: ArchitectureName,
    hyperparameters: Mapping[str, Any] = {},
    calibration: Calibration,
    map_offset: tuple[float, float] = (0.0, 0.0),
    data_version: str,
    split: SplitName = "grouped",
    simulated: bool,
    metrics: Mapping[str, float],
    weights: bytes | None = None,
    canary: Canary | None = None,
    created_at: datetime | None = None,
) -> Path:
    """Write a bundle into `folder` (made if missing) and return it; the manifest comes last, so a torn write shows.

    Raises `InvalidBundle` where the parts do not fit together.
    """
    files = {MODEL: onnx, GATE: gate.facts.model_dump_json().encode(), GATE_MODEL: gate.onnx, STATISTICS: statistics}
    if weights is not None:
        files[WEIGHTS] = weights
    if canary is not None:
        files[CANARY] = canary.to_bytes()
    manifest = Manifest(
        labels=LABELS,
        image_size=image_size,
        canonical_version=CANONICAL_VERSION,
        architecture=architecture,
        hyperparameters=dict(hyperparameters),
        calibration=calibration,
        map_offset=map_offset,
        data_version=data_version,
        split=split,
        simulated=simulated,
        metrics=dict(metrics),
        created_at=created_at or now(),
        files={name: _sha256(data) for name, data in sorted(files.items())},
    )
    return _stored(folder, manifest, files)


def with_card(folder: Path, card: Card) -> Path:
    """Add the model card to the bundle in `folder`, or replace the one it has; returns `folder`.

    The bundle gets another identity, for its manifest names the card's hash; nothing else of it changes. It is
    verified first, so that a damaged one is not hashed anew: raises `InvalidBundle`.
    """
    bundle = Bundle.load(folder)
    added = {CARD: as_markdown(card).encode(), CARD_DATA: card.model_dump_json(indent=1).encode()}
    files = {**bundle._files, **added}
    hashes = {name: _sha256(data) for name, data in sorted(files.items())}
    return _stored(folder, bundle.manifest.model_copy(update={"files": hashes}), files)


def _stored(folder: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Path:
    raw = json.dumps(manifest.model_dump(mode="json"), indent=1).encode()
    Bundle(manifest, files, _sha256(raw))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    for name, data in (*files.items(), (MANIFEST, raw)):
        (folder / name).write_bytes(data)
    return folder


def _format(raw: bytes) -> int | None:
    """The format that a manifest names, of whatever version the rest of it is."""
    try:
        found = json.loads(raw).get("format")
    except (ValueError, AttributeError):
        return FORMAT  # no manifest at all: reading it as one says what is wrong
    return found if isinstance(found, int) else None


def _parsed(record: type[_Record], data: bytes, name: str) -> _Record:
    try:
        return record.model_validate_json(data)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise InvalidBundle(f"{name} is not valid", why=f"{place}: {problem['msg']}".lstrip(": ")) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidBundle(
            f"{path} cannot be read", why=error.strerror or str(error), fix="fetch the bundle again"
        ) from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
