"""The pages of the NeuroLoop frontend, which `server.py` serves. They talk only to the inference API."""

import guard
import layout
import signin
import streamlit as st

from neuroloop.core import logs
from neuroloop.core.credentials import Role
from neuroloop.core.errors import InvalidSetting
from neuroloop.core.settings import Settings

# Each page and the least role that sees it. (A string here would be shown on the page.)
PAGES = (
    (Role.UPLOADER, st.Page("views/classify.py", title="Classify", icon=":material/radiology:", default=True)),
    (Role.READER, st.Page("views/monitoring.py", title="Monitoring", icon=":material/monitoring:")),
    (Role.READER, st.Page("views/data.py", title="Data", icon=":material/database:")),
    (Role.READER, st.Page("views/models.py", title="Models", icon=":material/model_training:")),
    (Role.ADMIN, st.Page("views/mail.py", title="Mail", icon=":material/mail:")),
    (Role.UPLOADER, st.Page("views/about.py", title="About", icon=":material/info:")),
)

st.set_page_config(page_title="NeuroLoop", page_icon=str(layout.FOLDER / "icon.svg"), layout="wide")
try:
    settings = st.session_state["settings"] = Settings.load()
except InvalidSetting as fault:
    layout.frame()
    layout.heading("NeuroLoop cannot start", "A setting is not right.")
    st.error(layout.plain(str(fault)), icon=":material/settings:")
    st.stop()
logs.configure(settings.log_format, "ui")
person = None
try:
    person = signin.current(settings)  # ends the drawing where somebody has no access
finally:
    guard.note(person is not None)
signin.forget_unless(person)
st.session_state["person"] = person
if person is None:
    # The pages are there, so that an address typed before signing in still leads to its page afterwards.
    st.navigation([page for _, page in PAGES], position="hidden")
    layout.frame()
    signin.ask(settings)
    st.stop()
leave = st.Page(signin.sign_out, title="Sign out", icon=":material/logout:", url_path="sign-out")
seen = [page for role, page in PAGES if person.may(role)]
chosen = st.navigation({"": seen, layout.plain(person.name): [leave]}, position="top")
layout.frame()
chosen.run()
