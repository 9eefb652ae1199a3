"""Monitoring: what the platform answered, how sure and how fast it was, and what readers say."""

from collections.abc import Callable

import altair as alt
import layout
import pandas as pd
import signin
import streamlit as st
from layout import CLASS_NAMES, VERDICT_NAMES

from neuroloop.core.schemas import MONITORING_DAYS, Monitoring

CHART_HEIGHT = 200


def totals(figures: Monitoring) -> None:
    """The headline figures."""
    asked = figures.accepted + figures.rejected
    seconds = sum(c.mean_seconds * c.predictions for c in figures.per_class.values())
    answered = sum(c.predictions for c in figures.per_class.values())
    for column, (name, value, explanation) in zip(
        st.columns(5, gap="small"),
        (
            (
                "Predictions",
                f"{figures.predictions}",
                f"All uploads answered in the last {MONITORING_DAYS} days, with those the gate refused",
            ),
            (
                "Accepted by the gate",
                layout.percent(figures.accepted / asked) if asked else "none",
                f"{figures.accepted} accepted, {figures.rejected} refused as no brain MRI, of which readers contest "
                f"{figures.contested}",
            ),
            (
                "Referred to a reader",
                layout.percent(figures.referred / figures.accepted) if figures.accepted else "none",
                f"{figures.referred} of {figures.accepted} accepted scans were too uncertain to answer",
            ),
            (
                "Mean latency",
                f"{1000 * seconds / answered:.0f} ms" if answered else "none",
                "From the decoded request to the stored scan",
            ),
            (
                "Feedback received",
                f"{sum(figures.feedback.values())}",
                f"Verdicts of readers in the last {MONITORING_DAYS} days",
            ),
        ),
        strict=True,
    ):
        column.metric(name, value, help=explanation, border=True)


def retraining(figures: Monitoring) -> None:
    """How far the next retraining is; corrections wait however old they are."""
    waiting, needed = figures.corrections_waiting, figures.feedback_threshold
    with st.container(border=True, key="card-waiting", height="stretch"):
        st.subheader("Corrections waiting", anchor=False)
        st.progress(min(waiting / needed, 1.0), text=f"**{waiting}** of {needed}")
        if waiting > needed:
            st.caption("Enough for a retraining: it starts with the next check of the schedule.")
        else:
            left = needed + 1 - waiting
            st.caption(
                f"A retraining starts with more than {needed}. {left} more {'is' if left == 1 else 'are'} needed."
            )


def class_chart(values: dict[str, float], title: str, words: Callable[[float], str], top: float = 0) -> alt.LayerChart:
    """One bar a class."""
    table = pd.DataFrame(
        {
            "Class": [CLASS_NAMES[label] for label in values],
            title: list(values.values()),
            "Words": [words(value) for value in values.values()],
            "Colour": [layout.CLASS_COLOURS[label] for label in values],
        }
    )
    return layout.bars(table, "Class", title, order=layout.ORDER, height=CHART_HEIGHT, top=top)


def latency_chart(figures: Monitoring) -> alt.LayerChart:
    """Mean as a bar, 95th percentile as a tick."""
    table = pd.DataFrame(
        [
            {"Class": CLASS_NAMES[label], "Mean": 1000 * c.mean_seconds, "95th percentile": 1000 * c.p95_seconds}
            for label, c in figures.per_class.items()
        ]
    )
    y = alt.Y("Class:N", sort=layout.ORDER, title=None, axis=layout.class_axis())
    tooltip = ["Class", alt.Tooltip("Mean:Q", format=".0f"), alt.Tooltip("95th percentile:Q", format=".0f")]
    colours = alt.Scale(domain=layout.ORDER, range=list(layout.CLASS_COLOURS.values()))
    bars = (
        alt.Chart(table)
        .mark_bar(height=22, cornerRadius=3)
        .encode(
            x=alt.X("Mean:Q", title="milliseconds", axis=alt.Axis(tickCount=5)),
            y=y,
            color=alt.Color("Class:N", scale=colours, legend=None),
            tooltip=tooltip,
        )
    )
    ticks = (
        alt.Chart(table)
        .mark_tick(thickness=3, height=26, color="#16252E")
        .encode(x="95th percentile:Q", y=y, tooltip=tooltip)
    )
    return (bars + ticks).properties(height=CHART_HEIGHT, background="transparent")


