"""The build and a retraining without Airflow, on real parts and few small scans."""

import json
import re

import numpy as np
import pytest

from adapters.test_prediction_log import prediction
from neuroloop.bootstrap import Services
from neuroloop.core import keys
from neuroloop.core.errors import InvalidSource, NotFound
from neuroloop.core.mail import parse_mail
from neuroloop.core.schemas import LABELS, PARTS, Split, SplitEntry
from neuroloop.core.settings import Settings
from neuroloop.imaging.decode import decode, encode_png
from neuroloop.imaging.phantom import scan
from neuroloop.loop import corrected, feedback, handoff, pipeline, preparation, retraining, splitting, versions
from neuroloop.loop.params import Params
from neuroloop.model.bundle import Bundle

RUN, AGAIN = "manual__2026-01-01T00:00:00+00:00", "scheduled__2026-01-02T00:00:00+00:00"
CORRECTIONS = 6
IMAGES = 120


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
            simulated_images=IMAGES,
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
    given = {"minutes": 2, "epochs": 2, "architecture": "tiny"}
    given["hyperparameters"] = {"learning_rate": 2e-3, "mixup": 0.3}
    params = Params.of(platform, {**given, "data_url": ""})
    results = {}
    for name, result in pipeline.play(platform, RUN, params):
        results[name] = result
        if name == "promote_model":
            break
    return results


def test_the_parts_hold_every_image_that_is_not_quarantined_and_share_no_group(platform, built):
    split = handoff.read_split(platform, built["download_data"]["version"])
    assert len(split.entries) + len(split.quarantined) == built["check_source"]["images"] == IMAGES
    parts = {}
    for entry in split.entries:
        parts.setdefault(entry.group, set()).add(entry.part)
    assert {len(found) for found in parts.values()} == {1}


def test_every_image_of_the_version_can_be_read_back_by_its_hash(platform, built):
    split = handoff.read_split(platform, built["download_data"]["version"])
    read = handoff.image_reader(platform)
    assert all(read(entry).startswith(b"\x89PNG") for entry in split.entries[:20])


def test_the_run_says_what_was_trained_how_and_on_what(platform, built, mlflow_uri):
    from mlflow import MlflowClient

    run = MlflowClient(mlflow_uri).get_run(handoff.tracked(platform, RUN))
    assert (run.data.params["architecture"], run.data.tags["architecture"]) == ("tiny", "tiny")
    assert run.data.params["pretrained"] == "none"
    assert float(run.data.params["train_learning_rate"]) == 2e-3
    assert run.data.tags["device"].startswith(("CPU", "GPU"))


def test_training_reads_the_augmented_shards(platform, built):
    shards = handoff.training_shards(platform, RUN)
    assert len(shards) == handoff.SHARDS
    (first, labels), (second, _) = (load() for load in shards[:2])
    assert first.shape == second.shape == (len(labels), 32, 32)
    assert (first != second).any()
    assert built["building_model"]["epochs"] == 2


def test_the_registered_bundle_names_its_data_and_can_be_loaded_after_download(platform, built, tmp_path):
    version = built["register_model"]["version"]
    folder = platform.registry.download_bundle(version, tmp_path)
    bundle = Bundle.load(folder)
    assert bundle.manifest.data_version == built["download_data"]["version"]
    assert bundle.manifest.simulated
    assert bundle.manifest.architecture == "tiny"
    assert bundle.image_size == 32
    registered = next(each for each in platform.registry.versions() if each.version == version)
    assert registered.tags["bundle_sha256"] == bundle.sha256
    assert registered.metrics["grouped_test_macro_f1"] == pytest.approx(built["evaluate_model"]["test"]["macro_f1"])


def test_the_model_card_of_the_run_stands_in_the_bundle_in_mlflow_and_as_the_description(
    platform, built, mlflow_uri, tmp_path
):
    from mlflow import MlflowClient

    version = built["register_model"]["version"]
    folder = platform.registry.download_bundle(version, tmp_path)
    card = Bundle.load(folder).card
    text = (folder / "card.md").read_text()
    split = handoff.read_split(platform, built["download_data"]["version"])
    assert card.scores == pytest.approx(built["evaluate_model"]["test"])
    assert card.data.parts == {part: len(split.of(part)) for part in PARTS}
    assert card.data.shortcuts.keys() >= {"border", "histogram"}
    assert card.training["epochs"] == built["building_model"]["epochs"]
    assert card.augmentation.keys() >= {"rotation_degrees"}
    assert card.test_openings == 1
    assert built["register_model"]["shortcomings"][0].startswith("It was trained on simulated scans only")
    client = MlflowClient(mlflow_uri)
    run = handoff.tracked(platform, RUN)
    assert {each.path for each in client.list_artifacts(run, "model-card")} == {
        "model-card/card.json",
        "model-card/card.md",
    }
    described = client.get_model_version("brain-tumor-classifier", version).description
    assert described.split("\n\n*The rest")[0] in text
    assert described.startswith("# Model card: brain-tumor-classifier")


