import pytest

from model.cards import FACTS, facts
from neuroloop.core.schemas import RESEARCH_NOTICE
from neuroloop.model.card import Card, as_markdown, compose

EXPLAINED = FACTS["evaluated"]["explanation"]


@pytest.fixture
def text(card) -> str:
    return as_markdown(card)


def test_the_card_says_what_the_model_is_and_that_it_is_no_medical_device(text):
    assert text.startswith("# Model card: brain-tumor-classifier\n")
    assert RESEARCH_NOTICE in text
    assert "1.58 M parameters, 128 px" in text
    assert "real scans" in text
    assert "`0123abcd`, grouped split" in text
    assert "## Intended use" in text


@pytest.mark.parametrize(
    "row",
    [
        "| macro-F1 | 0.962 | 0.951 to 0.972 |",
        "| recall, meningioma | 0.930 |  |",
        "| **this model** | **0.962** | **0.964** |",
        "| most alike training image at 32x32 pixels | 0.830 | 0.830 |",
        "| glioma | 0.900 (0.870 to 0.930) | 0.950 |",
        "| accuracy of what is answered | 0.993 |",
        "| noise | 0.950 | 0.930 | 3.0 |",
        "| round bodies, let through | 5.0 % |",
        "| brains of the validation part, refused | 0.7 % |",
        "| train | 4,208 | 1,500 |",
        "| border | 0.918 | 0.807 |",
        "| file size | – | 0.500 |",  # noqa: RUF001
        "| settings learning rate | 0.003 |",
        "| augmentation: rotation | 15 |",
    ],
)
def test_every_figure_of_the_run_stands_in_its_table(text, row):
    assert row in text


def test_the_sentences_give_leaks_openings_calibration_and_the_heat_maps(text):
    assert "75.7 % of Testing" in text
    assert "These parts were not used." in text
    assert "looked at 3 times so far" in text
    assert "temperature 1.234" in text
    assert "At 90 %, the mean over other divisions into calibration and test: glioma 0.907." in text
    assert "below 0.810 is referred to a reader" in text
    assert "in 85.0 % (glioma 90.0 %" in text
    assert "a random place in the head would in 10.0 %" in text


def test_the_machine_readable_card_holds_the_same_and_comes_back_as_it_was(card):
    assert Card.model_validate_json(card.model_dump_json()) == card
    assert card.scores == FACTS["evaluated"]["test"]
    assert as_markdown(Card.model_validate_json(card.model_dump_json())) == as_markdown(card)


def test_a_model_that_reaches_every_target_has_only_the_limits_that_all_have(card):
    assert card.shortcomings == ()
    assert card.limits == compose(**facts(feedback={"accuracy": 0.5})).limits
    assert all("misses" not in limit and "off by" not in limit for limit in card.limits)
    assert len(card.limits) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"test": FACTS["evaluated"]["test"] | {"recall_meningioma": 0.797}},
            "misses 20.3 % of the images of class men",
        ),
        ({"test": FACTS["evaluated"]["test"] | {"ece": 0.06}}, "off by 6.0 %"),
        ({"test": FACTS["evaluated"]["test"] | {"macro_f1": 0.8}}, "never looks at a lesion scores as high"),
        ({"test": FACTS["evaluated"]["test"] | {"macro_f1": 0.95}}, "macro-F1 in the test part is 0.950; 0.96 was"),
        ({"coverage": {"0.95": {"glioma": 0.90}}}, "sets at 95 % covered less in the test part: glioma 90.0 %"),
        (
            {"coverage": {"0.90": {"notumor": 0.97, "notumor_low": 0.93}}},
            "sets at 90 % covered more in the test part: no tumour 97.0 %",
        ),
        ({"risk_coverage": {"accuracy_at_85": 0.977}}, "Of its most certain answers, 85 % of all, 2.3 % are wrong"),
        ({"risk_coverage": {"answered_accuracy": 0.97}}, "Of the images it answers itself, 3.0 % are wrong"),
        ({"risk_coverage": {"answered": 0.4}}, "It answers 40.0 % of the images itself"),
        ({"stress": {"blur": {"drop": 0.2}}}, "Under strong blur it loses 20.0 points"),
        ({"explanation": {**EXPLAINED, "pointing": {**EXPLAINED["pointing"], "hits": 0.4}}}, "in only 40.0 %"),
        ({"explanation": {**EXPLAINED, "randomised_correlation": 0.8}}, "with shuffled weights they are much the same"),
    ],
)
def test_what_misses_its_target_is_named_among_the_limits(changes, words):
    card = compose(**facts(**changes))
    assert any(words in each for each in card.shortcomings), card.shortcomings
    assert card.limits[: len(card.shortcomings)] == card.shortcomings
    assert words in as_markdown(card)


def test_a_calibration_error_that_chance_explains_is_no_shortcoming():
    chance = {"ece": 0.06, "ece_floor": 0.04, "ece_chance": 0.07}
    card = compose(**facts(test=FACTS["evaluated"]["test"] | chance))
    assert all("off by" not in limit for limit in card.limits)
    assert "| the same by chance alone, mean | 0.040 |  |" in as_markdown(card)


def test_sets_that_say_nothing_for_want_of_calibration_images_say_so():
    few = FACTS["calibration"].model_copy(update={"groups": {"glioma": 8, "meningioma": 40}})
    card = compose(**(facts() | {"calibration": few}))
    (limit,) = (limit for limit in card.limits if "whatever the scan shows" in limit)
    assert "there are of glioma 8." in limit


def test_simulated_and_legacy_models_say_so_before_anything_else():
    data = FACTS["data"].model_copy(update={"simulated": True, "split": "legacy"})
    leaked = {
        "notice": "legacy, 75.7 % leaked",
        "leaked": {"accuracy": 1.0, "macro_f1": 1.0},
        "unleaked": {"accuracy": 0.966, "accuracy_low": 0.95, "accuracy_high": 0.98, "macro_f1": 0.96},
    }
    card = compose(**(facts(leaked=leaked) | {"data": data}))
    text = as_markdown(card)
    assert "simulated scans only" in card.limits[0]
    assert "leaked test part" in card.limits[1]
    assert "Parts are kept apart" not in text
    assert "simulated scans, no patient's" in text
    assert "legacy, leaked: not comparable" in text
    assert "**legacy, 75.7 % leaked.**" in text
    assert "| with a twin outside of the test part | 1.000 | 1.000 |" in text
    assert "| without one | 0.966 (0.950 to 0.980) | 0.960 |" in text
    assert "its scores are inflated" in text


def test_sections_that_were_not_measured_are_left_out():
    bare = FACTS | {"evaluated": {"test": {"macro_f1": 0.5, "accuracy": 0.5}}, "trained": {}, "augmentation": {}}
    text = as_markdown(compose(**bare))
    for heading in ("Robustness", "Heat maps", "Input gate", "Beside rules", "Training"):
        assert f"## {heading}" not in text
    assert "| macro-F1 | 0.500 |  |" in text


def test_text_from_outside_cannot_break_a_table():
    text = as_markdown(compose(**(FACTS | {"trained": {"device": "a|b"}})))
    assert "| device | a\\|b |" in text
