"""Every page: filled, empty, and without the API."""

import subprocess
import sys
from datetime import datetime
from uuid import uuid4

import pytest
import signin
from layout import CLASS_NAMES, VERDICT_NAMES, percent

from frontend.reading import chart, labels, words
from neuroloop.bootstrap import Services
from neuroloop.core import keys
from neuroloop.core.schemas import RESEARCH_NOTICE, Check, Promotion
from serving.running import head, noise, serving, wait, write_bundle

PAGES = ("classify", "data", "monitoring", "models", "mail", "about")


@pytest.mark.parametrize("view", PAGES)
def test_every_page_carries_the_research_notice_and_one_title(open_page, live_api, view):
    app = open_page(view, live_api)

    assert RESEARCH_NOTICE in words(app)
    assert len(app.title) == 1


@pytest.mark.parametrize("view", ["classify", "about"])
def test_every_picture_has_words_for_those_who_do_not_see_it(open_page, live_api, view):
    pictures = [one for image in open_page(view, live_api).get("image") for one in image.proto.imgs]
    assert len(pictures) >= 4
    assert all(one.alt for one in pictures)


@pytest.mark.parametrize("view", ["classify", "monitoring", "models", "mail"])
def test_without_the_api_a_page_says_what_is_wrong_and_offers_to_try_again(open_page, view):
    app = open_page(view)

    assert "The inference service cannot be reached" in words(app)
    assert "`make up`" in words(app)
    assert "Try again" in labels(app)
    assert RESEARCH_NOTICE in words(app)


@pytest.mark.parametrize("view", ["monitoring", "models", "mail"])
def test_a_page_recovers_as_soon_as_the_api_is_back(open_page, live_api, monkeypatch, view):
    app = open_page(view)
    monkeypatch.setenv("NEUROLOOP_API_URL", f"http://127.0.0.1:{live_api.port}")
    app.button(key="retry").click().run()

    assert "cannot be reached" not in words(app)
    assert not app.exception


def test_about_needs_no_api_and_shows_a_simulated_example_of_each_class(open_page):
    app = open_page("about")

    assert len(app.get("image")) == 4
    text = words(app)
    assert "Not a medical device" in text
    assert "The 2021 WHO Classification of Tumors of the Central Nervous System" in text
    assert text.count("Simulated") >= 4


def test_monitoring_without_predictions_has_an_empty_state_and_no_charts(open_page, bare_api):
    app = open_page("monitoring", bare_api)

    assert "No predictions in the last 30 days" in words(app)
    assert "Predictions 0" in words(app)
    assert "No reader has said anything in these days" in words(app)
    assert not app.get("vega_lite_chart")


def test_monitoring_of_refused_uploads_only_shows_what_the_gate_made_of_them(open_page, live_api, postgres_server):
    empty = live_api.services.settings.model_copy(update={"database_url": postgres_server.new_database()})
    with serving(Services(empty)) as api:
        api.predict(noise())
        figures = api.client.get("/v1/monitoring").json()
        assert (figures["predictions"], figures["per_class"]) == (1, {})
        app = open_page("monitoring", api)
    shown = {heading.value for heading in app.subheader}
    assert "Gate score over time" in shown
    assert "Latency per class" not in shown


def test_monitoring_left_open_ends_with_the_session(open_page, live_api):
    app = open_page("monitoring", live_api)
    assert app.metric
    signin.sessions().close(app.session_state["session"])
    app.run()
    assert not app.metric
    assert "Sign in" in words(app)


