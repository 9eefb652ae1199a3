"""What the pages share: heading, notice, empty and failed states, class names and colours, small formats."""

import html
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import altair as alt
import pandas as pd
import streamlit as st
from api_client import ApiClient, ApiProblem

from neuroloop.core.schemas import LABELS, RESEARCH_NOTICE
from neuroloop.core.settings import Settings

if TYPE_CHECKING:
    from signin import Person

Loaded = TypeVar("Loaded")

FOLDER = Path(__file__).parent
CLASS_NAMES = {
    "glioma": "Glioma",
    "meningioma": "Meningioma",
    "notumor": "No tumour",
    "pituitary": "Pituitary tumour",
}
CLASS_COLOURS = {"glioma": "#0B6E7F", "meningioma": "#C0722F", "notumor": "#7D8B95", "pituitary": "#6A5AA5"}
"""One colour a class on every chart, told apart with the common colour-vision deficiencies and in grey."""
VERDICT_NAMES = {
    "agree": "Agree",
    "correct": "Corrected",
    "not_sure": "Not sure",
    "not_brain_mri": "Not a brain MRI",
    "brain_mri": "A brain MRI",
}
INK, ACCENT, MUTED = "#16252E", "#0B6E7F", "#C3CED4"
ORDER = [CLASS_NAMES[label] for label in LABELS]


@st.cache_resource(show_spinner=False)
def _client(url: str) -> ApiClient:
    return ApiClient(url)


def settings() -> Settings:
    """The settings of this process; `app.py` has put them here."""
    loaded: Settings = st.session_state["settings"]
    return loaded


def person() -> "Person":
    """Who is signed in; `app.py` has put them here."""
    signed_in: Person = st.session_state["person"]
    return signed_in


def api() -> ApiClient:
    """The API of the settings in the name of whoever is signed in; its connection is shared by all sessions."""
    return _client(settings().api_url).acting_for(person().identity(settings().ui_api_key))


def frame() -> None:
    """Logo, style and the research notice that stands at the foot of every page."""
    st.logo(str(FOLDER / "logo.svg"), size="large")
    st.html(FOLDER / "style.css")
    with st.container(key="notice"):
        st.markdown(f"**Research use.** {RESEARCH_NOTICE}")


def heading(title: str, lead: str) -> None:
    """Title of a page and one sentence on what it is for."""
    with st.container(key="heading"):
        st.title(title, anchor=False)
        st.markdown(lead)


def empty(title: str, text: str) -> None:
    """The state of a page or panel with nothing to show yet."""
    card = st.container(border=True, key=f"card-empty-{re.sub(r'[^a-z]+', '-', title.lower())}")
    card.markdown(
        f'<div class="nl-empty"><strong>{html.escape(title)}</strong><p>{html.escape(text)}</p></div>',
        unsafe_allow_html=True,
    )


def problem(fault: ApiProblem, *, on_retry: Callable[[], None] | None = None) -> None:
    """What went wrong, why, and how to mend it; with a button where trying again may help.

    Of a person whose own key is refused the session ends.
    """
    if own_key_refused(fault):
        st.rerun()
    with st.container(border=True, key="card-problem"):
        st.markdown(f"### :material/error: {plain(fault.title)}")
        for sentence in (fault.detail, fault.fix):
            if sentence:
                st.markdown(plain(as_sentence(sentence)))
        if fault.status == 503 and "model" in f"{fault.title} {fault.detail}".lower():
            st.markdown(f"[Watch the build in Airflow]({settings().airflow_url})")
        if fault.passing or on_retry:
            st.button("Try again", icon=":material/refresh:", on_click=on_retry, key="retry")
        if fault.request_id:
            st.caption(f"Request {plain(fault.request_id)}")


def in_words(fault: ApiProblem) -> str:
    """A problem as one paragraph, for a note beside what was tried."""
    request = f"Request {fault.request_id}" if fault.request_id else ""
    return plain(" ".join(as_sentence(part) for part in (fault.title, fault.detail, fault.fix, request) if part))


