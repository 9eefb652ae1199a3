import pytest

from neuroloop.core.schemas import LABELS
from neuroloop.loop.promotion import BASELINES, Scores, decide

RULES = {f"{name}_macro_f1": 0.5 for name in BASELINES}


def scores(macro_f1=0.9, accuracy=0.9, recall=0.9, feedback=None, simulated=False, **recalls):
    test = {"macro_f1": macro_f1, "accuracy": accuracy, **{f"recall_{label}": recall for label in LABELS}}
    test |= {f"recall_{label}": value for label, value in recalls.items()}
    corrected = {} if feedback is None else {"accuracy": feedback, "images": 20}
    return Scores(test=test, feedback=corrected, simulated=simulated)


def failed(checks):
    return [check.name for check in checks if not check.passed]


def test_a_first_model_that_beats_every_trivial_baseline_is_promoted():
    promoted, checks = decide(scores(macro_f1=0.51), None, RULES, retraining=False)
    assert promoted
    assert "beats the best trivial baseline" in checks[0].reason


def test_a_first_model_no_better_than_a_trivial_baseline_is_not_promoted():
    promoted, checks = decide(scores(macro_f1=0.7), None, RULES | {"nearest_macro_f1": 0.7}, retraining=False)
    assert not promoted
    assert "nearest, 0.700" in checks[0].reason


def test_a_retrained_model_better_on_the_corrections_and_not_worse_on_the_test_is_promoted():
    assert decide(scores(accuracy=0.896, feedback=0.4), scores(feedback=0.0), RULES, retraining=True)[0]


@pytest.mark.parametrize(
    ("candidate", "fault"),
    [
        (scores(accuracy=0.894, feedback=0.9), "accuracy"),
        (scores(glioma=0.879, feedback=0.9), "recall_glioma"),
        (scores(feedback=0.2), "feedback"),
        (scores(feedback=0.9, simulated=True), "data"),
    ],
)
def test_one_failed_check_keeps_the_champion_and_says_which(candidate, fault):
    promoted, checks = decide(candidate, scores(feedback=0.2), RULES, retraining=True)
    assert not promoted
    assert failed(checks) == [fault]
    assert all(check.reason.endswith(".") for check in checks)


def test_losses_up_to_the_tolerance_are_within_it():
    promoted, checks = decide(
        scores(accuracy=0.895, notumor=0.88, feedback=0.3), scores(feedback=0.2), RULES, retraining=True
    )
    assert promoted, failed(checks)


def test_many_small_losses_do_not_add_up():
    best = scores(accuracy=0.93, meningioma=0.95).test
    champion = scores(accuracy=0.926, feedback=0.0, meningioma=0.94)
    fine, slipping = scores(accuracy=0.926, feedback=0.5, meningioma=0.94), scores(accuracy=0.922, feedback=0.5)
    assert decide(fine, champion, RULES, retraining=True, best=best)[0]
    promoted, checks = decide(slipping, champion, RULES, retraining=True, best=best)
    assert not promoted
    assert failed(checks) == ["accuracy", "recall_meningioma"]
    assert failed(decide(slipping, champion, RULES, retraining=True)[1]) == ["recall_meningioma"]


def test_a_retraining_of_which_no_correction_is_held_out_must_be_better_on_the_test():
    assert failed(decide(scores(), scores(), RULES, retraining=True)[1]) == ["macro_f1"]
    assert decide(scores(macro_f1=0.91), scores(), RULES, retraining=True)[0]


@pytest.mark.parametrize(
    ("images", "lost", "promoted"), [(42, 2, True), (42, 3, False), (245, 4, True), (245, 5, False)]
)
def test_of_a_small_test_part_two_images_of_a_class_may_be_lost_by_chance(images, lost, promoted):
    candidate = scores(feedback=0.3, pituitary=0.9 - lost / images)
    counts = dict.fromkeys(LABELS, images)
    assert decide(candidate, scores(feedback=0.2), RULES, retraining=True, images=counts)[0] is promoted


def test_a_rebuild_must_be_better_than_the_champion_on_the_same_test():
    assert decide(scores(macro_f1=0.91), scores(macro_f1=0.9), RULES, retraining=False)[0]
    assert failed(decide(scores(macro_f1=0.9), scores(macro_f1=0.9), RULES, retraining=False)[1]) == ["macro_f1"]


@pytest.mark.parametrize(("remembered", "promoted"), [(0.9, True), (0.8, True), (0.79, False), (0.0, False)])
def test_a_rebuild_may_not_lose_what_retrainings_have_learned(remembered, promoted):
    """Of 20 held-out corrections, two may change sides by chance."""
    found, checks = decide(
        scores(macro_f1=0.91, feedback=remembered), scores(macro_f1=0.9, feedback=0.9), RULES, retraining=False
    )
    assert found is promoted
    assert failed(checks) == ([] if promoted else ["feedback"])
    assert f"{remembered:.3f} against the champion's 0.900" in checks[-1].reason
    assert ("would lose what retrainings have learned" in checks[-1].reason) is not promoted


def test_a_model_of_real_scans_replaces_one_of_simulated_scans():
    assert decide(scores(macro_f1=0.91), scores(macro_f1=0.9, simulated=True), RULES, retraining=False)[0]


def test_a_model_of_the_legacy_split_is_never_promoted_however_good_and_the_reason_names_the_leak():
    legacy = scores(macro_f1=0.995, accuracy=0.992).model_copy(update={"split": "legacy", "leaked": 0.757})
    for champion in (None, scores(macro_f1=0.5, accuracy=0.5, recall=0.5)):
        promoted, checks = decide(legacy, champion, RULES, retraining=False)
        assert not promoted
        assert failed(checks) == ["split"]
        assert "legacy, 75.7 % leaked" in checks[0].reason
        assert "never promoted" in checks[0].reason


def test_a_champion_that_this_program_cannot_read_is_replaced_with_the_reason_in_words():
    promoted, checks = decide(scores(), None, RULES, retraining=False, outdated="the bundle has format 1.")
    assert promoted
    assert "the bundle has format 1." in " ".join(check.reason for check in checks)


def test_a_model_of_simulated_scans_does_not_replace_a_real_champion_that_cannot_be_read():
    candidate = scores().model_copy(update={"simulated": True})
    old = {"retraining": False, "outdated": "the bundle has format 1."}
    promoted, checks = decide(candidate, None, RULES, **old, outdated_simulated=False)
    assert not promoted
    assert failed(checks) == ["data"]
    assert decide(candidate, None, RULES, **old, outdated_simulated=True)[0]
