"""Who gets in, what they see, and how they leave."""

import time

import pytest
import signin
import streamlit as st
from streamlit.testing.v1 import AppTest

from frontend.conftest import FRONTEND, PASSWORD, sign_in
from frontend.reading import address, labels, picture, words
from frontend.test_classify import consent, faint, press, upload
from neuroloop.core.credentials import Role, new_key
from neuroloop.serving import keyring
from serving.running import KEY, encoded, head, noise, wait


@pytest.fixture
def door(open_page, live_api) -> AppTest:
    """The app before anybody has signed in."""
    return open_page("classify", live_api, name=None)


def shut(app: AppTest) -> bool:
    return "Sign in" in labels(app) and not app.file_uploader


def pages(app: AppTest) -> set[str]:
    """Which of the pages open for whoever is signed in."""
    seen = set()
    for view in ("classify", "monitoring", "data", "models", "mail", "about"):
        try:
            app.switch_page(f"views/{view}.py")
        except ValueError:  # the navigation does not have this page
            continue
        app.run()
        assert not app.exception
        seen.add(app.title[0].value)
    return seen


def personal(live_api, role: str, name: str = "Berta") -> str:
    return keyring.create(live_api.services.keys, name, Role(role), by="a test").key


def test_before_signing_in_there_is_nothing_but_the_form_and_the_notice(door, live_api):
    before = live_api.services.log.monitoring().predictions
    assert shut(door)
    assert "Not a medical device" in words(door)
    assert len(door.title) == 1
    for view in ("monitoring", "mail", "models"):
        door.switch_page(f"views/{view}.py").run()
        assert shut(door)
        assert not door.metric
    assert live_api.services.log.monitoring().predictions == before


@pytest.mark.parametrize("secret", ["", "wrong", PASSWORD[:-1], new_key(), KEY])
def test_a_wrong_password_or_key_does_not_open(open_page, live_api, secret):
    app = open_page("classify", live_api, secret=secret)
    assert shut(app)
    assert app.error[0].value == "This password or key is not right."


def test_the_password_alone_does_not_say_who_it_is(open_page, live_api):
    app = open_page("classify", live_api, name="  ")
    assert shut(app)
    assert "enter your name" in app.error[0].value


def test_with_the_password_one_is_an_admin_under_the_name_one_gave(open_page, live_api):
    app = consent(open_page("classify", live_api, name="Ann"))
    upload(app, encoded(head("glioma")))
    press(app, "Agree")
    row = live_api.services.log.feedback(app.session_state["outcome"].answer.id)
    assert [one.reader for one in row] == ["Ann"]
    assert "Mail" in pages(app)


def test_without_a_password_in_the_settings_nobody_gets_in_and_the_page_says_what_to_do(
    open_page, live_api, monkeypatch
):
    app = open_page("classify", live_api, name=None)
    monkeypatch.setenv("NEUROLOOP_UI_PASSWORD", "")
    for secret in ("", PASSWORD):
        sign_in(app, "Ann", secret)
        assert shut(app)
        assert "NEUROLOOP_UI_PASSWORD" in app.error[0].value


@pytest.mark.parametrize(
    ("role", "more"),
    [
        ("uploader", set()),
        ("reader", {"Monitoring", "Data", "Models"}),
        ("admin", {"Monitoring", "Data", "Models", "Mail"}),
    ],
)
def test_with_a_personal_key_one_sees_the_pages_of_its_role(open_page, live_api, role, more):
    app = open_page("classify", live_api, name="", secret=personal(live_api, role))
    assert pages(app) == {"Classify a scan", "About NeuroLoop", *more}


def test_an_uploader_gets_an_answer_and_no_buttons_to_judge_it(open_page, live_api):
    app = consent(open_page("classify", live_api, name="", secret=personal(live_api, "uploader")))
    upload(app, encoded(head("glioma")))
    assert "the model sees a glioma" in words(app)
    assert not {"Agree", "Not sure", "Not a brain MRI", "Send correction"} & {button.label for button in app.button}


def test_a_verdict_with_a_personal_key_counts_in_the_name_of_its_holder(open_page, live_api):
    app = consent(open_page("classify", live_api, name="Somebody else", secret=personal(live_api, "reader")))
    upload(app, encoded(head("glioma")))
    press(app, "Agree")
    row = live_api.services.log.feedback(app.session_state["outcome"].answer.id)
    assert [one.reader for one in row] == ["Berta"]