def note(done: bool, text: str) -> None:
    """What came of something that was asked for, below where it was asked."""
    show, icon = (st.success, ":material/task_alt:") if done else (st.warning, ":material/warning:")
    show(text, icon=icon)


def own_key_refused(fault: ApiProblem) -> bool:
    """Whether the API refuses the key of whoever is signed in; then the next drawing asks them to sign in again."""
    refused = fault.status == 401 and person().key != ""
    if refused:
        st.session_state["key-refused"] = True
    return refused


def load(read: Callable[[], Loaded]) -> Loaded | None:
    """The answer of `read`, or None after showing why there is none."""
    try:
        return read()
    except ApiProblem as fault:
        problem(fault)
        return None


def as_sentence(text: str) -> str:
    """Text with a capital letter in front and a full stop at the end."""
    return text[:1].upper() + text[1:].rstrip(".") + "." if text and text[-1] not in "!?" else text


def plain(text: str) -> str:
    """Text from outside as Markdown that shows it letter by letter, but for code in backticks."""
    markup = r"([\\*_{}\[\]()#+!|<>$~:`])"
    pieces = text.split("`")
    if len(pieces) % 2 == 0:  # an unpaired backtick is no code
        return re.sub(markup, r"\\\1", text)
    pieces[::2] = [re.sub(markup, r"\\\1", piece) for piece in pieces[::2]]
    return "`".join(pieces)


def percent(value: float) -> str:
    """A share in [0, 1] as a whole percentage that never rounds to a false 0 or certainty."""
    if 0 < value < 0.01:
        return "under 1 %"
    if 0.99 < value < 1:
        return "over 99 %"
    return f"{value:.0%}".replace("%", " %")


def set_line(level: str, classes: tuple[str, ...]) -> str:
    """A prediction set in plain words."""
    share = percent(float(level))
    if not classes:
        return f"**{share} set:** empty. No class fits this scan as well as it fits nearly all scans of that class."
    names = [CLASS_NAMES[label].lower() for label in classes]
    if len(names) == len(LABELS):
        return f"**{share} set:** any of the four. At this coverage the scan says nothing."
    listed = f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else f"{names[0]} alone"
    return f"**{share} set:** {listed}"


def bars(
    table: pd.DataFrame, category: str, value: str, *, order: list[str], height: int, top: float = 0
) -> alt.LayerChart:
    """Horizontal bars with their figures behind them; `table` has the columns `category`, `value`, Words, Colour.

    `top` is the value of a full-length bar; 0 takes the largest.
    """
    full = top or float(table[value].max()) or 1.0
    room = 1.15 + 0.05 * int(table["Words"].str.len().max())  # behind a full bar, so that its figure is not cut off
    base = alt.Chart(table).encode(
        y=alt.Y(f"{category}:N", sort=order, title=None, axis=class_axis()),
        x=alt.X(f"{value}:Q", axis=None, scale=alt.Scale(domain=[0, full * room])),
        tooltip=[category, alt.Tooltip("Words:N", title=value)],
    )
    marks = base.mark_bar(height=alt.RelativeBandSize(0.62), cornerRadius=3).encode(
        color=alt.Color("Colour:N", scale=None)
    )
    words = base.mark_text(align="left", dx=6, fontSize=13, color=INK).encode(text="Words:N")
    return (marks + words).properties(height=height, background="transparent")


def class_axis() -> alt.Axis:
    """The names at the left of horizontal bars."""
    return alt.Axis(ticks=False, domain=False, labelLimit=160, labelFontSize=13, labelColor=INK, labelPadding=8)


def moment(at: datetime) -> str:
    """A time as people write it, in UTC."""
    return f"{at:%d %b %Y, %H:%M} UTC"


def short(identity: str) -> str:
    """The first letters of a long hash."""
    return identity if len(identity) <= 12 else f"{identity[:10]}…"
