"""How often the input gate errs: kind by kind, on kinds that it has not learned, and on images of your own.

`make bench-gate` trains a gate on the brains of `NEUROLOOP_REAL_DATA` (grouped split) or, without it, on simulated
scans, sets its threshold on validation brains, and prints the shares of validation and calibration brains accepted and
of every kind of other image rejected. `--without KIND...` leaves kinds out of the learning, which says more of unseen
images than any figure on kinds that were learned. `--brains FOLDER` and `--others FOLDER` are images of your own, of
any format that can be uploaded, judged as uploads are; none of them is learned from. JSON goes to
bench/results/gate.json.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
from numpy.typing import NDArray
from report import save
from training import snapshot_of

from neuroloop.core.errors import InvalidImage
from neuroloop.core.schemas import LABELS
from neuroloop.data import dataset
from neuroloop.data.audit import audit
from neuroloop.imaging import decode
from neuroloop.imaging.canonical import canonicalize
from neuroloop.imaging.phantom import scan
from neuroloop.model import gate_training, outliers
from neuroloop.model.gate import InputGate

SIZE = 128
Images = NDArray[np.uint8]


def brains() -> tuple[str, dict[str, Images]]:
    """What they are, and canonical images of the parts train, validation and calibration."""
    real = os.environ.get("NEUROLOOP_REAL_DATA")
    if not real:
        heads = {"train": range(150), "validation": range(150, 225), "calibration": range(225, 300)}
        return "simulated scans", {
            part: np.stack([canonicalize(scan(label, seed).pixels, SIZE) for seed in seeds for label in LABELS])
            for part, seeds in heads.items()
        }
    snapshot, data = snapshot_of(Path(real))
    split = dataset.make_split(snapshot, audit(snapshot, lambda entry: data[entry.path]))
    parts = {}
    for part in ("train", "validation", "calibration"):
        arrays = dataset.canonical_arrays(split.of(part), lambda entry: data[entry.path], SIZE)
        parts[part] = (
            arrays.images[np.unique(arrays.groups, return_index=True)[1]] if part == "train" else arrays.images
        )
    return "real scans", parts


def read(folder: Path) -> Iterator[tuple[str, Images, bool]]:
    """File name, canonical image and whether header or colour object, of what can be decoded below `folder`.

    Each content once.
    """
    seen = set()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            found = decode.read(path.read_bytes())
        except InvalidImage as error:
            print(f"{path.name}: {error}")
            continue
        if (content := found.pixels.tobytes()) not in seen:
            seen.add(content)
            yield str(path.relative_to(folder)), canonicalize(found.pixels, SIZE), bool(decode.objection(found))


def main() -> None:
    """Train, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=gate_training.steps_for(30), help="of the training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without", nargs="*", default=[], choices=list(outliers.KINDS), help="kinds not to learn")
    parser.add_argument("--brains", type=Path, help="folder of brain MRI of other scanners")
    parser.add_argument("--others", type=Path, help="folder of what is no brain MRI")
    given = parser.parse_args()

    what, parts = brains()
    fitted = gate_training.fit_gate(
        lambda images: (np.eye(len(LABELS))[images[:, 0, 0] % len(LABELS)], np.ones((len(images), 1))),  # no classifier
        *((parts[part], np.zeros(len(parts[part]), int)) for part in ("train", "validation")),
        np.random.default_rng(given.seed),
        steps=given.steps,
        without=given.without,
    )
    facts = fitted.facts
    gate = InputGate(facts, fitted.onnx, threads=2)
    widened = outliers.widen(parts["calibration"], np.random.default_rng(1))
    accepted = {
        f"{what}, validation part (sets the threshold)": facts.accepted_brains,
        "the same in changed contrasts (sets the threshold)": facts.accepted_widened,
        f"{what}, calibration part": float((gate.scores(parts["calibration"]) >= 0.5).mean()),
        "the same in changed contrasts": float((gate.scores(widened) >= 0.5).mean()),
        "simulated heads of any contrast and plane": facts.accepted_rendered,
    }
    rejected = {
        f"{kind}, not learned" if kind in given.without else kind: facts.rejected[kind] for kind in facts.rejected
    }
    wrong: dict[str, list[Any]] = {}
    for name, folder, table, is_brain in (
        ("brains of your own", given.brains, accepted, True),
        ("others of your own", given.others, rejected, False),
    ):
        if folder is None:
            continue
        files, images, objected = zip(*read(folder), strict=True)
        passed = (gate.scores(np.stack(images)) >= 0.5) & ~np.array(objected)
        table[f"{name} ({len(files)})"] = float((passed == is_brain).mean())
        wrong[name] = [file for file, one in zip(files, passed, strict=True) if one != is_brain]

    for title, shares in (("accepted", accepted), ("rejected", rejected)):
        for kind, share in shares.items():
            print(f"{title:10} {kind:56} {share:7.1%}")
    for name, files_wrong in wrong.items():
        print(f"{name}, judged wrongly: {', '.join(files_wrong) or 'none'}")
    result = {"brains": what, "steps": given.steps, "seed": given.seed, "accepted": accepted, "rejected": rejected}
    save("gate", result | {"wrong": wrong})


if __name__ == "__main__":
    main()
