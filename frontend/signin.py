"""Who is at the browser, and what they may.

Through OIDC where Streamlit's secrets have an `[auth]` section: the provider says who it is, `UI_PEOPLE` what they may.
Else through a form: with the platform's own password and a name, or with a personal API key, which has both. A session
lives in this process' memory, so a restart signs everybody out; the browser keeps its random name as a cookie, so that
reloading a page does not. Passwords and keys never reach the browser's side again.
"""

import functools
import hashlib
import hmac
import json
import math
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import layout
import streamlit as st
from api_client import ApiClient, ApiProblem, Identity

from neuroloop.core.credentials import Role, parted, valid_name
from neuroloop.core.rates import Rate, network
from neuroloop.core.settings import Settings

COOKIE = "neuroloop_session"
WRONG_A_MINUTE = 10
"""Wrong passwords from one address a minute."""


@dataclass(frozen=True)
class Person:
    """Who signed in."""

    name: str
    role: Role
    key: str = ""
    """Their own key; empty where the API is asked with the frontend's, which names them."""

    def may(self, role: Role) -> bool:
        """Whether this person may do what `role` may."""
        return self.role.covers(role)

    def identity(self, frontend_key: str) -> Identity:
        """What the API gets to know of them."""
        return Identity(self.key) if self.key else Identity(frontend_key, self.name, self.role)


class Sessions:
    """The people signed in through the form, and who has signed out of a provider's; thread-safe."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[Person, float]] = {}
        self._left: dict[str, float] = {}
        self._wrong = Rate(WRONG_A_MINUTE)
        self._lock = threading.Lock()

    def open(self, person: Person, seconds: float) -> str:
        """Begin a session; its name, which nobody can guess."""
        token, now = secrets.token_urlsafe(32), time.time()
        with self._lock:
            self._open = {name: one for name, one in self._open.items() if one[1] > now}
            self._open[token] = (person, now + seconds)
        return token

    def person(self, token: str) -> Person | None:
        """Whose session it is, None where it is over or never was."""
        with self._lock:
            person, until = self._open.get(token, (None, 0.0))
        return person if until > time.time() else None

    def close(self, token: str) -> None:
        """End a session at once, also in other tabs."""
        with self._lock:
            self._open.pop(token, None)

    def leave(self, visit: str, seconds: float) -> None:
        """Remember for so long that a visit through a provider is over: Streamlit tells no other tab of it."""
        now = time.time()
        with self._lock:
            self._left = {name: until for name, until in self._left.items() if until > now}
            self._left[visit] = now + seconds

    def has_left(self, visit: str) -> bool:
        """Whether this visit is over."""
        with self._lock:
            return visit in self._left

    def guessed(self, address: str) -> float:
        """Count a wrong password; the seconds to wait where there were too many."""
        with self._lock:
            return self._wrong.spend(address)

    def wait(self, address: str) -> float:
        """The seconds until this address may try again."""
        with self._lock:
            return self._wrong.wait(address)


@functools.cache
def sessions() -> Sessions:
    """The sessions of this server. Not among Streamlit's cached resources, which any browser may have cleared."""
    return Sessions()


def current(settings: Settings) -> Person | None:
    """Who is signed in, None where nobody is. Ends the drawing where a provider vouches for nobody of ours."""
    person = _who(settings)
    if isinstance(person, str):
        _no_access(person)
    if isinstance(person, Person):
        st.session_state.pop("unheard", None)
        if _providers() is None:
            _keep(_token(), settings.ui_session_hours * 3600)
        return person
    return None


def gone(settings: Settings) -> bool:
    """Whether the session for which this tab was drawn has ended, here or in another tab; the next drawing says so.

    For callbacks, which come before the page is drawn anew, so before `current`.
    """
    if _who(settings) == st.session_state["person"]:
        return False
    st.session_state["unheard"] = True
    return True


def _who(settings: Settings) -> Person | str | None:
    """Who is signed in, None where nobody is; the address of whom the provider knows and this platform does not."""
    if _providers() is not None:
        return _vouched_for(settings)
    token = _token()
    if "key-refused" in st.session_state:
        sessions().close(token)
    return sessions().person(token)


def ask(settings: Settings) -> None:
    """The page that stands in the place of every other until somebody has signed in."""
    layout.heading("Sign in", "NeuroLoop shows scans and what readers say of them only to people it knows.")
    place, _ = st.columns([2, 3])
    if "key-refused" in st.session_state:
        place.warning("Your key is no longer valid; sign in again.", icon=":material/key_off:")
    if "unheard" in st.session_state:
        place.warning("The session had ended, so nothing came of the last click.", icon=":material/logout:")
    with place.container(border=True, key="card-signin"):
        providers = _providers()
        if providers is not None:
            for name, title in providers.items():
                if st.button(title, type="primary", icon=":material/login:", key=f"signin-{name}"):
                    st.login(name or None)
        else:
            _form(settings)