def test_a_scan_referred_to_a_reader_is_opened_by_its_id_and_judged_in_the_readers_name(open_page, live_api):
    theirs = consent(open_page("classify", live_api, name="", secret=personal(live_api, "uploader", "Uma")))
    assert "open" not in {field.key for field in theirs.text_input}
    upload(theirs, encoded(faint("glioma")))
    row = live_api.services.log.prediction(theirs.session_state["outcome"].answer.id)
    assert f"Give a reader the id <b>{row.id}</b>" in words(theirs)

    before = live_api.services.log.monitoring().predictions
    reader = open_page("classify", live_api, name="", secret=personal(live_api, "reader"))
    reader.text_input(key="open").set_value(f" {row.id} ").run()
    text = words(reader)
    assert "Refer to a reader" in text
    assert "Give a reader the id" not in text
    assert "uploaded by Uma" in text
    assert picture(reader, "The scan as it was read") == address(faint("glioma"))
    assert "It came with the answer and is not kept" in text
    reader.selectbox[0].set_value("pituitary").run()
    press(reader, "Send")
    (said,) = live_api.services.log.feedback(row.id)
    assert (said.reader, said.verdict, said.label) == ("Berta", "correct", "pituitary")
    assert live_api.services.log.monitoring().predictions == before

    reader.text_input(key="open").set_value("nothing").run()
    assert "There is no such thing" in words(reader)


def test_a_link_opens_a_prediction_also_one_that_the_gate_refused(open_page, live_api):
    refused = live_api.predict(noise()).json()["id"]
    live_api.feedback(refused, "correct", "glioma", reader="Carl")
    app = open_page("classify", live_api, name=None)
    app.query_params["prediction"] = refused
    sign_in(app, "Ann", PASSWORD)

    assert "This does not look like a brain MRI" in words(app)
    assert "Carl: Corrected to glioma" in words(app).replace("\\", "")
    press(app, "Agree")
    assert ("Ann", "agree") in {(one.reader, one.verdict) for one in live_api.services.log.feedback(refused)}


@pytest.mark.parametrize("doing", ["look", "judge"])
def test_whose_key_is_revoked_is_signed_out_at_the_next_step_and_told_why(open_page, live_api, doing):
    made = keyring.create(live_api.services.keys, "Berta", Role.READER, by="a test")
    app = consent(open_page("classify", live_api, name="", secret=made.key))
    upload(app, encoded(head("glioma")))
    token = app.session_state["session"]
    keyring.revoke(live_api.services.keys, made.id, by="a test")
    wait(lambda: live_api.client_of(made.key).get("/v1/me").status_code == 401)
    if doing == "look":
        app.switch_page("views/models.py").run()
    else:
        press(app, "Agree")
    assert shut(app)
    assert "Your key is no longer valid; sign in again" in words(app)
    assert signin.sessions().person(token) is None
    assert "outcome" not in app.session_state

    sign_in(app, "Ann", PASSWORD)
    assert not shut(app)
    assert "no longer valid" not in words(app)


def test_where_the_frontends_own_key_is_refused_nobody_is_signed_out_and_the_operator_is_to_be_told(
    open_page, live_api, monkeypatch
):
    app = open_page("models", live_api)
    monkeypatch.setenv("NEUROLOOP_UI_API_KEY", new_key())
    app.run()
    assert not shut(app)
    assert "The frontend's own key is not accepted" in words(app)
    assert "Tell the operator" in words(app)


def test_signing_out_closes_the_app_and_forgets_the_scan(open_page, live_api):
    app = consent(open_page("classify", live_api))
    upload(app, encoded(head("glioma")))
    token = app.session_state["session"]
    app.run()
    leave(app)
    assert shut(app)
    assert "outcome" not in app.session_state
    assert signin.sessions().person(token) is None
    sign_in(app, "Berta", PASSWORD)
    assert "the model sees" not in words(app)


def test_sessions_and_guesses_outlast_a_browser_that_has_the_caches_cleared(open_page, live_api):
    app = open_page("classify", live_api)
    signin.sessions().guessed("192.0.2.7")
    before = signin.sessions()
    st.cache_resource.clear()  # as Streamlit does for any browser that asks
    assert signin.sessions() is before
    assert not shut(app.run())


def test_whoever_comes_next_in_a_tab_left_open_sees_nothing_of_the_one_before(open_page, live_api):
    app = consent(open_page("classify", live_api, name="Ann"))
    upload(app, encoded(head("glioma")))
    assert "the model sees a glioma" in words(app)
    signin.sessions().close(app.session_state["session"])  # Ann signs out in another tab, or stays too long
    assert shut(app.run())
    sign_in(app, "", personal(live_api, "uploader"))
    assert not shut(app)
    assert "the model sees" not in words(app)
    assert not app.checkbox(key="consent").value
    assert not {"upload", "outcome"} & {name for name in ("upload", "outcome") if name in app.session_state}


