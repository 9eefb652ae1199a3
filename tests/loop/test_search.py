"""The search for hyper-parameters on a real MLflow, with few small simulated scans."""

import json
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import optuna
import pytest
from scipy.ndimage import gaussian_filter

from neuroloop.bootstrap import Services
from neuroloop.core import keys
from neuroloop.core.errors import InvalidSetting, InvalidSource
from neuroloop.core.schemas import LABELS
from neuroloop.core.settings import Settings
from neuroloop.data import dataset
from neuroloop.imaging.decode import encode_png
from neuroloop.loop import handoff, pipeline
from neuroloop.loop.params import Params
from neuroloop.loop.search import _BEST, SEARCH, SEARCHED, Objective, _suggest, new_study, search

RUN = "search-1"
TRIALS, EPOCHS = 2, 2


def drawn(label: int, number: int) -> np.ndarray:
    """Smooth noise with a bright square in the quarter of its class: unlike each other, and quick to make."""
    noise = gaussian_filter(np.random.default_rng([label, number]).normal(size=(64, 64)), 5)
    image = (40 + 100 * (noise - noise.min()) / np.ptp(noise)).astype(np.uint8)
    row, column = 8 + 32 * (label // 2), 8 + 32 * (label % 2)
    image[row : row + 12, column : column + 12] = 220
    return image


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, mlflow_uri):
    """A source, fetched and split; then every image that is neither trained on nor validated with is taken away."""
    source = tmp_path_factory.mktemp("drawn")
    for order, label in enumerate(LABELS):
        (source / label).mkdir()
        for number in range(30):
            (source / label / f"{number:02d}.png").write_bytes(encode_png(drawn(order, number)))
    services = Services(
        Settings(
            home=tmp_path_factory.mktemp("search"),
            mlflow_tracking_uri=mlflow_uri,
            image_size=32,
            architecture="plain64",
        )
    )
    params = Params.of(services, {"data_url": str(source)})
    for name, _ in pipeline.play(services, RUN, params):
        if name == "audit_data":
            break
    split = handoff.run_split(services, RUN)
    for entry in split.of("test", "calibration"):
        services.store.delete(keys.image(entry.md5))
    return services, params, split


@pytest.fixture(scope="module")
def found(prepared):
    services, params, _ = prepared
    return search(services, RUN, params, trials=TRIALS, minutes=5, epochs=EPOCHS)


def test_the_search_needs_no_image_of_the_test_part(prepared, found):
    services, _, split = prepared
    assert not any(services.store.exists(keys.image(entry.md5)) for entry in split.of("test"))
    assert not services.store.exists(keys.run(RUN, "test.npz"))
    assert not services.store.list("data/test-openings/")
    assert 0 < found["val_calibrated_loss"] < 1.4  # of guessing


def test_the_first_trial_has_the_defaults_so_the_best_is_never_worse(found):
    from neuroloop.model.hyperparameters import configure

    first, default = found["trials"][0], configure("plain64", {}, epochs=1, minutes=None, seed=0)
    assert first["hyperparameters"] == pytest.approx({name: getattr(default, name) for name in SEARCHED})
    assert found["default_val_calibrated_loss"] == first["val_calibrated_loss"] >= found["val_calibrated_loss"]
    assert found["val_calibrated_loss"] == min(trial["val_calibrated_loss"] or 9 for trial in found["trials"])


def test_each_trial_is_a_run_below_the_search_with_its_parameters_and_metrics(prepared, found, mlflow_uri):
    from mlflow import MlflowClient

    client = MlflowClient(mlflow_uri)
    parent = prepared[0].registry.open_run(RUN, experiment=SEARCH)
    experiment = client.get_run(parent).info.experiment_id
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'", order_by=["start_time"])
    assert len(children) == len(found["trials"]) == TRIALS
    for child, trial in zip(children, found["trials"], strict=True):
        assert {name: float(child.data.params[name]) for name in SEARCHED} == pytest.approx(trial["hyperparameters"])
        assert child.info.status == "FINISHED"
        assert child.data.tags["trial"].startswith("complete" if trial["state"] == "complete" else "given up")
        history = client.get_metric_history(child.info.run_id, "grouped_validation_calibrated_loss")
        assert len(history) == trial["epochs"]
        if trial["state"] == "complete":
            assert min(point.value for point in history) == pytest.approx(trial["val_calibrated_loss"])
            assert child.data.metrics[_BEST] == pytest.approx(trial["val_calibrated_loss"])
    run = client.get_run(parent)
    assert run.info.status == "FINISHED"
    assert run.data.metrics[_BEST] == pytest.approx(found["val_calibrated_loss"])
    assert {each.dataset.name for each in run.inputs.dataset_inputs} == {"grouped_train", "grouped_validation"}


def test_the_run_of_the_steps_before_a_search_is_closed_and_one_that_fails_is_marked_failed(prepared, mlflow_uri):
    from mlflow import MlflowClient

    client, services, params = MlflowClient(mlflow_uri), *prepared[:2]
    assert client.get_run(handoff.tracked(services, RUN)).info.status == "FINISHED"
    nowhere = params.model_copy(update={"data_url": f"{services.settings.home}/nowhere"})
    with pytest.raises(InvalidSource):
        list(pipeline.play(services, "search-5", nowhere))
    assert client.get_run(handoff.tracked(services, "search-5")).info.status == "FAILED"


