"""The NeuroLoop frontend: `python -m streamlit run frontend/app.py`. It talks only to the inference API."""

import layout
import streamlit as st

from neuroloop.core.errors import InvalidSetting
from neuroloop.core.settings import Settings

st.set_page_config(page_title="NeuroLoop", page_icon=str(layout.FOLDER / "icon.svg"), layout="wide")

page = st.navigation(
    [
        st.Page("views/classify.py", title="Classify", icon=":material/radiology:", default=True),
        st.Page("views/monitoring.py", title="Monitoring", icon=":material/monitoring:"),
        st.Page("views/data.py", title="Data", icon=":material/database:"),
        st.Page("views/models.py", title="Models", icon=":material/model_training:"),
        st.Page("views/mail.py", title="Mail", icon=":material/mail:"),
        st.Page("views/about.py", title="About", icon=":material/info:"),
    ],
    position="top",
)
layout.frame()
try:
    st.session_state["settings"] = Settings.load()
except InvalidSetting as fault:
    layout.heading("NeuroLoop cannot start", "A setting is not right.")
    st.error(layout.plain(str(fault)), icon=":material/settings:")
    st.stop()
page.run()
