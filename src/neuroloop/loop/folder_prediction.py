"""A whole folder of images into one table, through the API or with a bundle, stopped and resumed at will.

Beside the table lies a journal while it is being made: the first line names the work, each further one is the row of a
file. Whoever starts the same work again goes on with it. A file that was sent but not noted is sent again with the same
Idempotency-Key, so the service has it once.
"""

import hashlib
import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pandas as pd

from neuroloop.core.errors import InvalidImage, NeuroLoopError, NotFound, Unavailable
from neuroloop.core.schemas import LABELS, RESEARCH_NOTICE
from neuroloop.data.source import hidden
from neuroloop.imaging.canonical import canonicalize
from neuroloop.imaging.decode import objection, read
from neuroloop.model.bundle import Bundle
from neuroloop.model.gate import declared

Row = dict[str, Any]
Ask = Callable[[bytes, str], Row]
"""The row of an image's bytes and its idempotency key. Raises `Unavailable` where nobody answers for now."""

COLUMNS = (
    *("file", "frame", "frames", "outcome", "id", "label", *(f"p_{label}" for label in LABELS)),
    *("refer", "refer_reason", "set_90", "set_95", "gate_score", "novelty", "model_version", "simulated_model"),
    *("problem", "notice"),
)
TRIES, LONGEST_PAUSE = 6, 10.0  # some 30 seconds, within which a killed service is back
_PASSING = (408, 425, 429, 500, 502, 503, 504, 507)


@dataclass(frozen=True)
class Work:
    """The files of a folder, and what is known of them already."""

    folder: Path
    out: Path
    files: tuple[str, ...]
    run: str
    rows: dict[str, Row]

    @classmethod
    def on(cls, folder: Path, out: Path, *, asked: str, consent: str) -> "Work":
        """New work, or that of an unfinished journal beside `out`. `asked` and `consent` must be the same to resume.

        Raises `NotFound` for a folder without files, `NeuroLoopError` for another kind of table or a foreign journal.
        """
        if out.suffix.lower() not in (".csv", ".parquet"):
            raise NeuroLoopError(
                f"{out} is no table that can be written", fix="name a file that ends in .csv or .parquet"
            )
        paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        apart = {out.absolute(), _journal(out).absolute()}
        files = tuple(sorted(each for each in paths if not hidden(each) and (folder / each).absolute() not in apart))
        if not files:
            raise NotFound(f"{folder} has no files")
        head = {"folder": str(folder.absolute()), "asked": asked, "consent": consent}
        return cls(folder, out, files, *_resumed(_journal(out), head))

    def do(self, ask: Ask, *, at_once: int = 4, done: Callable[[int], object] = lambda n: None) -> dict[str, int]:
        """Ask for every file that has no row yet, write the table, and say how many came out how.

        Raises `Unavailable` where nobody answers any more; the rows so far stay in the journal.
        """
        done(sum(file in self.rows for file in self.files))
        noting, stop = threading.Lock(), threading.Event()
        with _journal(self.out).open("a", encoding="utf-8") as journal, ThreadPoolExecutor(at_once) as pool:

            def work(file: str) -> None:
                if stop.is_set():
                    return
                try:
                    data = (self.folder / file).read_bytes()
                    named = f"{self.run} {file} {hashlib.sha256(data).hexdigest()}"
                    key = hashlib.sha256(named.encode(errors="surrogateescape")).hexdigest()
                    row = {"file": file} | ask(data, key)
                except OSError as error:
                    row = {"file": file, "outcome": "unreadable", "problem": error.strerror or str(error)}
                except BaseException:
                    stop.set()
                    raise
                with noting:
                    journal.write(json.dumps(row) + "\n")
                    journal.flush()
                    self.rows[file] = row
                    done(1)

            for result in [pool.submit(work, file) for file in self.files if file not in self.rows]:
                result.result()
        # In a name that is no UTF-8, the bytes that are none are written as \udcff.
        named = {file: {"file": file.encode(errors="backslashreplace").decode()} for file in self.files}
        rows = [self.rows[file] | named[file] | {"notice": RESEARCH_NOTICE} for file in self.files]
        table = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"frame": "Int64", "frames": "Int64"})
        part = self.out.with_name(self.out.name + ".new")
        if self.out.suffix.lower() == ".csv":
            table["file"] = table["file"].map(_no_formula)
            table.to_csv(part, index=False)
        else:
            table.to_parquet(part, index=False)
        part.replace(self.out)
        _journal(self.out).unlink()
        return dict(Counter(table["outcome"]))


