"""Starts the NeuroLoop frontend: `python -m streamlit run frontend/server.py`. Its pages are in `app.py`."""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import samples
import streamlit as st
from guard import Guard
from starlette.middleware import Middleware


@asynccontextmanager
async def lifespan(_: st.App) -> AsyncIterator[None]:
    """The samples are rendered from the start on."""
    threading.Thread(target=samples.render_all, name="samples", daemon=True).start()
    yield


app = st.App("app.py", lifespan=lifespan, middleware=[Middleware(Guard)])
