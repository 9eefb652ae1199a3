"""Where the benches put their figures."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def save(name: str, result: dict[str, Any]) -> None:
    """Write bench/results/NAME.json, and say so."""
    FOLDER.mkdir(exist_ok=True)
    out = FOLDER / f"{name}.json"
    out.write_text(json.dumps(result, indent=1))
    print(f"written to {out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out}", flush=True)
