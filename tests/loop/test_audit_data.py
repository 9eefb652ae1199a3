"""The task `audit_data` on a source with faults: its reports, its figures, and when it stops the run."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from data.drawn import ct, four_classes, picture
from data.test_dataset import between
from neuroloop.bootstrap import Services
from neuroloop.core import keys
from neuroloop.core.errors import InvalidSource
from neuroloop.core.schemas import Snapshot
from neuroloop.core.settings import Settings
from neuroloop.imaging.decode import encode_png
from neuroloop.loop import handoff, preparation, shards, splitting
from neuroloop.loop.params import Params


@pytest.fixture
def platform(tmp_path, mlflow_uri):
    """A store, MLflow, and a source of two parts that leak, with a CT and a wrong label."""
    source = tmp_path / "source"
    files = {f"Training/{path}": data for path, data in four_classes(24).items()}
    files |= {f"Testing/{path}": encode_png(picture(60_000 + n)) for n, path in enumerate(four_classes(3))}
    files["Testing/glioma/mirror.png"] = encode_png(np.ascontiguousarray(picture(0)[:, ::-1]))
    files["Training/notumor/ct.png"] = encode_png(ct())
    files["Training/pituitary/conflict.png"] = encode_png(np.rot90(picture(3)))
    for name, data in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)

    def services(**settings) -> Services:
        return Services(
            Settings(home=tmp_path / "home", mlflow_tracking_uri=mlflow_uri, data_url=str(source), **settings)
        )

    return services


def looked_at(services: Services, run_id: str, split: str = "grouped") -> str:
    """What comes before `audit_data`; the data version."""
    params = Params.of(services, {"shards": 2, "split": split})
    preparation.check_source(services, run_id, params)
    version = preparation.download_data(services, run_id, params)["version"]
    for shard in shards.list_shards(services, run_id):
        shards.audit_shard(services, run_id, shard)
    return version


def test_files_that_were_passed_over_stand_in_the_report(platform, request):
    services = platform()
    source = Path(services.settings.data_url)
    for name in ("Training/glioma/a.dcm", "Training/glioma/b.jfif", "Testing/c.JFIF"):
        (source / name).write_bytes(b"x")
    version = looked_at(services, request.node.name)
    preparation.audit_data(services, request.node.name)
    report = json.loads(services.store.get(keys.audit(version)))
    assert report["ignored"] == {".dcm files": 1, ".jfif files": 2}
    assert services.store.get(keys.LATEST_AUDIT) == version.encode()
    (finding,) = (each for each in report["findings"] if each["name"] == "ignored")
    assert (finding["images"], finding["grade"]) == (3, "warning")


def test_files_that_were_passed_over_stop_a_build_before_its_parts_are_frozen(platform, request):
    services = platform(audit_stop_on="ignored")
    (Path(services.settings.data_url) / "Training/glioma/a.dcm").write_bytes(b"x")
    looked_at(services, request.node.name)
    with pytest.raises(InvalidSource, match="1 files were not looked at"):
        preparation.audit_data(services, request.node.name)
    assert services.store.list(keys.SPLIT_REGISTRY) == []


def test_what_lies_between_two_parts_stands_in_the_report_among_what_is_quarantined(platform, request):
    services = platform()
    source = Path(services.settings.data_url)
    frozen = {}
    for degrees, part in ((0, "train"), (12.5, None), (25, "test")):
        path = source / f"Training/glioma/at{degrees:g}.png"
        path.write_bytes(between(degrees))
        if part:
            frozen[hashlib.sha256(path.read_bytes()).hexdigest()] = part
    before = splitting.Decisions(version="v0", simulated=False, parts=frozen, md5={})
    number = keys.next_number(services.store.list(keys.SPLIT_REGISTRY))
    services.store.put(keys.split_decisions(number), before.model_dump_json().encode())
    version = looked_at(services, request.node.name)
    preparation.audit_data(services, request.node.name)
    report = json.loads(services.store.get(keys.audit(version)))
    reasons = {each["path"]: each["reason"] for each in report["quarantined"]}
    assert "both test and train" in reasons["Training/glioma/at12.5.png"]
    assert reasons.keys() == {each.path for each in handoff.run_split(services, request.node.name).quarantined}
    (finding,) = (each for each in report["findings"] if each["name"] == "between_parts")
    assert (finding["images"], finding["grade"]) == (1, "warning")
    assert b"Nothing else was dropped" not in services.store.get(keys.audit_page(version))


def test_both_reports_stand_in_the_store_and_in_mlflow_and_the_figures_are_metrics(platform, mlflow_uri, request):
    from mlflow import MlflowClient

    # Named, but not found: that stops nothing.
    services, run_id = platform(audit_stop_on="tiny,blank,unreadable"), request.node.name
    version = looked_at(services, run_id)
    result = preparation.audit_data(services, run_id)
    report = json.loads(services.store.get(keys.audit(version)))
    assert (report["twins_across_parts"], report["wrong_modality"]) == (1, ["Training/notumor/ct.png"])
    assert result["twins_across_parts"] == result["wrong_modality"] == result["label_conflicts"] == 1
    assert {"source", "grouped"} == set(report["shortcuts"]["border"])
    assert None not in report["shortcuts"]["border"].values()
    assert services.store.get(keys.audit_page(version)).startswith(b"<!doctype html>")

    client, run = MlflowClient(mlflow_uri), handoff.tracked(services, run_id)
    assert {"data/audit.json", "data/audit.html", "data/split.json"} <= {
        artifact.path for artifact in client.list_artifacts(run, "data")
    }
    metrics = client.get_run(run).data.metrics
    assert metrics["data_leak_rate"] == pytest.approx(1 / 13)
    assert metrics["data_twins_across_parts"] == 1
    assert metrics["legacy_test_shortcut_border_accuracy"] == pytest.approx(
        report["shortcuts"]["border"]["source"], abs=1e-3
    )
    assert metrics["grouped_held_out_shortcut_nearest_accuracy"] <= 1


def test_a_legacy_run_logs_the_parts_of_the_split_that_it_works_on(platform, mlflow_uri, request):
    from mlflow import MlflowClient

    services, run_id = platform(), request.node.name
    for path, n in ((path, 200_000 + n) for n, path in enumerate(four_classes(60))):  # for its small validation part
        (Path(services.settings.data_url) / f"Training/{path}").with_suffix(".more.png").write_bytes(
            encode_png(picture(n))
        )
    looked_at(services, run_id, split="legacy")
    result = preparation.audit_data(services, run_id)
    run = handoff.tracked(services, run_id)
    logged = MlflowClient(mlflow_uri).get_run(run).data
    own = handoff.run_split(services, run_id)
    assert (logged.params["split"], logged.tags["images_test"]) == ("legacy", str(len(own.of("test"))))
    assert {entry.path.partition("/")[0] for entry in own.of("test")} == {"Testing"}
    assert result["parts"]["test"] == len(own.of("test"))


def test_a_run_stopped_by_its_data_goes_on_once_they_are_mended(platform, mlflow_uri, request):
    from mlflow import MlflowClient

    services, run_id = platform(audit_stop_on="tiny, blank, label_conflicts"), request.node.name
    source = Path(services.settings.data_url)
    (source / "Training/glioma/000.png").write_bytes(encode_png(np.zeros((64, 64), np.uint8)))
    first = looked_at(services, run_id)
    with pytest.raises(InvalidSource, match="NEUROLOOP_AUDIT_STOP_ON"):
        preparation.audit_data(services, run_id)
    mended = encode_png(picture(70_000))
    (source / "Training/glioma/000.png").write_bytes(mended)  # another image under its name
    (source / "Training/pituitary/conflict.png").unlink()
    version = looked_at(services, run_id)
    assert version != first
    snapshot = Snapshot.model_validate_json(services.store.get(keys.snapshot(version)))
    entry = next(each for each in snapshot.images if each.path == "Training/glioma/000.png")
    assert services.store.get(keys.image(entry.md5)) == mended
    parts = preparation.audit_data(services, run_id)["parts"]
    tags = MlflowClient(mlflow_uri).get_run(handoff.tracked(services, run_id)).data.tags
    assert (tags["data_version"], tags["images"]) == (version, str(len(snapshot.images)))
    assert {part: int(tags[f"images_{part}"]) for part in parts} == parts


def test_a_finding_that_the_settings_name_stops_the_run_after_its_report_and_before_its_split(platform, request):
    services, run_id = platform(audit_stop_on="tiny, label_conflicts"), request.node.name
    version = looked_at(services, run_id)
    with pytest.raises(InvalidSource, match=r"one picture under two classes.*NEUROLOOP_AUDIT_STOP_ON"):
        preparation.audit_data(services, run_id)
    assert services.store.exists(keys.audit_page(version))
    assert not services.store.exists(keys.split(version))
    assert services.store.list(keys.SPLIT_REGISTRY) == []