def test_the_evaluation_is_in_mlflow_with_its_plots_its_data_sets_and_metrics_named_by_the_split(
    platform, built, mlflow_uri
):
    from mlflow import MlflowClient

    client = MlflowClient(mlflow_uri)
    run = client.get_run(handoff.tracked(platform, RUN))
    names = {name for name in run.data.metrics if "_test_" in name}
    assert {"grouped_test_accuracy", "grouped_test_stress_blur_drop", "grouped_test_coverage_90_glioma"} <= names
    assert {name.split("_")[0] for name in names} == {"grouped"}
    files = {each.path for each in client.list_artifacts(run.info.run_id, "evaluation")}
    plots = {"confusion.png", "reliability.png", "risk_coverage.png", "errors.png"}
    assert files >= {f"evaluation/{name}" for name in {*plots, "scores.json"}}
    inputs = {each.dataset.name: each for each in run.inputs.dataset_inputs}
    assert inputs.keys() == {f"grouped_{part}" for part in PARTS}
    profile = json.loads(inputs["grouped_test"].dataset.profile)
    assert profile["data_version"] == built["download_data"]["version"]
    assert profile["images"] == built["transform_testing_data"]["test"]


def test_the_ledger_says_in_words_why_a_model_was_or_was_not_promoted(platform, built):
    row = next(row for row in platform.log.promotions() if row.run_id == RUN)
    assert row.promoted == built["promote_model"]["promoted"]
    assert "trivial baseline" in row.reason


def test_a_repeated_promotion_changes_nothing(platform, built):
    rows = platform.log.promotions()
    assert pipeline.promote_model(platform, RUN) == built["promote_model"]
    assert platform.log.promotions() == rows


def test_a_legacy_run_moves_no_alias_whatever_its_scores_and_the_ledger_says_why(platform, built):
    legacy = "manual__legacy"
    best = dict.fromkeys(built["evaluate_model"]["test"], 1.0)
    evaluated = built["evaluate_model"] | {"split": "legacy", "test": best, "leaked": {"share": 0.757}}
    handoff.keep(platform, legacy, "evaluate_model", evaluated | {"champion": None})
    with handoff.unzipped(platform.store.get(keys.run(RUN, "bundle.zip"))) as folder:
        registered = platform.registry.register(handoff.tracked(platform, legacy), folder, tags={"split": "legacy"})
    handoff.keep(platform, legacy, "register_model", {"version": registered.version})
    promoted = pipeline.promote_model(platform, legacy)
    assert promoted["promoted"] is False
    assert "legacy, 75.7 % leaked" in promoted["reason"]
    held = next(each for each in platform.registry.versions() if each.version == registered.version)
    assert held.aliases == ()
    assert "legacy, 75.7 % leaked" in next(row for row in platform.log.promotions() if row.run_id == legacy).reason


def test_a_repeated_registration_gives_the_same_version(platform, built):
    assert pipeline.register_model(platform, RUN)["version"] == built["register_model"]["version"]


def test_a_download_that_broke_off_fetches_only_what_is_damaged_when_it_is_tried_again(platform, built, monkeypatch):
    params = Params.of(platform, {"minutes": 1})

    def killed(workspace):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(platform.versions, "commit", killed)  # all is fetched, and not versioned yet
        with pytest.raises(KeyboardInterrupt):
            preparation.download_data(platform, RUN, params)
    data = next((platform.settings.home / "dvc").glob("*/data"))
    images = sorted(path for path in data.rglob("*") if path.is_file())
    images[0].unlink()
    images[1].write_bytes(b"damaged")
    (journal,) = platform.settings.home.glob("dvc/*/fetched/*")
    assert len(journal.read_text().splitlines()) == IMAGES
    journal.write_text(journal.read_text()[:-1] + "\n0f3a")  # a power cut in the middle of a line
    untouched = images[2].stat().st_mtime_ns
    assert preparation.download_data(platform, RUN, params) == built["download_data"]
    assert images[1].read_bytes().startswith(b"\x89PNG")
    assert images[2].stat().st_mtime_ns == untouched


