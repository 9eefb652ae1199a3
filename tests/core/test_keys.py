import pytest

from neuroloop.core import keys
from neuroloop.core.errors import NeuroLoopError


@pytest.mark.parametrize("hostile", ["../up", "a/b", "", ".hidden", "a b", "x\0", "-rf"])
def test_no_part_of_a_key_can_leave_its_folder(hostile):
    with pytest.raises(NeuroLoopError):
        keys.prediction("glioma", hostile)


def test_a_class_that_does_not_exist_has_no_folder():
    with pytest.raises(NeuroLoopError, match="no class"):
        keys.correction("../glioma", "id")


def test_the_run_ids_of_airflow_become_one_path_part():
    assert keys.run("manual__2026-01-01T00:00:00+00:00", "shards/001.npz") == (
        "runs/manual__2026-01-01T00-00-00+00-00/shards/001.npz"
    )


def test_numbered_objects_follow_one_another_even_where_one_was_deleted():
    assert keys.next_number([]) == 1
    assert keys.next_number([keys.split_decisions(1), keys.split_decisions(7)]) == 8


def test_corrected_uploads_stand_under_the_class_a_reader_gave_them():
    assert keys.correction("pituitary", "abc") == "InferenceLogs/ImageLogsWithFeedback/pituitary/abc.png"