def through_api(url: str, key: str, consent: str, *, tries: int = TRIES) -> Ask:
    """Ask the API at `url` with an API key, patiently where it is away for a moment."""
    client = httpx.Client(
        base_url=url,
        headers={"Authorization": f"Bearer {key}"},
        timeout=httpx.Timeout(60, connect=3),
        trust_env=False,
    )

    def ask(data: bytes, key: str) -> Row:
        headers = {"Idempotency-Key": key, "X-Consent": consent}
        why = ""
        for attempt in range(tries):
            pause = min(2.0**attempt, LONGEST_PAUSE)
            try:
                answer = client.post(
                    "/v1/predictions", params={"images": "false"}, files={"file": ("image", data)}, headers=headers
                )
                if answer.status_code not in _PASSING:
                    return _row(answer)
                why = f"{answer.status_code}: {_body(answer).get('detail', '')}"
                pause = min(float(answer.headers.get("Retry-After", pause)), LONGEST_PAUSE)
            except (httpx.HTTPError, ValueError) as error:
                why = str(error) or type(error).__name__
            if attempt + 1 < tries:
                time.sleep(pause)
        raise Unavailable(f"{url} does not answer", why=why, fix="start the same command again: it goes on from here")

    return ask


def with_bundle(folder: Path) -> Ask:
    """Ask the bundle in `folder`, here; nothing is stored or recorded anywhere."""
    bundle = Bundle.load(folder)

    def ask(data: bytes, key: str) -> Row:
        try:
            seen = read(data)
        except InvalidImage as error:
            return {"outcome": "unreadable", "problem": str(error)}
        canonical = canonicalize(seen.pixels, bundle.image_size)
        outputs = bundle.predict(canonical[None])
        judged = bundle.gate.judge(canonical, float(outputs.novelty[0]))
        gate = declared(judged, objection(seen))
        row: Row = {"gate_score": gate.score, "novelty": gate.novelty, "model_version": f"bundle {bundle.sha256[:12]}"}
        row |= {"frame": seen.frame, "frames": seen.frames}
        if not gate.accepted:
            return row | {"outcome": "refused", "problem": gate.reason}
        probabilities = dict(zip(LABELS, outputs.probabilities[0].astype(float).tolist(), strict=True))
        sets = {
            level: [label for label, inside in zip(LABELS, found[0], strict=True) if inside]
            for level, found in outputs.sets.items()
        }
        label = max(probabilities, key=probabilities.__getitem__)
        refer, largest = bool(outputs.refer[0]), probabilities[label]
        row |= {"refer": refer, "refer_reason": bundle.refer_reason(largest, gate.novelty) if refer else ""}
        return row | {"simulated_model": bundle.manifest.simulated} | _accepted(label, probabilities, sets)

    return ask


def _row(answer: httpx.Response) -> Row:
    body = _body(answer)
    if answer.status_code == 201:
        row = _identified(body) | {name: body[name] for name in ("refer", "refer_reason", "simulated_model")}
        return row | _accepted(body["label"], body["probabilities"], body["prediction_sets"])
    problem = " ".join(f"{body.get(part, '')}".rstrip(".") + "." for part in ("title", "detail") if body.get(part))
    if "gate" in body:
        row = _identified(body)
        return row | {"outcome": "refused", "problem": body["gate"]["reason"]}
    if answer.status_code == 410:
        return {"outcome": "erased", "problem": problem}
    if answer.status_code in (400, 413, 415):
        return {"outcome": "unreadable", "problem": problem}
    raise NeuroLoopError(f"{answer.request.url.host} refuses to answer ({answer.status_code})", why=problem)


def _identified(body: Row) -> Row:
    gate = body["gate"]
    named = {name: body[name] for name in ("id", "model_version", "frame", "frames")}
    return named | {"gate_score": gate["score"], "novelty": gate["novelty"]}


def _accepted(label: str, probabilities: dict[str, float], sets: dict[str, Any]) -> Row:
    row: Row = {"outcome": "answered", "label": label}
    row |= {f"p_{each}": probabilities[each] for each in LABELS}
    # In the order of the classes, not of the probabilities, so that equal sets are equal words.
    return row | {
        f"set_{level[2:]}": " ".join(each for each in LABELS if each in found) for level, found in sets.items()
    }


def _no_formula(name: str) -> str:
    """A file's name as a spreadsheet takes it for text."""
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name


def _body(answer: httpx.Response) -> Row:
    try:
        body = answer.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _journal(out: Path) -> Path:
    return out.with_name(out.name + ".journal")


def _resumed(journal: Path, head: dict[str, str]) -> tuple[str, dict[str, Row]]:
    """Run and rows of the journal; a new one is begun where there is none. A line that was cut off is left out."""
    lines = []
    if journal.exists():
        for line in journal.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
    if not lines:
        run = str(uuid.uuid4())
        journal.write_text(json.dumps(head | {"run": run}) + "\n", encoding="utf-8")
        return run, {}
    first = lines[0]
    if {name: first.get(name) for name in head} != head:
        raise NeuroLoopError(
            f"{journal} belongs to other work",
            why=f"of {first.get('folder')}, asked {first.get('asked') or 'the API'}, consent {first.get('consent')}",
            fix="finish that with its own command, or remove the file to begin anew",
        )
    if not journal.read_text(encoding="utf-8").endswith("\n"):
        with journal.open("a", encoding="utf-8") as file:
            file.write("\n")
    return first["run"], {row["file"]: row for row in lines[1:]}