def test_a_missing_source_fails_loudly_before_anything_is_fetched(platform, tmp_path):
    params = Params.of(platform, {"data_url": str(tmp_path / "nowhere")})
    with pytest.raises(InvalidSource, match="nowhere"):
        preparation.check_source(platform, "manual__missing", params)
    assert not platform.store.exists(keys.run("manual__missing", "check_source.json"))


def test_a_step_whose_input_is_missing_says_which_step_to_clear(platform):
    with pytest.raises(NotFound, match="clear download_data"):
        preparation.audit_data(platform, "manual__nothing")


def test_a_held_out_correction_that_was_learned_from_the_data_tests_nothing(platform, built):
    split = handoff.read_split(platform, built["download_data"]["version"])
    learned = decode(handoff.image_reader(platform)(split.of("train")[0]))
    pictures = {"learned": learned[:, ::-1], "new": scan("glioma", 77, seed=9, scanner="B", size=96).pixels}
    found = [
        feedback.Correction(key=f"{keys.DATA}tests/{name}.png", label="glioma", sha256=name, held_out=True)
        for name in pictures
    ]
    for correction, pixels in zip(found, pictures.values(), strict=True):
        platform.store.put(correction.key, encode_png(np.ascontiguousarray(pixels)))
    kept, held_out, left_out = corrected.divided(platform, split.version, found)
    assert (kept, [correction.sha256 for correction in held_out]) == ([], ["new"])
    assert "which is trained on" in left_out[found[0].key]


@pytest.mark.parametrize("learned_first", [True, False])
def test_of_twins_in_two_batches_the_first_decides_whether_they_are_learned_or_tested(platform, built, learned_first):
    version = built["download_data"]["version"]
    pixels = scan("glioma", 55, seed=7, scanner="B", size=96).pixels
    batches = (1, 2) if learned_first else (2, 1)
    learned, held = (
        feedback.Correction(
            key=f"{keys.DATA}tests/in-two-batches-{n}.png", label="glioma", sha256=str(n), held_out=bool(n), batch=batch
        )
        for n, batch in enumerate(batches)
    )
    platform.store.put(learned.key, encode_png(pixels))
    platform.store.put(held.key, encode_png(np.ascontiguousarray(pixels[:, ::-1])))
    kept, held_out, left_out = corrected.divided(platform, version, [learned, held])
    assert corrected.tested_on(platform, version, [learned, held]) == held_out
    if learned_first:
        assert (kept, held_out) == ([learned], [])
        assert "an earlier batch has trained on" in left_out[held.key]
    else:
        assert (kept, held_out) == ([], [held])


def test_a_correction_that_was_never_learned_keeps_no_later_twin_from_testing(platform, built):
    split = handoff.read_split(platform, built["download_data"]["version"])
    pixels = decode(handoff.image_reader(platform)(split.of("validation")[0]))
    never, held = (
        feedback.Correction(
            key=f"{keys.DATA}tests/never-learned-{n}.png", label="glioma", sha256=str(n), held_out=bool(n), batch=n + 1
        )
        for n in range(2)
    )
    for correction in (never, held):
        platform.store.put(correction.key, encode_png(pixels))
    kept, held_out, left_out = corrected.divided(platform, split.version, [never, held])
    assert corrected.tested_on(platform, split.version, [never, held]) == held_out
    assert (kept, held_out) == ([], [held])
    assert "(validation), which is held out" in left_out[never.key]