def test_what_is_switched_off_stays_off_in_every_trial(prepared):
    services, params, _ = prepared
    off = params.model_copy(update={"hyperparameters": {"weight_decay": 0}})
    objective = Objective(services, "search-6", "", off, None, None, EPOCHS, time.monotonic())
    assert (
        _suggest(
            new_study(0, EPOCHS).ask(), "weight_decay", SEARCHED["weight_decay"], objective.defaults()["weight_decay"]
        )
        == 0
    )


def test_a_search_takes_any_seed_that_a_build_takes():
    drawn = [new_study(seed, epochs=1).ask().suggest_float("x", 0, 1) for seed in (5, 2**32 + 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_trial_worse_than_the_median_of_those_before_it_is_given_up_and_its_run_says_so(prepared, mlflow_uri):
    from mlflow import MlflowClient

    services, params, split = prepared
    read = handoff.image_reader(services)
    train, validation = (dataset.canonical_arrays(split.of(part), read, 32) for part in ("train", "validation"))
    parent = services.registry.open_run("search-4", experiment=SEARCH)
    objective = Objective(services, "search-4", parent, params, train, validation, 30, time.monotonic() + 600)
    study = new_study(0, epochs=1)
    for _ in range(3):  # as good as can be from the first epoch on
        study.add_trial(optuna.create_trial(value=0.0, intermediate_values=dict.fromkeys(range(30), 0.0)))
    study.optimize(objective, 1)
    last = study.trials[-1]
    assert last.state is optuna.trial.TrialState.PRUNED
    assert list(last.intermediate_values) == [0]
    run = services.registry.open_run("search-4-trial-003", experiment=SEARCH)
    stored = MlflowClient(mlflow_uri).get_run(run)
    assert stored.data.tags["trial"] == "given up: worse than the median of earlier trials in epoch 1"
    assert stored.info.status == "FINISHED"


def test_the_result_stands_in_the_store_and_in_mlflow(prepared, found, mlflow_uri, tmp_path):
    from mlflow import MlflowClient

    services, _, _ = prepared
    stored = json.loads(services.store.get(keys.run(RUN, "search/best.json")))
    assert stored == json.loads(json.dumps(found))
    parent = services.registry.open_run(RUN, experiment=SEARCH)
    file = MlflowClient(mlflow_uri).download_artifacts(parent, "search/best.json", str(tmp_path))
    assert json.loads(Path(file).read_text()) == stored


def test_a_build_takes_what_the_search_found_and_refuses_anything_else(prepared, found):
    from neuroloop.model.hyperparameters import configure

    services, _, _ = prepared
    params = Params.of(services, {"hyperparameters": found["hyperparameters"]})
    config = configure("plain64", params.hyperparameters, epochs=3, minutes=None, seed=7)
    assert {name: getattr(config, name) for name in SEARCHED} == pytest.approx(found["hyperparameters"])
    assert (config.epochs, config.seed) == (3, 7)
    for wrong, why in (
        ({"learning_rte": 1e-3}, "'learning_rte' is no hyper-parameter.*learning_rate"),
        ({"learning_rate": "fast"}, "learning_rate is not valid"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"mixup": 1.5}, "mixup is 1.5.*at most 1"),
        ({"batch": 0}, "batch is 0.*at least 1"),
        ({"seed": 1}, "'seed' is no hyper-parameter"),
    ):
        with pytest.raises(InvalidSetting, match=why):
            Params.of(services, {"hyperparameters": wrong})


def test_every_searched_name_is_a_field_of_the_training_configuration():
    from neuroloop.model.training import TrainConfig

    assert SEARCHED.keys() <= {each.name for each in fields(TrainConfig)}


def test_the_same_seed_gives_the_same_search(prepared, found):
    services, params, _ = prepared
    for step in ("check_source", "download_data"):
        handoff.keep(services, "search-5", step, handoff.kept(services, RUN, step))
    assert search(services, "search-5", params, trials=TRIALS, minutes=5, epochs=EPOCHS) == found


def test_a_search_whose_time_is_short_still_answers_with_its_first_trial(prepared):
    services, params, _ = prepared
    for step in ("check_source", "download_data"):
        handoff.keep(services, "search-2", step, handoff.kept(services, RUN, step))
    found = search(services, "search-2", params, trials=50, minutes=0.02, epochs=500)
    assert len(found["trials"]) == 1
    assert found["trials"][0]["state"] == "complete"


def test_a_search_without_trials_or_time_is_refused(prepared):
    services, params, _ = prepared
    for nothing in ({"trials": 0, "minutes": 1}, {"trials": 1, "minutes": 0}, {"trials": 1, "minutes": 1, "epochs": 0}):
        with pytest.raises(InvalidSetting, match="at least one trial"):
            search(services, "search-3", params, **nothing)