def test_monitoring_counts_what_was_asked_refused_and_corrected(open_page, live_api):
    before = live_api.client.get("/v1/monitoring").json()
    first = live_api.predict(head("glioma")).json()
    live_api.predict(head("notumor"))
    live_api.predict(noise())
    live_api.feedback(first["id"], "correct", "meningioma")
    app = open_page("monitoring", live_api)

    figures = {metric.label: metric.value for metric in app.metric}
    accepted, rejected = before["accepted"] + 2, before["rejected"] + 1
    assert app.get("vega_lite_chart")
    assert figures["Predictions"] == str(before["predictions"] + 3)
    assert figures["Accepted by the gate"] == percent(accepted / (accepted + rejected))
    assert figures["Referred to a reader"] == percent(before["referred"] / accepted)
    assert figures["Feedback received"] == str(sum(before["feedback"].values()) + 1)
    assert app.get("progress")[0].value == round(100 * (before["corrections_waiting"] + 1) / 50)
    shown = {heading.value for heading in app.subheader}
    assert {
        "Predictions per class",
        "Mean probability of the class named",
        "Latency per class",
        "Gate score over time",
        "Feedback received",
        "Corrections waiting",
    } <= shown


def test_the_charts_of_monitoring_draw_what_the_api_counted(open_page, live_api):
    first = live_api.predict(head("glioma")).json()
    for label in ("glioma", "meningioma", "pituitary"):
        live_api.predict(head(label))
    live_api.predict(noise())
    live_api.feedback(first["id"], "not_sure")
    figures = live_api.client.get("/v1/monitoring").json()
    classes = {CLASS_NAMES[label]: one for label, one in figures["per_class"].items()}
    app = open_page("monitoring", live_api)

    def drawn(value: str, category: str = "Class") -> dict[str, float]:
        layer, table = chart(app, value)
        assert layer["encoding"]["y"]["field"] == category
        return dict(zip(table[category], table[value], strict=True))

    assert drawn("Predictions") == {name: one["predictions"] for name, one in classes.items()}
    assert drawn("Probability") == {name: one["mean_probability"] for name, one in classes.items()}
    assert drawn("Mean") == pytest.approx({name: 1000 * one["mean_seconds"] for name, one in classes.items()})
    _, latency = chart(app, "Mean")
    high = dict(zip(latency["Class"], latency["95th percentile"], strict=True))
    assert high == pytest.approx({name: 1000 * one["p95_seconds"] for name, one in classes.items()})
    verdicts = {name: figures["feedback"].get(verdict, 0) for verdict, name in VERDICT_NAMES.items()}
    assert drawn("Count", "Verdict") == verdicts
    seconds = sum(one["mean_seconds"] * one["predictions"] for one in classes.values())
    answered = sum(one["predictions"] for one in classes.values())
    latency_shown = next(metric.value for metric in app.metric if metric.label == "Mean latency")
    assert latency_shown == f"{1000 * seconds / answered:.0f} ms"


def test_the_gate_scores_stand_on_a_time_line_in_utc_that_says_so(open_page, live_api):
    live_api.predict(head("glioma"))
    live_api.predict(noise())
    points = live_api.client.get("/v1/monitoring").json()["gate_scores"]
    layer, table = chart(open_page("monitoring", live_api), "Time")

    time, score = layer["encoding"]["x"], layer["encoding"]["y"]
    assert (time["scale"]["type"], time["title"], score["field"]) == ("utc", "UTC", "Score")
    assert list(table["Score"]) == [point["score"] for point in points]
    assert [gate == "Accepted" for gate in table["Gate"]] == [point["accepted"] for point in points]
    assert [at.isoformat() for at in table["Time"]] == [datetime.fromisoformat(p["at"]).isoformat() for p in points]
    assert all(words.endswith("UTC") for words in table["Words"])


def test_monitoring_never_rounds_a_share_to_a_false_certainty(open_page, live_api, postgres_server):
    empty = live_api.services.settings.model_copy(update={"database_url": postgres_server.new_database()})
    with serving(Services(empty)) as api:
        api.predict(noise())
        row = api.services.log.prediction(api.predict(head("glioma")).json()["id"])
        for number in range(199):
            more = {"id": str(uuid4()), "refer": number == 0}
            api.services.log.record_prediction(row.model_copy(update=more))
        shown = {metric.label: metric.value for metric in open_page("monitoring", api).metric}
    assert shown["Accepted by the gate"] == "over 99 %"
    assert shown["Referred to a reader"] == "under 1 %"


