"""The token bucket, on a clock of its own."""

import pytest

from neuroloop.core import rates
from neuroloop.core.rates import Rate, network


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_minutes_allowance_may_be_used_at_once_and_comes_back_evenly(clock: Clock):
    rate = Rate(6, clock)
    assert [rate.spend("a") for _ in range(6)] == [0.0] * 6
    assert rate.spend("a") == pytest.approx(10.0)
    clock.now += 9
    assert rate.spend("a") == pytest.approx(1.0)
    clock.now += 1
    assert rate.spend("a") == 0.0
    assert rate.wait("a") == pytest.approx(10.0)
    clock.now += 600
    assert [rate.spend("a") for _ in range(6)] == [0.0] * 6
    assert rate.spend("a") > 0


def test_a_refund_takes_one_call_back_and_is_nothing_to_a_caller_who_made_none(clock: Clock):
    rate = Rate(2, clock)
    assert [rate.spend("a") for _ in range(2)] == [0.0] * 2
    rate.refund("a")
    rate.refund("b")
    assert [rate.spend("a"), rate.spend("b"), rate.spend("b")] == [0.0] * 3
    assert rate.spend("a") > 0
    assert rate.spend("b") > 0


def test_callers_do_not_share(clock: Clock):
    rate = Rate(1, clock)
    assert rate.spend("a") == 0
    assert rate.spend("b") == 0
    assert rate.spend("a") > 0


def test_ever_new_callers_do_not_fill_the_memory_and_the_active_one_is_remembered(clock: Clock):
    rate = Rate(1, clock)
    for number in range(rates._MOST + 100):
        rate.spend(f"address {number}")
    assert len(rate._full) == rates._MOST
    assert rate.spend(f"address {rates._MOST + 99}") > 0


@pytest.mark.parametrize(
    ("address", "caller"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:aaaa::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("testclient", "testclient"),
    ],
)
def test_an_ipv6_client_is_its_network(address: str, caller: str):
    assert network(address) == caller