def gate_chart(figures: Monitoring) -> alt.Chart:
    """Each request's gate score on the time line."""
    table = pd.DataFrame(
        [
            {
                "Time": point.at,
                "Words": f"{point.at:%d %b %Y, %H:%M:%S} UTC",
                "Score": point.score,
                "Gate": "Accepted" if point.accepted else "Refused",
            }
            for point in figures.gate_scores
        ]
    )
    return (
        alt.Chart(table)
        .mark_circle(size=46, opacity=0.75)
        .encode(
            x=alt.X(
                "Time:T",
                title="UTC",
                scale=alt.Scale(type="utc"),  # as all other times of the platform; else in the browser's time zone
                axis=alt.Axis(labelOverlap=True, tickCount=6),
            ),
            y=alt.Y("Score:Q", scale=alt.Scale(domain=[0, 1]), title=None, axis=alt.Axis(tickCount=5)),
            color=alt.Color(
                "Gate:N",
                scale=alt.Scale(domain=["Accepted", "Refused"], range=["#0B6E7F", "#C0722F"]),
                legend=alt.Legend(orient="top", title=None),
            ),
            tooltip=[alt.Tooltip("Words:N", title="Time"), alt.Tooltip("Score:Q", format=".3f"), "Gate"],
        )
        .properties(height=CHART_HEIGHT + 60, background="transparent")
    )


def feedback_chart(figures: Monitoring) -> alt.LayerChart:
    """One bar a verdict."""
    counts = [figures.feedback.get(verdict, 0) for verdict in VERDICT_NAMES]
    names = list(VERDICT_NAMES.values())
    words = [str(count) for count in counts]
    table = pd.DataFrame({"Verdict": names, "Count": counts, "Words": words, "Colour": layout.ACCENT})
    return layout.bars(table, "Verdict", "Count", order=names, height=130)


def charts(figures: Monitoring) -> None:
    """The panels below the headline figures; those of the classes where a scan has been taken for a brain MRI."""
    if not figures.per_class:
        with st.container(border=True, key="card-gate"):
            gate_panel(figures)
        return
    first, second = st.columns(2, gap="small")
    third, fourth = st.columns(2, gap="small")
    with first.container(border=True, key="card-classes", height="stretch"):
        st.subheader("Predictions per class", anchor=False)
        counts = {label: float(c.predictions) for label, c in figures.per_class.items()}
        st.altair_chart(class_chart(counts, "Predictions", lambda count: f"{count:.0f}"), width="stretch")
    with second.container(border=True, key="card-probability", height="stretch"):
        st.subheader("Mean probability of the class named", anchor=False)
        means = {label: c.mean_probability for label, c in figures.per_class.items()}
        st.altair_chart(class_chart(means, "Probability", layout.percent, top=1), width="stretch")
    with third.container(border=True, key="card-latency", height="stretch"):
        st.subheader("Latency per class", anchor=False)
        st.altair_chart(latency_chart(figures), width="stretch")
        st.caption("Bar: mean. Tick: 95th percentile.")
    with fourth.container(border=True, key="card-gate", height="stretch"):
        gate_panel(figures)


def gate_panel(figures: Monitoring) -> None:
    """What the gate made of the latest uploads."""
    st.subheader("Gate score over time", anchor=False)
    st.altair_chart(gate_chart(figures), width="stretch")
    st.caption(f"How much each upload looks like a brain MRI; the latest 500 of the last {MONITORING_DAYS} days.")


@st.fragment(run_every="10s")
def live() -> None:
    """All figures, read anew every ten seconds, for as long as somebody is signed in."""
    if signin.current(layout.settings()) is None:
        st.rerun()
    figures = layout.load(layout.api().monitoring)
    if figures is None:
        return
    totals(figures)
    waiting, verdicts = st.columns(2, gap="small")
    with waiting:
        retraining(figures)
    with verdicts.container(border=True, key="card-feedback", height="stretch"):
        st.subheader("Feedback received", anchor=False)
        if any(figures.feedback.values()):
            st.altair_chart(feedback_chart(figures), width="stretch")
            st.caption(
                "Of all uploads. Live accuracy counts only answers: no scan that the gate refused or that was referred."
            )
        else:
            st.caption("No reader has said anything in these days. Verdicts are given below each result on Classify.")
    if figures.predictions:
        charts(figures)
    else:
        layout.empty(
            f"No predictions in the last {MONITORING_DAYS} days",
            "Classify a scan, and its class, probability and latency show here.",
        )


layout.heading(
    "Monitoring",
    f"The last {MONITORING_DAYS} days: what the platform answered, how sure and how fast it was, and what readers say. "
    "The corrections waiting are of any age. Renewed every ten seconds.",
)
live()
