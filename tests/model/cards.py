"""The figures of a run, as its steps return them, for the tests of the model card."""

from datetime import UTC, datetime
from typing import Any

from neuroloop.core.schemas import LABELS
from neuroloop.model.calibration import Calibration
from neuroloop.model.card import Data, Model

FACTS: dict[str, Any] = {
    "model": Model(
        architecture="compact",
        parameters=1_576_686,
        image_size=128,
        canonical_version="1",
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
        run_id="manual__2026-01-02",
        pipeline="data_and_model_build",
    ),
    "data": Data(
        version="0123abcd",
        source="/data/brain-mri",
        simulated=False,
        split="grouped",
        parts={"train": 4208, "validation": 840, "calibration": 701, "test": 1262},
        groups={"train": 1500, "test": 500},
        quarantined=8,
        leak_rates={"Testing": 0.757, "Training": 0.171},
        shortcuts={"border": {"source": 0.918, "grouped": 0.807}, "file_size": {"source": None, "grouped": 0.5}},
        licences=("CC0-1.0",),
    ),
    "calibration": Calibration(
        temperature=1.234, conformal={"0.90": dict.fromkeys(LABELS, 0.5)}, refer_below=0.81, groups={}
    ),
    "evaluated": {
        "test": {
            "macro_f1": 0.962,
            "macro_f1_low": 0.951,
            "macro_f1_high": 0.972,
            "accuracy": 0.964,
            "ece": 0.012,
            "nll": 0.11,
            "recall_glioma": 0.97,
            "recall_meningioma": 0.93,
            "recall_notumor": 0.98,
            "recall_pituitary": 0.99,
        },
        "baselines": {
            f"{name}_{score}": value
            for name, value in {"majority": 0.11, "border": 0.6, "thumbnail": 0.74, "nearest": 0.83}.items()
            for score in ("accuracy", "macro_f1")
        },
        "coverage": {
            "0.90": {
                **dict.fromkeys(LABELS, 0.9),
                "glioma_low": 0.87,
                "glioma_high": 0.93,
                "glioma_resplit": 0.907,
                "size": 1.01,
            },
            "0.95": {**dict.fromkeys(LABELS, 0.95), "size": 1.12},
        },
        "risk_coverage": {"answered": 0.88, "answered_accuracy": 0.993, "accuracy_at_85": 0.995, "area": 0.004},
        "stress": {
            "clean": {"macro_f1": 0.96, "accuracy": 0.96},
            "noise": {"mild_macro_f1": 0.95, "strong_macro_f1": 0.93, "drop": 0.03},
        },
        "explanation": {
            "pointing": {
                "scans": 150,
                "shown": 0.97,
                "hits": 0.85,
                "chance": 0.1,
                "per_class": {"glioma": 0.9, "meningioma": 0.8, "pituitary": 0.85},
                "tolerance": 0.05,
            },
            "randomised_correlation": 0.02,
        },
        "gate": {
            "accepted_brains": 0.993,
            "accepted_widened": 0.95,
            "accepted_rendered": 0.98,
            "novel_widened": 0.6,
            "novel_rendered": 0.9,
            "missed_widened": 0.05,
            "rejected": {"noise": 1.0, "round_bodies": 0.95},
            "measured": 80,
            "test_refused": {"share": 0.012, "share_low": 0.004, "share_high": 0.021},
        },
    },
    "trained": {"epochs": 60, "best_epoch": 55, "settings": {"learning_rate": 0.003, "batch": 64}},
    "augmentation": {"rotation": 15.0, "flip": True},
    "test_openings": 3,
}


def facts(**evaluated: Any) -> dict[str, Any]:
    """`FACTS` with other evaluation results."""
    return FACTS | {"evaluated": FACTS["evaluated"] | evaluated}
