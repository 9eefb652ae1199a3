"""The task `promote_model` when it is tried again: its first decision stands, and nobody else's is undone."""

import uuid
from pathlib import Path

import pytest

from neuroloop.bootstrap import Services
from neuroloop.core.errors import NeuroLoopError
from neuroloop.core.schemas import LABELS, Promotion
from neuroloop.core.settings import Settings
from neuroloop.loop import handoff, pipeline
from neuroloop.loop.promotion import BASELINES
from neuroloop.serving.rollback import make_champion
from serving.running import write_bundle

GOOD = {"accuracy": 0.9, "macro_f1": 0.9} | {f"recall_{label}": 0.9 for label in LABELS}


@pytest.fixture
def services(tmp_path: Path, postgres_url: str, mlflow_uri: str) -> Services:
    return Services(Settings(home=tmp_path, database_url=postgres_url, mlflow_tracking_uri=mlflow_uri))


@pytest.fixture
def champion(services: Services, tmp_path: Path) -> str:
    version = registered(services, "first", tmp_path / "first")
    services.registry.set_alias("champion", version)
    return version


def registered(services: Services, name: str, folder: Path) -> str:
    run = services.registry.open_run(f"{name}-{uuid.uuid4()}", experiment=handoff.BUILD)
    return services.registry.register(run, write_bundle(folder), tags={}).version


@pytest.fixture
def run_id(services: Services, champion: str, tmp_path: Path) -> str:
    """A run that has evaluated and registered a model which is good enough."""
    run_id = f"manual__{uuid.uuid4()}"
    run = handoff.tracked(services, run_id)
    version = services.registry.register(run, write_bundle(tmp_path / "second", data_version="d2"), tags={}).version
    handoff.keep(services, run_id, "register_model", {"version": version})
    evaluated = {"test": GOOD, "baselines": {f"{name}_macro_f1": 0.3 for name in BASELINES}, "simulated": True}
    evaluated["data_version"] = "d2"
    outdated = {"version": champion, "reason": "its format is an older one"}
    about = {"split": "grouped", "test_images": dict.fromkeys(LABELS, 30), "champion": None, "outdated": outdated}
    handoff.keep(services, run_id, "evaluate_model", evaluated | about)
    return run_id


def alias(services: Services, name: str) -> str:
    return services.registry.by_alias(name).version


def test_a_decision_that_was_written_before_a_kill_is_carried_out_by_the_next_try(services, champion, run_id):
    version = handoff.kept(services, run_id, "register_model")["version"]
    row = pipeline.decision(services, run_id, version, handoff.BUILD)
    services.log.record_promotion(row)
    assert alias(services, "champion") == champion
    assert pipeline.promote_model(services, run_id)["promoted"]
    assert (alias(services, "champion"), alias(services, "previous")) == (version, champion)
    assert services.log.promotions() == [row]


def test_a_decision_stands_even_where_the_scores_are_others_by_now(services, champion, run_id):
    first = pipeline.promote_model(services, run_id)
    worse = handoff.kept(services, run_id, "evaluate_model") | {"test": GOOD | {"macro_f1": 0.1}}
    handoff.keep(services, run_id, "evaluate_model", worse)
    assert pipeline.promote_model(services, run_id) == first
    assert len(services.log.promotions()) == 1


def test_a_repeat_does_not_undo_what_a_person_has_decided_since(services, champion, run_id):
    promoted = pipeline.promote_model(services, run_id)
    make_champion(services, champion, by="ann", reason="Wrong on pituitary")
    assert alias(services, "champion") == champion
    assert pipeline.promote_model(services, run_id) == promoted
    assert (alias(services, "champion"), alias(services, "previous")) == (champion, promoted["version"])
    assert len(services.log.promotions()) == 2


def test_the_best_champion_of_a_data_version_is_the_bar_for_all_that_follow(services, champion, tmp_path):
    for number, (macro_f1, promoted, data_version) in enumerate(
        ((0.9, True, "d2"), (0.95, True, "d2"), (0.93, True, "d2"), (0.99, False, "d2"), (0.98, True, "d1"))
    ):
        run = services.registry.open_run(f"bar-{uuid.uuid4()}", experiment=handoff.BUILD)
        folder = write_bundle(tmp_path / str(number))
        version = services.registry.register(run, folder, tags={"data_version": data_version}).version
        metrics = {"candidate": GOOD | {"macro_f1": macro_f1}, "champion": None}
        row = Promotion(
            run_id=f"{uuid.uuid4()}", version=version, previous=None, promoted=promoted, checks=(), metrics=metrics
        )
        services.log.record_promotion(row)
    assert pipeline.best_before(services, "d2") == GOOD | {"macro_f1": 0.95}
    assert pipeline.best_before(services, "d3") is None
    services.registry.set_alias("champion", version)
    make_champion(services, champion, by="ann", reason="the others are no good")
    assert pipeline.best_before(services, "d2") is None  # what a person has taken back is no bar


def test_a_champion_that_cannot_be_fetched_stops_the_run_with_what_to_do(services, champion, tmp_path):
    damaged = write_bundle(tmp_path / "damaged")
    (damaged / "gate.json").write_text("{}")
    run = services.registry.open_run(f"damaged-{uuid.uuid4()}", experiment=handoff.BUILD)
    services.registry.set_alias("champion", services.registry.register(run, damaged, tags={}).version)
    with pytest.raises(NeuroLoopError, match=r"cannot be loaded to compare with.*damaged.*roll back"):
        pipeline.open_champion(services, services.registry.by_alias("champion"))


def test_no_alias_moves_where_somebody_moved_the_champion_after_the_decision(services, champion, run_id, tmp_path):
    version = handoff.kept(services, run_id, "register_model")["version"]
    services.log.record_promotion(pipeline.decision(services, run_id, version, handoff.BUILD))
    third = registered(services, "third", tmp_path / "third")
    services.registry.set_alias("champion", third)  # in MLflow's page, past the ledger
    pipeline.promote_model(services, run_id)
    assert alias(services, "champion") == third


def test_a_row_of_another_run_with_the_same_id_is_not_taken_for_this_ones(services, champion, run_id, tmp_path):
    pipeline.promote_model(services, run_id)
    other = registered(services, "other", tmp_path / "other")
    handoff.keep(services, run_id, "register_model", {"version": other})
    with pytest.raises(NeuroLoopError, match="another run"):
        pipeline.promote_model(services, run_id)
    assert alias(services, "champion") != other
