"""A build's training on two hosts, which are two processes here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from neuroloop.bootstrap import Services
from neuroloop.core import keys
from neuroloop.core.errors import InvalidSetting, NotFound
from neuroloop.core.schemas import LABELS, Split
from neuroloop.core.settings import Settings
from neuroloop.data.dataset import Arrays
from neuroloop.data.packed import pack
from neuroloop.imaging.canonical import canonicalize
from neuroloop.imaging.phantom import scan
from neuroloop.loop import handoff, hosts, search
from neuroloop.model.training import TrainConfig

RUN = "manual-1"


def tf_config(index: int, ports: list[int]) -> str:
    addresses = [f"127.0.0.1:{port}" for port in ports]
    return json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})


def some(count: int, first: int) -> Arrays:
    scans = [canonicalize(scan(LABELS[i % 4], first + i, size=64).pixels, 32) for i in range(count)]
    numbers = np.arange(count)
    return Arrays(np.stack(scans), numbers % 4, numbers, tuple(map(str, numbers)))


def left(services: Services) -> set[str]:
    return {key.rpartition("/")[2] for key in services.store.list(keys.run(RUN, "x").removesuffix("x"))}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, free_port):
    """What the two hosts ended with, what was in the store before, and the store."""
    home = tmp_path_factory.mktemp("hosts")
    services = Services(Settings(home=home))
    for part, count, first in (("train", 52, 0), ("validation", 16, 100), ("calibration", 16, 200)):
        services.store.put(keys.run(RUN, f"{part}.npz"), some(count, first).to_bytes())
    train = handoff.load_arrays(services, RUN, "train")
    services.store.put(handoff.shard_key(RUN, 0), pack(images=train.images, labels=train.labels))
    split = Split(version="v1", simulated=True, entries=())
    services.store.put(keys.split("v1"), split.model_dump_json().encode())
    handoff.keep(services, RUN, "held_out", {"version": "v1", "split": "grouped"})
    before = left(services)
    ports = [free_port(), free_port()]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).parent / "training_host.py"),
                str(home),
                RUN,
                str(home / f"{index}.npz"),
            ],
            env={**os.environ, "TF_CONFIG": tf_config(index, ports), "NEUROLOOP_ENV_FILE": str(home / "none")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text[-3000:]
    return services, before, [dict(np.load(home / f"{index}.npz")) for index in (0, 1)], said


def test_two_hosts_take_the_same_steps_under_a_time_budget_and_end_with_equal_weights(trained):
    *_, (chief, other), said = trained
    assert len(chief["losses"]) > 1
    assert chief.keys() == other.keys()
    for name, values in chief.items():
        assert np.array_equal(values, other[name]), name
    assert f"'epochs': {len(chief['losses'])}" in said[1]


def test_only_the_chief_leaves_something(trained):
    services, before, *_ = trained
    assert left(services) - before == {"training.json", "bundle.zip", "in-use"}
    with handoff.open_bundle(services, RUN) as bundle:
        assert bundle.predict(some(2, 0).images).probabilities.shape == (2, 4)


def test_each_host_is_told_which_command_is_its_own(tmp_path, monkeypatch):
    services = Services(Settings(home=tmp_path, distribution="multi_worker"))
    monkeypatch.setenv("TF_CONFIG", tf_config(1, [1, 2]))
    with pytest.raises(InvalidSetting, match=f"not the chief.*neuroloop train-worker {RUN}"):
        hosts.call(services, RUN, TrainConfig(epochs=1), size=32, architecture="tiny")
    waited = []
    with pytest.raises(NotFound, match=r"began no training.*--wait"):
        hosts.assist(services, RUN, wait=3, pause=waited.append)
    assert len(waited) == 3
    monkeypatch.setenv("TF_CONFIG", tf_config(0, [1, 2]))
    with pytest.raises(InvalidSetting, match="is the chief"):
        hosts.assist(services, RUN, wait=3, pause=waited.append)
    assert services.store.list("") == []


def test_with_one_host_nothing_is_left_for_others(tmp_path):
    services = Services(Settings(home=tmp_path))
    hosts.call(services, RUN, TrainConfig(epochs=1), size=32, architecture="tiny")
    assert services.store.list("") == []


def test_a_search_on_several_hosts_is_refused(tmp_path):
    services = Services(Settings(home=tmp_path, distribution="multi_worker"))
    with pytest.raises(InvalidSetting, match="a search trains on one host"):
        search.search(services, RUN, None, trials=1, minutes=1, epochs=1)
