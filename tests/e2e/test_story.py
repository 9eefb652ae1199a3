"""The whole loop, as `make story` plays it."""

import pytest

from e2e import story


@pytest.mark.e2e
@pytest.mark.timeout(3600)
def test_the_51st_correction_and_no_other_retrains_promotes_and_reloads_without_a_failed_request():
    outcome = story.play(print)
    print(outcome)
    assert outcome["retrained_at_50"] is False
    assert outcome["retrained_at_51"] is True
    assert outcome["retrained_again"] is False
    assert outcome["champion_after"] != outcome["champion_before"], outcome["promotion"]
    assert outcome["failure_mailed"] is True
    assert outcome["failed_requests"] == 0
    assert outcome["versions_seen"] == [outcome["champion_before"], outcome["champion_after"]]
    assert outcome["reload_seconds"] <= 10
    assert outcome["told_secrets"] == []