def test_a_click_in_a_tab_whose_session_has_ended_counts_in_nobodys_name(open_page, live_api):
    app = consent(open_page("classify", live_api, name="Ann"))
    upload(app, encoded(head("glioma")))
    prediction = app.session_state["outcome"].answer.id
    signin.sessions().close(app.session_state["session"])  # Ann signs out in another tab; Bob sits down at this one
    press(app, "Agree")
    assert live_api.services.log.feedback(prediction) == []
    assert shut(app)
    assert "nothing came of the last click" in words(app)
    sign_in(app, "Bob", PASSWORD)
    assert not shut(app)
    assert "last click" not in words(app)


def test_a_refused_scan_of_an_uploader_says_how_a_reader_gets_to_see_it(open_page, live_api):
    app = consent(open_page("classify", live_api, name="", secret=personal(live_api, "uploader", "Uma")))
    upload(app, encoded(noise()))
    assert f"Give a reader the id **{app.session_state['outcome'].problem.prediction_id}**" in words(app)


def test_a_simulated_sample_that_is_opened_again_is_still_called_simulated(open_page, live_api):
    theirs = consent(open_page("classify", live_api, name="", secret=personal(live_api, "uploader", "Uma")))
    theirs.button(key="take-0").click().run()
    prediction = theirs.session_state["outcome"].answer.id
    upload(theirs, encoded(head("glioma")))
    other = theirs.session_state["outcome"].answer.id
    reader = open_page("classify", live_api, name="", secret=personal(live_api, "reader"))
    reader.text_input(key="open").set_value(prediction).run()
    assert "A simulated scan from" in words(reader)
    assert "Simulated scan: it shows nobody" in words(reader)
    reader.text_input(key="open").set_value(other).run()
    assert "A scan from" in words(reader)
    assert "Simulated scan" not in words(reader)


def test_a_prediction_that_is_opened_again_shows_ones_own_verdict_and_can_be_looked_up_once_more(open_page, live_api):
    def said(app: AppTest) -> str:
        return words(app).replace("\\", "")

    prediction = live_api.predict(head("glioma")).json()["id"]
    app = open_page("classify", live_api, name="Ann")
    app.text_input(key="open").set_value(prediction).run()
    press(app, "Agree")
    assert "Ann: Agree" in said(app)
    press(app, "Not sure")
    assert "Ann: Not sure" in said(app)
    assert "Ann: Agree" not in said(app)
    assert "You are not sure" in said(app)
    live_api.feedback(prediction, "correct", "pituitary", reader="Carl")
    assert not app.text_input(key="open").value  # so that the same id is news
    app.text_input(key="open").set_value(prediction).run()
    assert "Carl: Corrected to pituitary tumour" in said(app)


def test_signing_in_while_the_service_is_away_says_so_beside_the_button_that_tries_again(open_page, live_api):
    app = open_page("classify", name="", secret=personal(live_api, "reader"))  # no API runs there
    assert shut(app)
    assert "cannot be reached" in app.error[0].value
    assert "Try again" not in labels(app)


def leave(app: AppTest) -> None:
    """Follow the link Sign out."""
    from streamlit.util import calc_hash

    app._page_hash = calc_hash("sign-out")
    app.run()


def test_a_session_ends_by_itself(open_page, live_api, monkeypatch):
    monkeypatch.setenv("NEUROLOOP_UI_SESSION_HOURS", str(3 / 3600))
    app = open_page("classify", live_api)
    assert not shut(app)
    time.sleep(3.1)
    assert shut(app.run())


def test_whoever_guesses_has_to_wait_and_others_do_not():
    sessions = signin.Sessions()
    for _ in range(signin.WRONG_A_MINUTE):
        assert not sessions.wait("203.0.113.9")
        assert not sessions.guessed("203.0.113.9")
    assert sessions.wait("203.0.113.9") > 0
    assert sessions.guessed("203.0.113.9") > 0
    assert not sessions.wait("203.0.113.10")


def test_a_session_is_found_by_its_name_only_until_it_is_closed():
    sessions, ann = signin.Sessions(), signin.Person("Ann", Role.READER)
    token = sessions.open(ann, 60)
    assert sessions.person(token) == ann
    assert sessions.person("") is sessions.person(token[:-1]) is None
    assert sessions.person(sessions.open(ann, -1)) is None
    sessions.close(token)
    assert sessions.person(token) is None


