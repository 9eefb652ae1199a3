"""Data versions, their statistics and the openings of their test parts, on a real store, DVC and MLflow."""

import hashlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data.drawn import four_classes, picture, snapshot_of
from neuroloop.bootstrap import Services, open_store
from neuroloop.core import keys
from neuroloop.core.errors import InvalidSource, NeuroLoopError, NotFound
from neuroloop.core.ports import DataSource
from neuroloop.core.schemas import LABELS, Snapshot, SourceFile
from neuroloop.core.settings import Settings
from neuroloop.data.audit import audit
from neuroloop.data.statistics import Statistics
from neuroloop.imaging.decode import encode_png
from neuroloop.loop import handoff, preparation, shards, versions
from neuroloop.loop.params import Params
from serving.running import write_bundle


def services_of(tmp_path: Path, mlflow_uri: str, **settings: object) -> Services:
    return Services(Settings.model_validate({"home": tmp_path / "home", "mlflow_tracking_uri": mlflow_uri, **settings}))


@pytest.fixture
def services(tmp_path, mlflow_uri):
    return services_of(tmp_path, mlflow_uri)


def built_until_split(services, files, run_id, version, *, split="grouped"):
    """What check_source, download_data and audit_data leave, without DVC."""
    snapshot = snapshot_of(files, version)
    for entry in snapshot.images:
        services.store.put(keys.image(entry.md5), files[entry.path])
    services.store.put(keys.snapshot(version), snapshot.model_dump_json().encode())
    handoff.keep(services, run_id, "check_source", {"split": split})
    handoff.keep(services, run_id, "download_data", {"version": version, "shards": ["1/1"]})
    return preparation.write_splits(services, snapshot, audit(snapshot, lambda entry: files[entry.path]))


def captured(services, files, run_id, version):
    built_until_split(services, files, run_id, version)
    shards.prepare_shard(services, run_id, Params.of(services, {"image_size": 32}), "1/1")
    return preparation.capture_statistics(services, run_id)


@pytest.fixture(scope="module")
def files():
    return {
        f"{label}/{n:03d}.png": encode_png(picture(1000 * k + n, 40))
        for k, label in enumerate(LABELS)
        for n in range(36)
    }