def test_models_shows_the_champion_first_with_its_interval_and_the_way_to_mlflow(open_page, live_api, mlflow_uri):
    champion = live_api.client.get("/v1/model").json()["version"]
    app = open_page("models", live_api)

    table = app.table[0].value
    assert table.columns[0] == f"Version {champion}"
    assert table.loc["Role"].iloc[0] == "Champion"
    assert table.loc["Accuracy"].iloc[0] == "0.910 (0.880 to 0.940)"
    assert table.loc["To beat, macro F1: most alike training image"].iloc[0] == "0.600"
    assert "Log loss" not in table.index  # nothing was measured
    assert table.loc["Trained on"].iloc[0] == "simulated scans"
    assert f"{mlflow_uri}/#/models" in [link.url for link in app.get("link_button")]


def test_models_shows_the_card_of_the_champion(open_page, live_api):
    champion = live_api.client.get("/v1/model").json()["version"]
    app = open_page("models", live_api)

    assert f"Model card of the champion, version {champion}" in words(app)
    assert "Model card: brain-tumor-classifier" in words(app)
    assert "| macro-F1 | 0.962 | 0.951 to 0.972 |" in words(app)
    assert len(app.title) == 1


def test_a_legacy_version_stands_apart_labelled_as_leaked(open_page, live_api, tmp_path):
    registry = live_api.services.registry
    run = registry.open_run("legacy-run", experiment="frontend")
    registry.log_metrics(
        run, {"legacy_test_accuracy": 0.992, "legacy_test_leaked_share": 0.757, "legacy_test_unleaked_accuracy": 0.966}
    )
    legacy = registry.register(run, write_bundle(tmp_path / "legacy", split="legacy"), tags={"split": "legacy"}).version
    app = open_page("models", live_api)

    fair, apart = (table.value for table in app.table)
    assert f"Version {legacy}" not in fair.columns
    assert list(apart.columns) == [f"Version {legacy}"]
    assert apart.loc["Accuracy, all of its test images"].iloc[0] == "0.992"
    assert apart.loc["Accuracy on the others"].iloc[0] == "0.966"
    text = words(app)
    assert "Legacy: on the source's own test part" in text
    assert "none of them is ever promoted" in text


def test_a_version_is_made_the_champion_from_the_page_only_after_a_reason_and_a_tick(
    open_page, live_api, tmp_path, mlflow_uri
):
    registry = live_api.services.registry
    before = live_api.client.get("/v1/model").json()["version"]
    run = registry.open_run("to-go-back-to", experiment="frontend")
    other = registry.register(run, write_bundle(tmp_path / "other", data_version="d9"), tags={}).version
    registry.set_alias("previous", other)
    app = open_page("models", live_api)
    assert app.selectbox(key="champion-version").value == other  # the previous one stands first
    make = f"champion-make-{other}"
    assert app.button(key=make).disabled
    app.text_input(key="champion-reason").set_value("Version looks *wrong*")
    app.run()
    assert app.button(key=make).disabled
    app.checkbox(key=f"champion-sure-{other}").check().run()
    app.button(key=make).click().run()
    assert not app.exception
    assert f"Version {other} is the champion now" in words(app)
    wait(lambda: live_api.client.get("/v1/model").json()["version"] == other)
    assert live_api.predict(head("glioma")).json()["model_version"] == other
    row = live_api.services.log.promotions()[0]
    assert (row.version, row.previous) == (other, before)
    assert row.reason == f"Ann went from version {before} to version {other}: Version looks *wrong*."
    live_api.services.registry.set_alias("champion", before)
    wait(lambda: live_api.client.get("/v1/model").json()["version"] == before)


