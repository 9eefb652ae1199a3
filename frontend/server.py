"""Starts the NeuroLoop frontend: `python -m streamlit run frontend/server.py`. Its pages are in `app.py`."""

import streamlit as st
from guard import Guard
from starlette.middleware import Middleware

app = st.App("app.py", middleware=[Middleware(Guard)])
