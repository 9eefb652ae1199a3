"""Data: what the audit found in the data that the serving model was trained on, or in what was audited last."""

import layout
import streamlit as st
from api_client import ApiProblem

SERVING, LATEST = "Of the model that answers", "Audited last"
HEIGHT = 1400  # pixels of the frame that the report scrolls in


def report(page: str) -> None:
    """The whole report in a frame of its own, in the colours of this app, and to take away."""
    st.download_button(
        "Download this report", page, "data-audit.html", "text/html", icon=":material/download:", on_click="ignore"
    )
    # Every name in the page is escaped, and its own policy forbids scripts and outside resources.
    st.iframe(page.replace("<html ", '<html data-theme="light" ', 1), height=HEIGHT)


layout.heading(
    "Data",
    "What the audit found in the data: leaks, twins, wrong labels, wrong modality, shortcuts.",
)
chosen = st.segmented_control(
    "Whose data", (SERVING, LATEST), default=SERVING, required=True, key="whose", label_visibility="collapsed"
)
try:
    whole = layout.api().audit_page(latest=chosen == LATEST)
except ApiProblem as fault:
    if fault.status == 404:
        layout.empty("No audit yet", f"{layout.as_sentence(fault.detail)} {layout.as_sentence(fault.fix)}")
    else:
        layout.problem(fault)
else:
    report(whole)
