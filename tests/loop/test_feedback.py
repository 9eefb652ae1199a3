import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from neuroloop.core import keys
from neuroloop.loop import feedback


def correct(store, number, label="glioma"):
    names = []
    for _ in range(number):
        names.append(str(uuid.uuid4()))
        store.put(keys.correction(label, names[-1]), names[-1].encode())
    return names


def test_exactly_the_threshold_makes_no_batch_and_one_more_does(store):
    correct(store, 50)
    assert feedback.claim(store, "run-1", 50) is None
    assert store.list(keys.BATCHES) == []
    correct(store, 1)
    batch = feedback.claim(store, "run-1", 50)
    assert batch is not None
    assert len(batch.corrections) == 51
    assert feedback.waiting(store) == []


def test_who_counts_again_and_again_reads_each_batch_once(store, monkeypatch):
    known: dict[str, bytes] = {}
    for run in ("run-1", "run-2"):
        correct(store, 51)
        feedback.claim(store, run, 50)
        assert feedback.waiting(store, known) == []
    new = correct(store, 3)
    monkeypatch.setattr(type(store), "get", lambda *_: pytest.fail("a batch is read again"))
    assert feedback.waiting(store, known) == sorted(keys.correction("glioma", name) for name in new)


def test_a_retry_of_the_same_run_gets_the_same_batch(store):
    correct(store, 51)
    first = feedback.claim(store, "run-1", 50)
    correct(store, 60)
    assert feedback.claim(store, "run-1", 50) == first


def test_a_second_trigger_finds_nothing_left(store):
    correct(store, 51)
    assert feedback.claim(store, "run-1", 50)
    assert feedback.claim(store, "run-2", 50) is None


def test_of_many_claims_at_once_one_gets_the_corrections_and_no_image_is_used_twice(store):
    correct(store, 200)
    with ThreadPoolExecutor(8) as pool:
        batches = list(pool.map(lambda number: feedback.claim(store, f"run-{number}", 50), range(8)))
    won = [batch for batch in batches if batch]
    assert len(won) == 1
    assert len(set(won[0].corrections)) == 200


def test_a_correction_moved_to_another_class_after_its_batch_is_not_new(store):
    names = correct(store, 51)
    feedback.claim(store, "run-1", 50)
    store.put(keys.correction("pituitary", names[0]), names[0].encode())
    store.delete(keys.correction("glioma", names[0]))
    assert feedback.waiting(store) == []
    moved = [each for each in feedback.used(store) if names[0] in each.key]
    assert [each.label for each in moved] == ["pituitary"]


def test_a_used_correction_knows_its_batch(store):
    first = set(correct(store, 51))
    feedback.claim(store, "run-1", 50)
    second = set(correct(store, 51))
    feedback.claim(store, "run-2", 50)
    found = feedback.used(store)
    assert {each.prediction for each in found if each.batch == 1} == first
    assert {each.prediction for each in found if each.batch == 2} == second


def test_an_erased_correction_is_left_out_of_later_trainings(store):
    names = correct(store, 51)
    feedback.claim(store, "run-1", 50)
    store.delete(keys.correction("glioma", names[0]))
    assert len(feedback.used(store)) == 50


def test_about_a_fifth_is_held_out_and_always_the_same_ones(store):
    correct(store, 400)
    feedback.claim(store, "run-1", 50)
    first = {each.key for each in feedback.used(store) if each.held_out}
    correct(store, 60, "meningioma")
    feedback.claim(store, "run-2", 50)
    second = {each.key for each in feedback.used(store) if each.held_out}
    assert 50 <= len(first) <= 115
    assert first <= second


def test_one_picture_counts_once_and_not_at_all_where_readers_contradict_one_another():
    def of(name: str, label: str, sha256: str) -> feedback.Correction:
        return feedback.Correction(key=keys.correction(label, name), label=label, sha256=sha256, held_out=False)

    found = [of("a", "glioma", "1"), of("b", "glioma", "1"), of("c", "glioma", "2"), of("d", "pituitary", "2")]
    found.append(of("e", "glioma", "3"))
    assert feedback.repeated(found) == {
        found[1].key: f"the same picture as {found[0].key}",
        found[2].key: "corrected to several classes",
        found[3].key: "corrected to several classes",
    }


def test_few_corrections_are_repeated_and_many_are_not():
    assert feedback.repeats(0, 1000) == 0
    assert feedback.repeats(41, 720) == 4
    assert feedback.repeats(5, 10_000) == feedback.MOST_REPEATS
    assert feedback.repeats(5000, 1000) == 1