# --- OIDC ---------------------------------------------------------------------------------------


def vouched(live_api, monkeypatch, tmp_path, **user) -> AppTest:
    """The app where Streamlit has an identity provider, which says this of the person at the browser."""
    monkeypatch.setenv("NEUROLOOP_HOME", str(tmp_path))
    monkeypatch.setenv("NEUROLOOP_ENV_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("NEUROLOOP_API_URL", f"http://127.0.0.1:{live_api.port}")
    monkeypatch.setenv("NEUROLOOP_UI_API_KEY", KEY)
    monkeypatch.setenv("NEUROLOOP_UI_PASSWORD", PASSWORD)
    monkeypatch.setenv("NEUROLOOP_UI_PEOPLE", "boss@example.org=admin, *@example.org=reader, guest@other.org=uploader")
    app = AppTest.from_file(str(FRONTEND / "app.py"), default_timeout=90)
    app.secrets["auth"] = {"client_id": "neuroloop", "cookie_secret": "of a test"}
    app.user = user
    return app.run()


def signed(email: str, **more) -> dict:
    return {"is_logged_in": True, "email": email, "email_verified": True, "iat": int(time.time())} | more


def test_with_a_provider_there_is_its_button_and_no_password(live_api, monkeypatch, tmp_path):
    app = vouched(live_api, monkeypatch, tmp_path, is_logged_in=False)
    assert shut(app)
    assert not app.text_input


@pytest.mark.parametrize(("email", "more"), [("boss@example.org", 4), ("Ann@Example.org", 3), ("guest@other.org", 0)])
def test_whom_the_provider_vouches_for_has_the_role_of_the_settings(live_api, monkeypatch, tmp_path, email, more):
    app = vouched(live_api, monkeypatch, tmp_path, **signed(email))
    everything = ("Monitoring", "Data", "Models", "Mail")
    assert pages(app) == {"Classify a scan", "About NeuroLoop", *everything[:more]}


def test_their_verdicts_count_in_the_name_the_provider_gives(live_api, monkeypatch, tmp_path):
    app = consent(vouched(live_api, monkeypatch, tmp_path, **signed("ann@example.org")))
    upload(app, encoded(head("glioma")))
    press(app, "Agree")
    row = live_api.services.log.feedback(app.session_state["outcome"].answer.id)
    assert [one.reader for one in row] == ["ann@example.org"]


@pytest.mark.parametrize(
    "user",
    [signed("eve@evil.example"), signed("ann@example.org", email_verified=False), {"is_logged_in": True, "iat": 9**12}],
)
def test_whom_the_settings_do_not_name_has_no_access(live_api, monkeypatch, tmp_path, user):
    app = vouched(live_api, monkeypatch, tmp_path, **user)
    assert "does not know you" in words(app)
    assert "Not a medical device" in words(app)
    assert labels(app) == ["Sign out"]


def test_an_address_that_the_provider_says_nothing_of_counts_where_the_settings_trust_it(
    live_api, monkeypatch, tmp_path
):
    user = {name: value for name, value in signed("boss@example.org").items() if name != "email_verified"}
    assert "does not know you" in words(vouched(live_api, monkeypatch, tmp_path, **user))
    monkeypatch.setenv("NEUROLOOP_UI_TRUST_EMAIL", "true")
    assert "Mail" in pages(vouched(live_api, monkeypatch, tmp_path, **user))
    user["email_verified"] = False
    assert "does not know you" in words(vouched(live_api, monkeypatch, tmp_path, **user))


def test_who_signs_out_of_a_provider_has_left_their_other_tabs_too(live_api, monkeypatch, tmp_path):
    visit = signed("leaver@example.org")
    app = consent(vouched(live_api, monkeypatch, tmp_path, **visit))
    upload(app, encoded(head("glioma")))
    prediction = app.session_state["outcome"].answer.id
    leave(vouched(live_api, monkeypatch, tmp_path, **visit))
    press(app, "Agree")
    assert live_api.services.log.feedback(prediction) == []
    assert shut(app)
    assert "nothing came of the last click" in words(app)
    again = vouched(live_api, monkeypatch, tmp_path, **signed("leaver@example.org", iat=int(time.time()) + 1))
    assert not shut(again)


def test_an_old_sign_in_at_the_provider_does_not_last(live_api, monkeypatch, tmp_path):
    user = signed("ann@example.org", iat=int(time.time()) - 13 * 3600)
    assert shut(vouched(live_api, monkeypatch, tmp_path, **user))
