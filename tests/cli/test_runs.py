"""How the command line names what it runs."""

from neuroloop import cli
from neuroloop.core.keys import safe_run_id


def test_builds_that_start_in_the_same_second_are_different_runs():
    found = [cli._new_run("cli") for _ in range(20)]
    assert len(set(found)) == 20
    assert [safe_run_id(each) for each in found] == found
    assert sorted(each[:20] for each in found) == [each[:20] for each in found]
