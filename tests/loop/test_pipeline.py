"""The build and a retraining without Airflow, on real parts and few small scans."""

import json

import pytest

from neuroloop.bootstrap import Services
from neuroloop.core import keys
from neuroloop.core.errors import InvalidSource, NotFound
from neuroloop.core.schemas import LABELS
from neuroloop.core.settings import Settings
from neuroloop.imaging.decode import encode_png
from neuroloop.imaging.phantom import scan
from neuroloop.loop import pipeline, retraining
from neuroloop.model.bundle import Bundle

RUN, AGAIN = "manual__2026-01-01T00:00:00+00:00", "scheduled__2026-01-02T00:00:00+00:00"
CORRECTIONS = 6


@pytest.fixture(scope="module")
def platform(tmp_path_factory, postgres_server, mlflow_uri, free_port):
    from neuroloop.adapters.smtp import start_sink

    port = free_port()
    services = Services(
        Settings(
            home=tmp_path_factory.mktemp("platform"),
            database_url=postgres_server.new_database(),
            mlflow_tracking_uri=mlflow_uri,
            notify_url=f"smtp://127.0.0.1:{port}",
            simulated_images=160,
            image_size=32,
            feedback_threshold=CORRECTIONS - 1,
        )
    )
    sink = start_sink(services.store, "127.0.0.1", port)
    yield services
    sink.stop()


@pytest.fixture(scope="module")
def built(platform):
    """The results of every step of one build."""
    params = pipeline.Params.of(platform, {"minutes": 2, "epochs": 2, "seed": 0, "data_url": ""})
    results = {}
    for name in ("check_source", "download_data"):
        results[name] = getattr(pipeline, name)(platform, RUN, params)
    results["audit_data"] = pipeline.audit_data(platform, RUN)
    results["capture_statistics"] = pipeline.capture_statistics(platform, RUN)
    for name in ("augment_input_data", "transform_testing_data", "building_model"):
        results[name] = getattr(pipeline, name)(platform, RUN, params)
    for name in ("evaluate_model", "register_model", "promote_model"):
        results[name] = getattr(pipeline, name)(platform, RUN)
    return results


def test_the_parts_hold_every_image_that_is_not_quarantined_and_share_no_group(platform, built):
    split = pipeline.read_split(platform, built["download_data"]["version"])
    assert len(split.entries) + len(split.quarantined) == built["check_source"]["images"] == 160
    parts = {}
    for entry in split.entries:
        parts.setdefault(entry.group, set()).add(entry.part)
    assert {len(found) for found in parts.values()} == {1}


def test_every_image_of_the_version_can_be_read_back_by_its_hash(platform, built):
    split = pipeline.read_split(platform, built["download_data"]["version"])
    read = pipeline.image_reader(platform)
    assert all(read(entry).startswith(b"\x89PNG") for entry in split.entries[:20])


def test_training_reads_the_augmented_shards(platform, built):
    from neuroloop.data import dataset

    shards = platform.store.list(keys.run(RUN, "shards/x")[:-1])
    assert len(shards) == pipeline.SHARDS
    first, second = (dataset.unpack(platform.store.get(key)) for key in shards[:2])
    assert first["images"].shape == second["images"].shape
    assert (first["images"] != second["images"]).any()
    assert built["building_model"]["epochs"] == 2


def test_the_registered_bundle_names_its_data_and_can_be_loaded_after_download(platform, built, tmp_path):
    version = built["register_model"]["version"]
    folder = platform.registry.download_bundle(version, tmp_path)
    bundle = Bundle.load(folder)
    assert bundle.manifest.data_version == built["download_data"]["version"]
    assert bundle.manifest.simulated
    assert bundle.image_size == 32
    registered = next(each for each in platform.registry.versions() if each.version == version)
    assert registered.tags["bundle_sha256"] == bundle.sha256
    assert registered.metrics["test_macro_f1"] == pytest.approx(built["evaluate_model"]["test"]["macro_f1"])


def test_the_ledger_says_in_words_why_a_model_was_or_was_not_promoted(platform, built):
    row = next(row for row in platform.log.promotions() if row.run_id == RUN)
    assert row.promoted == built["promote_model"]["promoted"]
    assert "trivial baseline" in row.reason