def test_a_version_that_has_become_the_champion_meanwhile_counts_as_made(open_page, live_api, tmp_path):
    registry = live_api.services.registry
    before = live_api.client.get("/v1/model").json()["version"]
    run = registry.open_run("clicked-twice", experiment="frontend")
    other = registry.register(run, write_bundle(tmp_path / "other", data_version="d8"), tags={}).version
    registry.set_alias("previous", other)
    app = open_page("models", live_api)
    app.text_input(key="champion-reason").set_value("The other is worse").run()
    app.checkbox(key=f"champion-sure-{other}").check().run()
    registry.set_alias("champion", other)  # the first of two clicks
    try:
        app.button(key=f"champion-make-{other}").click().run()
        assert f"Version {other} is the champion now" in words(app)
        assert not app.warning
    finally:
        registry.set_alias("champion", before)
        wait(lambda: live_api.client.get("/v1/model").json()["version"] == before)


def test_a_champion_is_not_moved_in_the_name_of_somebody_who_has_left(open_page, live_api, tmp_path):
    registry = live_api.services.registry
    run = registry.open_run("by-nobody", experiment="frontend")
    other = registry.register(run, write_bundle(tmp_path / "other", data_version="d7"), tags={}).version
    ledger = live_api.services.log.promotions()
    app = open_page("models", live_api)
    app.selectbox(key="champion-version").set_value(other)
    app.text_input(key="champion-reason").set_value("The other is worse").run()
    app.checkbox(key=f"champion-sure-{other}").check().run()
    signin.sessions().close(app.session_state["session"])
    app.button(key=f"champion-make-{other}").click().run()
    assert live_api.services.log.promotions() == ledger
    assert "nothing came of the last click" in words(app)


def test_the_ledger_gives_every_reason_in_words_whichever_way_it_went(open_page, live_api):
    champion = live_api.client.get("/v1/model").json()["version"]
    for run, promoted in (("retraining-1", True), ("retraining-2", False)):
        reason = f"Macro F1 went {'up' if promoted else 'down'} in {run}"
        check = Check(name="overall", passed=promoted, reason=reason)
        live_api.services.log.record_promotion(
            Promotion(run_id=run, version=champion, previous=None, promoted=promoted, checks=(check,))
        )
    text = words(open_page("models", live_api))

    assert "Macro F1 went up in retraining-1" in text
    assert "Macro F1 went down in retraining-2" in text
    assert "Not promoted" in text


def test_mail_without_mails_has_an_empty_state(open_page, bare_api):
    assert "No mail yet" in words(open_page("mail", bare_api))


def test_mail_shows_what_the_platform_sent_newest_first_and_as_plain_text(open_page, live_api):
    old = b"Date: Wed, 01 Jan 2025 10:00:00 +0000\nTo: a@localhost\nSubject: Build finished\n\nVersion 1 serves."
    live_api.services.store.put(keys.mail("20250101T100000-old"), old)
    live_api.services.notifier.send("Build failed", "<script>alert(1)</script> **check_source**")
    app = open_page("mail", live_api)

    subjects = [expander.label for expander in app.expander]
    assert [("Build failed" in one, "Build finished" in one) for one in subjects] == [(True, False), (False, True)]
    assert app.text[0].value.startswith("<script>alert(1)</script> **check_source**")
    assert app.text[1].value == "Version 1 serves."


def test_a_wrong_setting_names_itself_instead_of_a_stack_trace(open_page, live_api, monkeypatch):
    app = open_page("about", live_api)
    monkeypatch.setenv("NEUROLOOP_API_PROT", "8000")
    app.run()

    assert "NEUROLOOP_API_PROT" in app.error[0].value.replace("\\", "")
    assert not app.exception


def test_the_frontend_imports_neither_tensorflow_nor_mlflow_nor_an_adapter():
    code = (
        "import sys; sys.path.insert(0, 'frontend'); import api_client, heatmap, layout, samples, session, signin; "
        "samples.phantom.scan('glioma', 0); "
        "print([m for m in sys.modules if m.split('.')[0] in ('tensorflow', 'keras', 'mlflow', 'onnxruntime') "
        "or m.startswith(('neuroloop.adapters', 'neuroloop.serving', 'neuroloop.bootstrap'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": "src"})

    assert done.stdout.strip() == "[]", done.stdout + done.stderr
