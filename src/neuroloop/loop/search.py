"""Hyper-parameter search: short trainings on the training part, compared on validation; the test part stays shut."""

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import optuna

from neuroloop.bootstrap import Services
from neuroloop.core import keys
from neuroloop.core.errors import InvalidSetting, NeuroLoopError
from neuroloop.data import dataset
from neuroloop.data.dataset import Arrays
from neuroloop.imaging.augment import AugmentParams
from neuroloop.loop import handoff
from neuroloop.loop.handoff import Result, epoch_metrics, log
from neuroloop.loop.params import Params
from neuroloop.loop.pipeline import log_dataset

SEARCH = "hyperparameter_search"
EPOCHS = 8
"""Of a trial: about a tenth of a full training of the compact network."""
_BEST = "grouped_validation_best_calibrated_loss"
"""MLflow metric: of a trial's epochs, and of the search's trials; what a training keeps its epoch by, too."""


@dataclass(frozen=True)
class Range:
    """What a trial may draw for one field of `TrainConfig`: evenly from `low` to `high`, or evenly in the logarithm.

    `relative` ones are multiples of what the architecture is trained with by default, so that one table serves all.
    """

    low: float
    high: float
    log: bool = False
    relative: bool = False


SEARCHED: Mapping[str, Range] = {
    "learning_rate": Range(0.2, 3.0, log=True, relative=True),
    "weight_decay": Range(0.1, 4.0, log=True, relative=True),
    "label_smoothing": Range(0.0, 0.1),
    "mixup": Range(0.0, 0.5),
    "erasing": Range(0.0, 0.5),
    "ema": Range(0.98, 0.9995),
}
"""The fields of `TrainConfig` that are searched. The strength of the affine augmentation is none of them."""


def search(
    services: Services, run_id: str, params: Params, *, trials: int, minutes: float, epochs: int = EPOCHS
) -> Result:
    """Look for hyper-parameters that reach a lower calibrated loss on validation than the defaults do.

    Needs the results of `audit_data`. The first of at most `trials` trials has the defaults (and what `params` say), so
    that the best is never worse; the others are drawn by a tree-structured Parzen estimator (Bergstra et al. 2011),
    which the seed fixes. Each trains `epochs` epochs from the same start on the same images. A trial worse than the
    median of those before it at the same epoch is given up (Golovin et al. 2017). When `minutes` are over, the epoch
    under way is the last one; a trial cut off by that does not count, and where none was, the seed fixes the result.
    Images of the training and the validation part are all that is read.

    In MLflow the search is a run and each trial a run below it. The result, with each trial, also stands as
    `search/best.json` in the artifacts and under the run's keys in the store; its `hyperparameters` are what a build
    takes. Beware: regularisation that pays in a long training costs in a short one, and the best of many scores on one
    validation part is flattered by chance. Raises `InvalidSetting` where there is nothing to try, `NeuroLoopError`
    where every trial diverged.
    """
    if trials < 1 or epochs < 1 or not minutes > 0:
        raise InvalidSetting("a search needs at least one trial, one epoch and some minutes")
    if services.settings.distribution == "multi_worker":
        raise InvalidSetting(
            "a search trains on one host", why="NEUROLOOP_DISTRIBUTION is multi_worker", fix="set it to auto for this"
        )
    deadline = time.monotonic() + minutes * 60
    split = handoff.run_split(services, run_id)
    read = handoff.image_reader(services)
    train, validation = (
        dataset.canonical_arrays(split.of(part), read, params.image_size) for part in ("train", "validation")
    )
    about = {
        "data_version": split.version,
        "split": split.name,
        "architecture": params.architecture,
        "image_size": params.image_size,
        "seed": params.seed,
        "epochs": epochs,
    }
    parent = services.registry.open_run(run_id, experiment=SEARCH, tags={"architecture": params.architecture})
    services.registry.log_params(parent, {**about, "trials": trials, "minutes": minutes})
    log_dataset(services, parent, split, "train", train)
    log_dataset(services, parent, split, "validation", validation)
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # each trial has its line in our own log
    study = new_study(params.seed, epochs)
    objective = Objective(services, run_id, parent, params, train, validation, epochs, deadline)
    study.enqueue_trial(objective.defaults())
    done = False
    try:
        # A training that diverges is a failed trial, not the end of the search.
        study.optimize(objective, trials, timeout=minutes * 60, catch=(FloatingPointError,), gc_after_trial=True)
        best = _best(study)
        result = best | {"hyperparameters": {**params.hyperparameters, **best["hyperparameters"]}, **about}
        data = json.dumps(result, indent=1).encode()
        services.registry.log_metrics(parent, {_BEST: result["val_calibrated_loss"]})
        services.registry.log_bytes(parent, "search/best.json", data)
        done = True
    finally:
        services.registry.close_run(parent, failed=not done)
    services.store.put(keys.run(run_id, "search/best.json"), data, content_type="application/json")
    return result


