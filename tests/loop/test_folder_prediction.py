"""A folder into a table: through a real API, with a bundle, and resumed after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from imaging.files import dicom
from neuroloop.bootstrap import Services
from neuroloop.core.errors import NeuroLoopError
from neuroloop.core.schemas import LABELS, RESEARCH_NOTICE
from neuroloop.loop import folder_prediction
from serving.running import KEY, Api, encoded, head, noise, serving, wait, write_bundle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """12 heads in two folders, one noise, one text, one hidden file."""
    root = tmp_path / "scans"
    for n in range(12):
        file = root / f"part {n % 2}" / f"{LABELS[n % 4]} {n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(head(LABELS[n % 4], height=100 + n)))
    (root / "noise.png").write_bytes(encoded(noise()))
    (root / "letter.txt").write_text("Dear reader")
    (root / ".DS_Store").write_bytes(b"x")
    return root


def predict(folder: Path, out: Path, home: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "neuroloop.cli", "predict", str(folder), "--out", str(out), *more],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(sys.path), "NEUROLOOP_HOME": str(home), "NEUROLOOP_API_KEY": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_service_that_wants_a_consent_is_no_folder_of_unreadable_files(folder, live_api, tmp_path):
    strict = live_api.services.settings.model_copy(update={"require_consent": True})
    with serving(Services(strict)) as api:
        done = predict(folder, tmp_path / "out.csv", tmp_path, "--api", f"http://127.0.0.1:{api.port}")
        _, error = done.communicate(timeout=120)
    assert done.returncode == 1
    assert "X-Consent" in error
    assert not (tmp_path / "out.csv").exists()


def check(table: pd.DataFrame) -> None:
    """Every file has its own row."""
    assert list(table.columns) == list(folder_prediction.COLUMNS)
    assert table["file"].tolist() == sorted(table["file"])
    assert set(table["notice"]) == {RESEARCH_NOTICE}
    outcomes = table.set_index("file")["outcome"].to_dict()
    assert outcomes.pop("noise.png") == "refused"
    assert outcomes.pop("letter.txt") == "unreadable"
    assert set(outcomes.values()) == {"answered"}
    answered = table[table["outcome"] == "answered"]
    assert len(answered) == 12
    for _, row in answered.iterrows():
        assert row["label"] == row["file"].split("/")[1].split()[0]
        assert sum(row[f"p_{label}"] for label in LABELS) == pytest.approx(1, abs=1e-5)
        assert row["label"] in row["set_95"].split()
        assert (row["frame"], row["frames"], row["simulated_model"]) == (1, 1, True)
        assert bool(row["refer"]) == isinstance(row["refer_reason"], str) & bool(row["refer_reason"])


def test_a_name_that_a_spreadsheet_would_run_is_text_in_a_csv(tmp_path):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "=1+1.txt").write_text("Dear reader")
    work = folder_prediction.Work.on(tmp_path / "scans", tmp_path / "out.csv", asked="", consent="record")
    work.do(folder_prediction.with_bundle(write_bundle(tmp_path / "bundle")))
    assert pd.read_csv(tmp_path / "out.csv")["file"].tolist() == ["'=1+1.txt"]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_folder_becomes_a_table_through_the_api_and_every_row_is_recorded(live_api: Api, folder, tmp_path, suffix):
    out = tmp_path / f"result.{suffix}"
    url = f"http://127.0.0.1:{live_api.port}"
    process = predict(folder, out, tmp_path, "--api", url, "--consent", "record")
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "12 answered" in said
    assert "14 files" in errors  # the progress bar
    table = pd.read_csv(out) if suffix == "csv" else pd.read_parquet(out)
    check(table)
    for _, row in table[table["outcome"] == "answered"].iterrows():
        recorded = live_api.client.get(f"/v1/predictions/{row['id']}").json()
        assert (recorded["label"], recorded["consent"]) == (row["label"], "record")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("result")) == [out.name]


def test_a_folder_becomes_a_table_with_a_bundle_alone(folder, tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    process = predict(folder, tmp_path / "r.csv", tmp_path, "--bundle", str(bundle))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    table = pd.read_csv(tmp_path / "r.csv")
    check(table)
    assert table["model_version"].dropna().str.startswith("bundle ").all()
    assert table["id"].isna().all()


def test_a_command_that_was_killed_goes_on_and_records_nothing_twice(live_api: Api, tmp_path):
    folder, out = tmp_path / "scans", tmp_path / "r.csv"
    folder.mkdir()
    for n in range(60):
        (folder / f"{n:02d}.png").write_bytes(encoded(head(LABELS[n % 4], height=300 + n)))
    before = live_api.services.log.monitoring().predictions
    command = (folder, out, tmp_path, "--api", f"http://127.0.0.1:{live_api.port}", "--at-once", "2")
    journal = out.with_name("r.csv.journal")
    process = predict(*command)
    wait(lambda: journal.exists() and journal.read_text().count("\n") > 8, 60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    noted = [json.loads(line) for line in journal.read_text().splitlines()[1:-1]]
    with journal.open("a") as file:
        file.write('{"file": "half a li')  # as a killed writer leaves it
    time.sleep(0.5)  # requests in flight end
    process = predict(*command)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    table = pd.read_csv(out)
    assert len(table) == len(set(table["id"])) == 60
    ids = table.set_index("file")["id"].to_dict()
    assert all(ids[row["file"]] == row["id"] for row in noted)
    assert live_api.services.log.monitoring().predictions == before + 60
    again = predict(*command)  # once done, the same command is new work
    again.communicate(timeout=120)
    assert set(pd.read_csv(out)["id"]).isdisjoint(ids.values())


def test_without_an_api_the_command_says_how_to_go_on(folder, tmp_path, free_port):
    work = folder_prediction.Work.on(folder, tmp_path / "r.csv", asked="", consent="record")
    with pytest.raises(NeuroLoopError, match="same command again"):
        work.do(folder_prediction.through_api(f"http://127.0.0.1:{free_port()}", KEY, "record", tries=2), at_once=2)
    assert not (tmp_path / "r.csv").exists()
    assert (tmp_path / "r.csv.journal").exists()


def test_a_journal_of_other_work_is_not_gone_on_with(folder, tmp_path):
    folder_prediction.Work.on(folder, tmp_path / "r.csv", asked="", consent="record")
    with pytest.raises(NeuroLoopError, match="other work"):
        folder_prediction.Work.on(folder, tmp_path / "r.csv", asked="", consent="training")
    with pytest.raises(NeuroLoopError, match=r"\.csv or \.parquet"):
        folder_prediction.Work.on(folder, tmp_path / "r.xls", asked="", consent="record")


@pytest.mark.parametrize("arguments", [("--consent", "all"), ("--out", "r.xls"), ("--bundle", "nowhere")])
def test_wrong_options_are_one_line(folder, tmp_path, arguments):
    process = predict(folder, tmp_path / "r.csv", tmp_path, *arguments)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.startswith("neuroloop: ")
    assert "Traceback" not in errors


def test_a_name_that_is_no_text_has_its_row_and_a_header_that_says_ct_is_refused_here_too(tmp_path):
    folder, out = tmp_path / "scans", tmp_path / "table.csv"
    folder.mkdir()
    (folder / os.fsdecode(b"Sch\xe4del.png")).write_bytes(encoded(head("glioma")))
    (folder / "ct.dcm").write_bytes(dicom(head("glioma"), Modality="CT"))
    done = predict(folder, out, tmp_path, "--bundle", str(write_bundle(tmp_path / "bundle")))
    assert done.wait(120) == 0, done.stderr.read()
    table = pd.read_csv(out).set_index("file")
    assert table.loc["Sch\\udce4del.png", "outcome"] == "answered"
    assert table.loc["ct.dcm", "outcome"] == "refused"
    assert "CT" in table.loc["ct.dcm", "problem"]