@pytest.fixture(scope="module")
def brighter(files):
    """The gliomas of `files` replaced by other, brighter pictures."""
    others = {path: data for path, data in files.items() if not path.startswith("glioma")}
    return others | {f"glioma/b{n}.png": encode_png(picture(50_000 + n, 40) // 2 + 128) for n in range(36)}


# --- statistics against the previous version ----------------------------------------------------


def test_each_version_is_compared_with_the_one_accepted_before_it_of_its_kind(services, files, brighter):
    first = captured(services, files, "r1", "aa")
    assert first["changes"] is None
    simulated = snapshot_of(brighter, "sim", simulated=True)
    assert versions.previous(services.store, simulated) is None
    versions.accept(services.store, simulated, "r2")
    second = captured(services, brighter, "r3", "bb")
    assert second["changes"]["previous"] == "aa"
    assert (second["changes"]["added"], second["changes"]["removed"]) == (36, 36)
    assert second["changes"]["grade"] == "large"
    assert preparation.capture_statistics(services, "r3") == second  # a repeated task compares with the same version
    back = captured(services, files, "r4", "aa")
    assert back["changes"]["previous"] == "bb"
    assert [each.version for each in versions.accepted(services.store)] == ["aa", "sim", "bb", "aa"]
    stored = Statistics.model_validate_json(services.store.get(keys.statistics("bb")))
    assert stored.version == "bb"
    assert services.store.get(keys.run("r3", "statistics.json")) == services.store.get(keys.statistics("bb"))


def test_a_change_beyond_the_limit_stops_the_build_and_is_not_the_next_ones_reference(
    services, files, brighter, tmp_path, mlflow_uri
):
    import mlflow

    captured(services, files, "limit-1", "aa")
    strict = services_of(tmp_path, mlflow_uri, statistics_stop_psi=0.25)
    with pytest.raises(InvalidSource, match=r"changed too much since version aa.*glioma grey_level.*STOP_PSI above"):
        captured(strict, brighter, "limit-2", "bb")
    assert [each.version for each in versions.accepted(services.store)] == ["aa"]
    fewer = {path: data for path, data in files.items() if path != "pituitary/035.png"}
    assert captured(strict, fewer, "limit-3", "cc")["changes"]["previous"] == "aa"
    # A person who decides whether the change is wanted finds it in MLflow.
    client = mlflow.MlflowClient(mlflow_uri)
    run = client.get_run(handoff.tracked(services, "limit-2"))
    assert run.data.metrics["data_psi_max"] > 0.25
    assert run.data.tags["previous_data_version"] == "aa"
    names = {each.path for each in client.list_artifacts(run.info.run_id, "statistics")}
    assert {"statistics/statistics.json", "statistics/comparison.json"} <= names


# --- legacy split -------------------------------------------------------------------------------


def test_a_run_on_the_legacy_split_reads_it_everywhere_and_leaves_no_reference_behind(services, files):
    public = {f"{'Testing' if path[-5] in '05' else 'Training'}/{path}": data for path, data in files.items()}
    built_until_split(services, public, "legacy", "dd", split="legacy")
    split = handoff.run_split(services, "legacy")
    assert split.name == "legacy"
    assert {entry.path.split("/")[0] for entry in split.of("test")} == {"Testing"}
    params = Params.of(services, {"image_size": 32})
    shards.prepare_shard(services, "legacy", params, "1/1")
    preparation.capture_statistics(services, "legacy")
    assert not services.store.exists(keys.statistics("dd"))
    assert versions.accepted(services.store) == []
    preparation.transform_testing_data(services, "legacy", params)
    assert set(handoff.open_test(services, "legacy", "a test").paths) == {entry.path for entry in split.of("test")}
    assert [each.split for each in handoff.openings(services, "dd")] == ["legacy"]


def test_a_source_without_a_test_part_is_refused_for_a_legacy_run_before_anything_is_fetched(services):
    params = Params.of(services, {"split": "legacy"})
    with pytest.raises(InvalidSource, match="has no test part of its own"):
        preparation.check_source(services, "no-legacy", params)
    with pytest.raises(NotFound, match="has no legacy split"):
        handoff.read_split(services, "unknown", "legacy")


# --- the test part ------------------------------------------------------------------------------


def test_the_test_part_is_only_opened_with_a_reason_and_each_opening_is_logged_for_ever(services, files):
    split = built_until_split(services, files, "run:1", "aa")
    preparation.write_held_out(services, "run:1", "aa", 32)
    assert handoff.openings(services) == []
    with pytest.raises(NeuroLoopError, match=r"call open_test\(services, run_id, why\)"):
        handoff.load_arrays(services, "run:1", "test")

    first = handoff.open_test(services, "run:1", "score the candidate")
    assert set(first.paths) == {entry.path for entry in split.of("test")}
    handoff.open_test(services, "run:1", "score it again")
    found = handoff.openings(services, "aa")
    assert [(each.number, each.why) for each in found] == [(1, "score the candidate"), (2, "score it again")]
    assert {(each.version, each.split, each.run_id) for each in found} == {("aa", "grouped", "run:1")}
    assert found[0].at < found[1].at
    assert services.store.list(keys.TEST_OPENINGS) == [
        "data/test-openings/run-1-001.json",
        "data/test-openings/run-1-002.json",
    ]
    assert handoff.openings(services, "another") == []


def test_scoring_the_same_candidate_once_more_is_no_new_look_and_scoring_another_one_is(services, files):
    built_until_split(services, files, "tried", "aa")
    preparation.write_held_out(services, "tried", "aa", 32)
    before = len(handoff.openings(services))
    for subject in ("ab", "ab", "cd", "ab"):
        handoff.open_test(services, "tried", "score the candidate", subject=subject)
    found = handoff.openings(services)[before:]
    assert [(each.number, each.subject) for each in found] == [(1, "ab"), (2, "cd")]


def test_the_number_of_openings_and_the_last_reason_are_tags_of_the_run(services, files):
    import mlflow

    built_until_split(services, files, "tags", "aa")
    preparation.write_held_out(services, "tags", "aa", 32)
    for why in ("first look", "second look"):
        handoff.open_test(services, "tags", why)
    tags = (
        mlflow.MlflowClient(services.settings.mlflow_tracking_uri).get_run(handoff.tracked(services, "tags")).data.tags
    )
    assert (tags["test_openings"], tags["test_opened_for"]) == ("2", "second look")


# --- two runs on one source ---------------------------------------------------------------------


def watched(services: Services, before: Callable[[SourceFile], None]) -> Services:
    """The same; before each image that is fetched, `before` is called."""

    class Watched(Services):
        def source(self, url: str, *, seed: int) -> DataSource:
            found = super().source(url, seed=seed)
            read = found.read

            def told(file: SourceFile) -> bytes:
                before(file)
                return read(file)

            found.read = told
            return found

    return Watched(services.settings)


@pytest.fixture
def source(tmp_path) -> Path:
    for path, data in four_classes(11).items():
        (tmp_path / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / path).write_bytes(data)
    return tmp_path / "source"


def test_a_run_waits_for_another_one_on_the_same_source_and_each_gets_its_own_version(
    services, source, tmp_path, caplog
):
    params = Params.of(services, {"data_url": str(source)})
    reached, let_go = threading.Event(), threading.Event()

    def hold(file: SourceFile) -> None:
        if file.path == "pituitary/010.png":
            reached.set()
            assert let_go.wait(60)

    preparation.check_source(services, "side-1", params)
    with ThreadPoolExecutor(2) as pool, caplog.at_level("INFO", "neuroloop.pipeline"):
        first = pool.submit(preparation.download_data, watched(services, hold), "side-1", params)
        assert reached.wait(60)
        (source / "glioma/000.png").unlink()
        preparation.check_source(services, "side-2", params)
        second = pool.submit(preparation.download_data, Services(services.settings), "side-2", params)
        deadline = time.monotonic() + 60
        while not (second.done() or "waiting for another run" in caplog.text) and time.monotonic() < deadline:
            time.sleep(0.05)
        let_go.set()
        found = [each.result() for each in (first, second)]
    assert [each["images"] for each in found] == [44, 43]
    for number, each in enumerate(found):
        assert versions.restore(services, tmp_path / f"back-{number}", version=each["version"]).version


def test_a_download_that_broke_off_goes_on_and_fetches_all_anew_once_the_source_was_checked_again(services, source):
    params = Params.of(services, {"data_url": str(source)})
    fetched: list[str] = []

    def breaks(file: SourceFile) -> None:
        if file.path.startswith("pituitary/"):
            raise InvalidSource("the source is away")
        fetched.append(file.path)

    def notes(file: SourceFile) -> None:
        fetched.append(file.path)

    def broken_off() -> None:
        preparation.check_source(services, "broken", params)
        with pytest.raises(InvalidSource, match="away"):
            preparation.download_data(watched(services, breaks), "broken", params)

    broken_off()
    preparation.download_data(watched(services, notes), "broken", params)
    assert sorted(fetched) == [path.relative_to(source).as_posix() for path in sorted(source.rglob("*.png"))]
    broken_off()
    fetched.clear()
    preparation.check_source(services, "broken", params)
    preparation.download_data(watched(services, notes), "broken", params)
    assert len(fetched) == 44


# --- back to a data version ---------------------------------------------------------------------


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("remote", ["folder", "gcs"])
def test_the_images_a_registered_model_was_trained_on_come_back_exactly(request, tmp_path, mlflow_uri, remote):
    url = "" if remote == "folder" else f"gs://{request.getfixturevalue('gcs_bucket')}"
    source = tmp_path / "source"
    services = services_of(
        tmp_path, mlflow_uri, store_url=url, data_url=str(source), data_licence="CC0-1.0, png-grey=CC-BY-4.0"
    )
    params = Params.of(services, {})
    first = {f"Training/{path.replace('notumor', 'No Tumor')}": data for path, data in four_classes(11).items()}
    models, expected = {}, {}

    def build(run_id: str) -> None:
        preparation.check_source(services, run_id, params)
        version = preparation.download_data(services, run_id, params)["version"]
        expected[run_id] = contents(source)
        bundle = write_bundle(tmp_path / run_id, data_version=version)
        run = handoff.tracked(services, run_id)
        models[run_id] = services.registry.register(run, bundle, tags={"data_version": version})

    for path, data in first.items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(data)
    build(f"{remote}-1")
    (source / "Training/glioma/000.png").unlink()
    (source / "Training/pituitary/000.png").write_bytes(encode_png(picture(4242)))
    (source / "Training/No Tumor/new.png").write_bytes(encode_png(picture(4343)))
    build(f"{remote}-2")

    versions_by_run = {run_id: model.tags["data_version"] for run_id, model in models.items()}
    assert len(set(versions_by_run.values())) == 2
    back = tmp_path / "back"
    version = versions.restore(services, back, model=models[f"{remote}-1"].version).version
    assert version == versions_by_run[f"{remote}-1"]
    named = {path.replace("No Tumor", "notumor"): sha256 for path, sha256 in expected[f"{remote}-1"].items()}
    assert contents(back / "data") == named

    snapshot = Snapshot.model_validate_json(open_store(services.settings.store).get(keys.snapshot(version)))
    spelt = {image.source_path: image for image in snapshot.images}
    assert {path: image.sha256 for path, image in spelt.items()} == expected[f"{remote}-1"]
    assert {(image.origin, image.licence) for image in snapshot.images} == {("png-grey", "CC-BY-4.0")}

    assert versions.restore(services, back, model=models[f"{remote}-2"].version).version != version
    assert versions.restore(services, back, version=version).version == version
    (back / "data.dvc").write_text("as a pull of another version left it that broke off")
    (back / "data" / ".0123.tmp").write_bytes(b"half")
    assert versions.restore(services, back, model=models[f"{remote}-2"].version).version != version
    assert versions.restore(services, back, version=version).version == version
    stranger = back / "data" / "notes.txt"
    stranger.write_text("my own")
    with pytest.raises(InvalidSource, match=r"1 files would be removed or overwritten, first notes\.txt"):
        versions.restore(services, back, version=version)
    stranger.unlink()
    mine = tmp_path / "mine" / "data" / snapshot.images[0].path
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"my own, under a name that the version has too")
    with pytest.raises(InvalidSource, match=r"1 files would be removed or overwritten, first Training/glioma"):
        versions.restore(services, tmp_path / "mine", version=version)
    assert mine.read_bytes().startswith(b"my own")

    # One that the other version has as it is, so that only the look at what came back can tell.
    first, other, *rest = snapshot.images
    wrong = snapshot.model_copy(update={"images": (first, other.model_copy(update={"sha256": "0" * 64}), *rest)})
    services.store.put(keys.snapshot(version), wrong.model_dump_json().encode())
    with pytest.raises(InvalidSource, match="1 files are missing, too many or different, first Training/glioma"):
        versions.restore(services, back, version=version)


def test_an_unknown_model_or_data_version_cannot_be_brought_back(services, tmp_path):
    with pytest.raises(NotFound, match="no model version 987654"):
        versions.restore(services, tmp_path, model="987654")
    with pytest.raises(NotFound, match="no data version 00ff"):
        versions.restore(services, tmp_path, version="00ff")
    assert list(tmp_path.iterdir()) == []