def new_study(seed: int, epochs: int) -> optuna.Study:
    """A study without trials, in memory: what it draws is fixed by `seed`, what it gives up by the median rule."""
    return optuna.create_study(
        direction="minimize",
        sampler=optuna.samplers.TPESampler(seed=seed % 2**32, n_startup_trials=5),
        # In the first third of the epochs the learning rate has hardly fallen, and the order of scores says little.
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=epochs // 3),
    )


@dataclass(frozen=True)
class Objective:
    """Trains with a trial's hyper-parameters and says how well it went; one MLflow run a trial."""

    services: Services
    run_id: str
    parent: str
    params: Params
    train: Arrays
    validation: Arrays
    epochs: int
    deadline: float

    def defaults(self) -> dict[str, float]:
        """The searched hyper-parameters as they would be without a search."""
        config = asdict(self._config({}))
        return {name: config[name] for name in SEARCHED}

    def __call__(self, trial: optuna.Trial) -> float:
        """The trial's lowest calibrated loss on validation. Raises `TrialPruned` if it is hopeless or out of time."""
        defaults = self.defaults()
        values = {name: _suggest(trial, name, each, defaults[name]) for name, each in SEARCHED.items()}
        registry = self.services.registry
        run = registry.open_run(f"{self.run_id}-trial-{trial.number:03d}", experiment=SEARCH, parent=self.parent)
        registry.log_params(run, values)
        failed = False
        try:
            best = self._score(trial, run, values)
            registry.log_metrics(run, {_BEST: best})
            registry.set_tags(run, {"trial": "complete"})
        except optuna.TrialPruned as reason:
            registry.set_tags(run, {"trial": f"given up: {reason}"})
            log.info("trial %d was given up: %s", trial.number, reason)
            raise
        except BaseException:
            failed = True
            raise
        finally:
            registry.close_run(run, failed=failed)
        log.info("trial %d: calibrated validation loss %.4f with %s", trial.number, best, json.dumps(values))
        return best

    def _score(self, trial: optuna.Trial, run: str, values: Mapping[str, float]) -> float:
        from neuroloop.model import devices, network, training  # TensorFlow: only where a model is trained

        losses: list[float] = []

        def on_epoch(epoch: int, metrics: dict[str, float]) -> None:
            self.services.registry.log_metrics(run, epoch_metrics("grouped", metrics), step=epoch)
            losses.append(metrics["val_calibrated_loss"])
            trial.report(losses[-1], epoch)
            if epoch + 1 == self.epochs:
                return
            if time.monotonic() > self.deadline:
                if trial.number == 0:  # even a part of it is better than no answer at all
                    raise _TimeOver
                raise optuna.TrialPruned(f"the time was over after epoch {epoch + 1} of {self.epochs}")
            if trial.should_prune():
                raise optuna.TrialPruned(f"worse than the median of earlier trials in epoch {epoch + 1}")

        devices.prepare()
        strategy = devices.strategy(self.services.settings.distribution)
        architecture, seed = self.params.architecture, self.params.seed
        weights = self.services.pretrained(architecture)
        images = dataset.augmented_epochs(
            self.train, epochs=self.epochs, generator=np.random.default_rng(seed), params=AugmentParams()
        )
        with contextlib.suppress(_TimeOver), strategy.scope():
            training.train(
                network.build(self.params.image_size, arch=architecture, seed=seed, weights=weights),
                [lambda: next(images)] * self.epochs,
                (self.validation.images, self.validation.labels),
                self._config(values),
                on_epoch=on_epoch,
            )
        return min(losses)

    def _config(self, values: Mapping[str, float]) -> Any:
        from neuroloop.model.hyperparameters import configure

        # No budget in minutes: with one the learning rate would follow the clock, and no trial could be repeated.
        chosen = {**self.params.hyperparameters, **values}
        return configure(self.params.architecture, chosen, epochs=self.epochs, minutes=None, seed=self.params.seed)


class _TimeOver(Exception):
    pass


def _suggest(trial: optuna.Trial, name: str, wanted: Range, default: float) -> float:
    low, high = wanted.low, wanted.high
    if wanted.relative and default == 0:  # no multiple of nothing is anything else
        return default
    if wanted.relative:
        low, high = low * default, high * default
    return trial.suggest_float(name, min(low, default), max(high, default), log=wanted.log)


def _best(study: optuna.Study) -> Result:
    if not any(trial.state is optuna.trial.TrialState.COMPLETE for trial in study.trials):
        raise NeuroLoopError(
            "no trial of the search came to an end", why="the loss of each grew beyond all bounds",
            fix="give a lower learning_rate to start from",
        )  # fmt: skip
    trials = [
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "val_calibrated_loss": trial.value if trial.state is optuna.trial.TrialState.COMPLETE else None,
            "epochs": len(trial.intermediate_values),
            "hyperparameters": trial.params,
        }
        for trial in study.trials
    ]
    return {
        "hyperparameters": study.best_params,
        "val_calibrated_loss": study.best_value,
        "default_val_calibrated_loss": trials[0]["val_calibrated_loss"],
        "trials": trials,
    }