def test_a_simulated_scan_is_learned_from_by_models_of_such_only_and_one_picture_counts_once(platform, built):
    split = handoff.read_split(platform, built["download_data"]["version"])
    real = split.model_copy(update={"version": "real-scans", "simulated": False})
    platform.store.put(keys.split(real.version), real.model_dump_json().encode())
    found = []
    for n, consent in enumerate(("simulated", "training", "training")):
        row = prediction().model_copy(update={"consent": consent})
        platform.log.record_prediction(row)
        key = f"{keys.DATA}tests/{row.id}.png"
        platform.store.put(key, encode_png(scan("glioma", 91 + min(n, 1), seed=5, scanner="B", size=96).pixels))
        found.append(feedback.Correction(key=key, label="glioma", sha256=str(min(n, 1)), held_out=False))
    kept, _, left_out = corrected.divided(platform, split.version, found)
    assert (kept, list(left_out)) == (found[:2], [found[2].key])
    kept, _, left_out = corrected.divided(platform, real.version, found)
    assert kept == found[1:2]
    assert left_out[found[0].key] == "a simulated scan"


def test_similar_corrections_are_one_group_when_a_score_s_interval_is_drawn(platform):
    one, other = (scan("glioma", index, seed=5, scanner="B", size=96).pixels for index in (3, 4))
    found = []
    for name, pixels in {"a": one, "mirrored": one[:, ::-1], "b": other}.items():
        key = f"{keys.DATA}tests/{name}.png"
        platform.store.put(key, encode_png(np.ascontiguousarray(pixels)))
        found.append(feedback.Correction(key=key, label="glioma", sha256=name, held_out=True))
    assert corrected.arrays_of(platform, found, 32).groups.tolist() == [0, 0, 2]
    assert len(corrected.arrays_of(platform, [], 32).groups) == 0


def test_a_correction_whose_twin_is_frozen_in_another_data_versions_test_part_is_not_trained_on(platform, built):
    version = built["download_data"]["version"]
    pixels = [scan("glioma", index, seed=5, scanner="B", size=96).pixels for index in (1, 2)]
    platform.store.put(keys.image("ab" * 16), encode_png(pixels[0]))
    number = keys.next_number(platform.store.list(keys.SPLIT_REGISTRY))
    elsewhere = splitting.Decisions(version="v0", simulated=True, parts={"s": "test"}, md5={"s": "ab" * 16})
    platform.store.put(keys.split_decisions(number), elsewhere.model_dump_json().encode())
    found = [
        feedback.Correction(key=f"{keys.DATA}tests/{n}.png", label="glioma", sha256=str(n), held_out=False)
        for n in range(2)
    ]
    for correction, image in zip(found, pixels, strict=True):
        platform.store.put(correction.key, encode_png(image))
    try:
        kept, _, left_out = corrected.divided(platform, version, found)
    finally:
        platform.store.delete(keys.split_decisions(number))
    assert [correction.sha256 for correction in kept] == ["1"]
    assert "data version v0 (test), which is held out" in left_out[found[0].key]


def test_a_source_too_small_for_the_gate_is_refused_before_anything_is_trained():
    def split(groups: int) -> Split:
        return Split.model_construct(
            entries=tuple(
                SplitEntry(path=f"{part}-{n}", label="glioma", part=part, group=n % groups, sha256="", md5="")
                for part in ("train", "validation")
                for n in range(40)
            )
        )

    preparation.refuse_few(split(10))
    with pytest.raises(InvalidSource, match="train part has only 9 unlike images"):
        preparation.refuse_few(split(9))


def test_looks_at_the_same_test_images_count_whatever_the_data_version(platform, built):
    split = handoff.read_split(platform, built["download_data"]["version"])
    before = pipeline.looks_at(platform, split)
    grown = split.model_copy(update={"version": "grown"})
    platform.store.put(keys.split("grown"), grown.model_dump_json().encode())
    handoff.log_opening(platform, "manual__grown", "a look", version="grown")
    other = split.model_copy(update={"version": "other", "entries": tuple(split.of("train"))})
    platform.store.put(keys.split("other"), other.model_dump_json().encode())
    handoff.log_opening(platform, "manual__other", "a look", version="other")
    assert before >= 1
    assert pipeline.looks_at(platform, split) == before + 1


def correct(platform, number):
    for index in range(number):
        label = LABELS[index % 4]
        pixels = scan(label, index, seed=3, scanner="B", size=96).pixels
        platform.store.put(keys.correction(label, f"00000000-{index:04d}"), encode_png(pixels))


