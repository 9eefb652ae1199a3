import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from neuroloop.core.errors import InvalidSetting
from neuroloop.model import devices

HOSTS = ["a:2222", "b:2222"]


@pytest.fixture(scope="module")
def replicas():
    """What training on two CPU devices came to, beside one."""
    program = Path(__file__).parent / "replicas.py"
    run = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_two_replicas_take_the_steps_of_one_device_though_their_parts_are_uneven(replicas):
    assert replicas["replicas"] == 2
    np.testing.assert_allclose(replicas["two"]["loss"], replicas["one"]["loss"], rtol=1e-4)
    assert replicas["two"]["hits"] == replicas["one"]["hits"]
    # The optimiser's state as well: a gradient that is counted twice hides in AdamW's weights, not in its averages.
    assert replicas["apart"] < 1e-3


def test_replicas_hold_the_same_weights_averages_and_optimiser_and_export_them(replicas):
    assert replicas["copies"] == [2]
    assert replicas["unequal"] == 0
    assert replicas["moved"] > 0.9
    assert np.isfinite(replicas["losses"]).all()
    assert replicas["export_apart"] < 1e-3


def test_fewer_images_than_replicas_are_refused(replicas):
    assert "too few for 2 replicas" in replicas["refused"]


def test_one_device_is_tensorflows_default(monkeypatch):
    assert devices.strategy("one") is devices.strategy("auto") is tf.distribute.get_strategy()
    mirrored = []
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [kind] * 2)
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [_Device(kind)] * 2)
    monkeypatch.setattr(tf.distribute, "MirroredStrategy", mirrored.append)
    devices.strategy("auto")
    assert mirrored == [("/GPU", "/GPU")]


class _Device:
    def __init__(self, kind: str) -> None:
        self.name = f"/{kind}"


def test_mirrored_on_one_device_is_refused_with_what_there_is():
    with pytest.raises(InvalidSetting, match=r"mirrored needs two devices.*sees 1 here: .*CPU:0.*auto"):
        devices.strategy("mirrored")


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ("", "is not set"),
        ("worker-0", "cannot be read"),
        ('{"cluster": {"worker": ["a:1", "b:1"]}}', "KeyError: 'task'"),
        ({"cluster": {"worker": HOSTS}, "task": {"type": "worker", "index": 2}}, "calls this host worker 2"),
        ({"cluster": {"worker": HOSTS}, "task": {"type": "chief", "index": 0}}, "calls this host chief 0"),
        ({"cluster": {"worker": HOSTS, "ps": ["c:1"]}, "task": {"type": "worker", "index": 0}}, "type 'ps'"),
        ({"cluster": {"worker": ["a:1", "b"]}, "task": {"type": "worker", "index": 0}}, "names 'b'"),
        ({"cluster": {"worker": ["a:1", "a:1"]}, "task": {"type": "worker", "index": 0}}, "one address twice"),
        ({"cluster": {"chief": HOSTS}, "task": {"type": "chief", "index": 0}}, "more than one chief"),
    ],
)
def test_hosts_that_make_no_sense_are_refused_with_the_reason_and_an_example(monkeypatch, config, hint):
    monkeypatch.setenv("TF_CONFIG", config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(InvalidSetting) as caught:
        devices.strategy("multi_worker")
    assert hint in str(caught.value)
    assert '"host-1:2222"' in str(caught.value)


@pytest.mark.parametrize(
    ("cluster", "task", "chief"),
    [
        ({"worker": HOSTS}, {"type": "worker", "index": 0}, True),
        ({"worker": HOSTS}, {"type": "worker", "index": "1"}, False),
        ({"chief": HOSTS[:1], "worker": HOSTS[1:]}, {"type": "chief", "index": 0}, True),
        ({"chief": HOSTS[:1], "worker": HOSTS[1:]}, {"type": "worker", "index": 0}, False),
    ],
)
def test_the_chief_is_the_first_worker_unless_one_is_named(cluster, task, chief):
    found = devices.host({"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})})
    assert found == devices.Host(hosts=2, chief=chief)