def forget_unless(person: Person | None) -> None:
    """Forget what this tab holds of somebody else: who signed out elsewhere or stayed too long, before the next."""
    before: Person | None = st.session_state.get("person")
    if before is not None and (person is None or person.name != before.name):
        for name in set(map(str, st.session_state)) - {"session", "settings", "key-refused", "unheard"}:
            del st.session_state[name]


def sign_out() -> None:
    """End the session, here and in other tabs, and forget all that this one held."""
    if _providers() is not None:
        sessions().leave(_visit(), layout.settings().ui_session_hours * 3600)
        st.session_state.clear()
        st.logout()
        st.stop()
    sessions().close(_token())
    st.session_state.clear()
    st.switch_page("views/classify.py")


def _form(settings: Settings) -> None:
    with st.form("signin", border=False):
        name = st.text_input("Your name", max_chars=100, placeholder="It stands beside your verdicts").strip()
        secret = st.text_input(
            "Password",
            type="password",
            help="`make up` prints it, and `make status` does again. A personal API key does too; your name is then "
            "the one it was made for.",
        ).strip()
        pressed = st.form_submit_button("Sign in", type="primary", icon=":material/login:")
    if not pressed:
        return
    address = network(st.context.ip_address or "this machine")
    seconds = sessions().wait(address)
    if seconds:
        st.error(f"Too many wrong passwords. Try again in {math.ceil(seconds)} seconds.")
        return
    try:
        person = _by_key(settings, secret) if parted(secret) else _by_password(settings, name, secret)
    except ApiProblem as fault:
        st.error(layout.in_words(fault))
        return
    if isinstance(person, str):
        st.error(person)
    elif person is None:
        sessions().guessed(address)
        st.error("This password or key is not right.")
    else:
        st.session_state.pop("key-refused", None)
        st.session_state["session"] = sessions().open(person, settings.ui_session_hours * 3600)
        st.rerun()


def _by_password(settings: Settings, name: str, password: str) -> Person | str | None:
    """Who knows the platform's password; None where it is wrong, or in words what is missing."""
    if not settings.ui_password or not settings.ui_api_key:
        return "There is no password yet: set NEUROLOOP_UI_PASSWORD and NEUROLOOP_UI_API_KEY, or run make up."
    if not hmac.compare_digest(_digest(password), _digest(settings.ui_password)):
        return None
    if not valid_name(name):
        return "Please enter your name too, so that your verdicts can be told from other readers'."
    return Person(name, Role.ADMIN)


def _by_key(settings: Settings, key: str) -> Person | None:
    """Whose key it is, as the API knows them; None where it knows nobody. Raises `ApiProblem`."""
    try:
        me = ApiClient(settings.api_url).acting_for(Identity(key)).me()
    except ApiProblem as fault:
        if fault.status == 401:
            return None
        raise
    return None if me.delegate else Person(me.name, me.role, key)


def _vouched_for(settings: Settings) -> Person | str | None:
    """Whom the OIDC provider vouches for, None where nobody is signed in; the address of who is nobody of ours."""
    user = st.user.to_dict()
    if not user.get("is_logged_in"):
        return None
    address = str(user.get("email") or "")
    if time.time() - float(str(user.get("iat") or 0)) > settings.ui_session_hours * 3600:
        return None  # signing in again takes a click where the provider still knows them
    if sessions().has_left(_visit()):
        return None
    vouched = user.get("email_verified", settings.ui_trust_email) is True
    role = settings.role_of(address) if vouched else None
    return address if role is None or not valid_name(address) else Person(address, role)


def _visit() -> str:
    """What all tabs of one browser share of having signed in through a provider once: who, and when."""
    user = st.user.to_dict()
    return f"{user.get('sub')} {user.get('email')} {user.get('iat')}"


def _no_access(address: str) -> None:
    layout.frame()
    layout.heading("No access", "You are signed in, but this platform does not know you.")
    st.error(layout.plain(f"Ask its operator to add {address or 'your address'} to NEUROLOOP_UI_PEOPLE."))
    st.button("Sign out", icon=":material/logout:", on_click=st.logout)
    st.stop()


def _providers() -> dict[str, str] | None:
    """OIDC provider -> the words on its button; None where none is configured."""
    try:
        auth = st.secrets["auth"]
    except (KeyError, FileNotFoundError):
        return None
    named = {str(name): f"Sign in with {name}" for name, value in auth.items() if isinstance(value, Mapping)}
    return named or {"": "Sign in"}


def _token() -> str:
    return str(st.session_state.get("session") or st.context.cookies.get(COOKIE) or "")


def _keep(token: str, seconds: float) -> None:
    """Let the browser remember the session's name; a server of Streamlit's cannot set a cookie by itself."""
    cookie = f"{COOKIE}={token}; Path=/; Max-Age={seconds:.0f}; SameSite=Strict"
    secure = "(location.protocol === 'https:' ? '; Secure' : '')"
    st.html(f"<script>document.cookie = {json.dumps(cookie)} + {secure}</script>", unsafe_allow_javascript=True)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