def test_a_repeated_promotion_changes_nothing(platform, built):
    rows = platform.log.promotions()
    assert pipeline.promote_model(platform, RUN) == built["promote_model"]
    assert platform.log.promotions() == rows


def test_a_repeated_registration_gives_the_same_version(platform, built):
    assert pipeline.register_model(platform, RUN)["version"] == built["register_model"]["version"]


def test_a_repeated_download_fetches_only_what_is_damaged(platform, built):
    params = pipeline.Params.of(platform, {"minutes": 1})
    data = next((platform.settings.home / "dvc").glob("*/data"))
    images = sorted(path for path in data.rglob("*") if path.is_file())
    images[0].unlink()
    images[1].write_bytes(b"damaged")
    untouched = images[2].stat().st_mtime_ns
    assert pipeline.download_data(platform, RUN, params) == built["download_data"]
    assert images[1].read_bytes().startswith(b"\x89PNG")
    assert images[2].stat().st_mtime_ns == untouched


def test_a_missing_source_fails_loudly_before_anything_is_fetched(platform, tmp_path):
    params = pipeline.Params.of(platform, {"data_url": str(tmp_path / "nowhere")})
    with pytest.raises(InvalidSource, match="nowhere"):
        pipeline.check_source(platform, "manual__missing", params)
    assert not platform.store.exists(keys.run("manual__missing", "check_source.json"))


def test_a_step_whose_input_is_missing_says_which_step_to_clear(platform):
    with pytest.raises(NotFound, match="clear download_data"):
        pipeline.audit_data(platform, "manual__nothing")


def correct(platform, number):
    for index in range(number):
        label = LABELS[index % 4]
        pixels = scan(label, index, seed=3, scanner="B", size=96).pixels
        platform.store.put(keys.correction(label, f"00000000-{index:04d}"), encode_png(pixels))


def test_at_the_threshold_nothing_is_retrained_and_one_more_trains_evaluates_and_decides_once(platform, built):
    platform.registry.set_alias("champion", built["register_model"]["version"])
    correct(platform, CORRECTIONS - 1)
    assert retraining.check_source_flag(platform, "too-early")["go"] is False
    told = len(platform.store.list(keys.MAIL))
    retraining.flag_false(platform, "too-early", by_hand=False)
    assert len(platform.store.list(keys.MAIL)) == told
    retraining.flag_false(platform, "too-early", by_hand=True)
    assert len(platform.store.list(keys.MAIL)) == told + 1

    correct(platform, CORRECTIONS)
    assert retraining.check_source_flag(platform, AGAIN)["go"] is True
    assert retraining.flag_true(platform, AGAIN) == {"batch": 1, "corrections": CORRECTIONS}
    assert retraining.flag_true(platform, "another") == {}
    assert retraining.check_source_flag(platform, "another")["go"] is False

    result = retraining.retrain_model(platform, AGAIN, minutes=2, epochs=1, seed=0)
    assert result["from_version"] == built["register_model"]["version"]
    assert result["trained_on"] + result["held_out"] == CORRECTIONS
    train = pipeline.load_arrays(platform, AGAIN, "train")
    base = pipeline.load_arrays(platform, RUN, "train")
    corrected = [path for path in train.paths if path.startswith(keys.CORRECTIONS)]
    assert train.paths[: len(base.paths)] == base.paths
    assert len(set(corrected)) == result["trained_on"] - result["left_out"]
    evaluated = retraining.evaluate_model(platform, AGAIN)
    assert evaluated["champion"]["version"] == built["register_model"]["version"]
    assert evaluated["champion"]["test"] == pytest.approx(built["evaluate_model"]["test"])
    registered = pipeline.register_model(platform, AGAIN, pipeline.RETRAINING)
    promoted = pipeline.promote_model(platform, AGAIN, pipeline.RETRAINING)
    assert registered["version"] != built["register_model"]["version"]
    assert promoted["previous"] == built["register_model"]["version"]
    sent = pipeline.send_email(platform, AGAIN, pipeline.RETRAINING)
    assert promoted["version"] in sent["subject"]
    assert platform.store.list(keys.run(AGAIN, "shards/x")[:-1]) == []


def test_what_the_steps_return_is_small_json(built):
    for name, result in built.items():
        assert len(json.dumps(result)) < 8000, name