def test_at_the_threshold_nothing_is_retrained_and_one_more_trains_evaluates_and_decides_once(
    platform, built, tmp_path
):
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
    assert result["trained_on"] + result["held_out"] + result["left_out"] == CORRECTIONS
    # As its champion was trained, at a third of the rate.
    assert (result["settings"]["mixup"], result["settings"]["learning_rate"]) == (0.3, pytest.approx(2e-3 / 3))
    train = handoff.load_arrays(platform, AGAIN, "train")
    base = handoff.load_arrays(platform, RUN, "train")
    corrected = [path for path in train.paths if path.startswith(keys.CORRECTIONS)]
    assert train.paths[: len(base.paths)] == base.paths
    assert len(set(corrected)) == result["trained_on"]
    evaluated = retraining.evaluate_model(platform, AGAIN)
    assert evaluated["champion"]["version"] == built["register_model"]["version"]
    assert evaluated["champion"]["test"] == pytest.approx(built["evaluate_model"]["test"])
    registered = pipeline.register_model(platform, AGAIN, handoff.RETRAINING)
    promoted = pipeline.promote_model(platform, AGAIN, handoff.RETRAINING)
    assert registered["version"] != built["register_model"]["version"]
    assert any(limit.startswith("It was trained on simulated") for limit in registered["shortcomings"])
    with handoff.open_bundle(platform, AGAIN) as bundle:
        assert bundle.card.model.from_version == built["register_model"]["version"]
        assert bundle.card.feedback == pytest.approx(evaluated["feedback"])
        assert bundle.sha256 == registered["bundle_sha256"]
    assert promoted["previous"] == built["register_model"]["version"]
    taken_back = corrected[0]
    platform.store.delete(taken_back)
    brought = versions.restore(platform, tmp_path, model=registered["version"])
    assert (brought.corrections, brought.missing, brought.unknown) == (result["trained_on"] - 1, 1, False)
    assert versions.restore(platform, tmp_path, model=registered["version"]) == brought  # once more, over the first
    files = {file.relative_to(tmp_path / "corrections") for file in (tmp_path / "corrections").rglob("*.png")}
    assert {file.as_posix() for file in files} == {
        path.removeprefix(keys.CORRECTIONS) for path in set(corrected) - {taken_back}
    }
    surplus = tmp_path / "corrections" / "another.png"
    surplus.write_bytes(b"x")
    with pytest.raises(InvalidSource, match=r"1 files, first another\.png"):
        versions.restore(platform, tmp_path, model=registered["version"])
    surplus.unlink()
    lists = keys.run(AGAIN, "corrections.json")
    which = platform.store.get(lists)
    platform.store.delete(lists)  # as an earlier version of the program left it
    assert versions.restore(platform, tmp_path, model=registered["version"]).unknown
    platform.store.put(lists, which)
    sent = pipeline.send_email(platform, AGAIN, handoff.RETRAINING)
    assert promoted["version"] in sent["subject"]
    mails = [parse_mail(platform.store.get(key)) for key in platform.store.list(keys.MAIL)]
    (mail,) = (mail for mail in mails if mail.subject == sent["subject"])
    assert re.search(r"Rules that never look at a lesion, macro-F1: always the largest class 0\.\d+, ", mail.body)
    assert "What falls short:" in mail.body
    # A build meets the champion on the held-out corrections, too, though it has learned from none.
    anew = pipeline.evaluate_model(platform, RUN)
    assert anew["feedback"]["images"] == result["held_out"] >= 1
    assert anew["champion"]["feedback"].keys() == anew["feedback"].keys()
    assert platform.store.list(keys.run(AGAIN, "shards/x")[:-1]) == []
    assert not platform.store.exists(keys.run(AGAIN, "train.npz"))  # uploads, which no erasure would find there


def test_a_batch_that_teaches_nothing_starts_no_training(platform, built):
    platform.registry.set_alias("champion", built["register_model"]["version"])
    again = platform.store.list(keys.CORRECTIONS)[0]
    for index in range(CORRECTIONS):  # one picture, learned from already
        name = f"00000001-{index:04d}"
        platform.store.put(keys.correction(again.split("/")[-2], name), platform.store.get(again))
    run_id = "manual__nothing_new"
    assert retraining.check_source_flag(platform, run_id)["go"] is True
    assert retraining.flag_true(platform, run_id) == {}
    assert retraining.check_source_flag(platform, "after")["waiting"] == 0
    for index in range(CORRECTIONS):
        platform.store.delete(keys.correction(again.split("/")[-2], f"00000001-{index:04d}"))


def test_what_the_steps_return_is_small_json(built):
    for name, result in built.items():
        assert len(json.dumps(result)) < 8000, name
