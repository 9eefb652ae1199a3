"""Models: the champion, its challengers, and why each was promoted or not."""

import layout
import pandas as pd
import streamlit as st
from api_client import Models
from layout import CLASS_NAMES, plain

from neuroloop.core.schemas import LABELS, ModelVersion

METRICS = {
    "test_accuracy": "Accuracy",
    "test_macro_f1": "Macro F1",
    **{f"test_recall_{label}": f"Recall, {CLASS_NAMES[label].lower()}" for label in LABELS},
    "test_ece": "Calibration error (ECE)",
    "test_nll": "Log loss",
    "baseline_majority_macro_f1": "To beat, macro F1: always the largest class",
    "baseline_border_macro_f1": "To beat, macro F1: border and outline only",
    "baseline_thumbnail_macro_f1": "To beat, macro F1: 8 x 8 pixels",
    "baseline_nearest_macro_f1": "To beat, macro F1: most alike training image",
}
ROLES = {"champion": "Champion", "challenger": "Challenger", "previous": "Previous champion"}
SHOWN = 5


def role(version: ModelVersion) -> str:
    """What the version is now, in words."""
    return ", ".join(ROLES[alias] for alias in ROLES if alias in version.aliases) or "Candidate"


def champion_first(models: Models) -> list[ModelVersion]:
    """The versions by role, then newest first."""
    rank = {alias: place for place, alias in enumerate(ROLES)}
    return sorted(models.versions, key=lambda v: min((rank.get(alias, 9) for alias in v.aliases), default=9))


def interval(version: ModelVersion, metric: str) -> str:
    """A metric with its 95 % interval where there is one."""
    value = version.metrics.get(metric)
    if value is None:
        return "–"  # noqa: RUF001
    low, high = version.metrics.get(f"{metric}_low"), version.metrics.get(f"{metric}_high")
    bounds = f" ({low:.3f} to {high:.3f})" if low is not None and high is not None else ""
    return f"{value:.3f}{bounds}"


def comparison(models: Models) -> None:
    """Champion and challengers, one column each."""
    versions = champion_first(models)[:SHOWN]
    with st.container(border=True, key="card-comparison"):
        st.subheader("Side by side on the frozen test part", anchor=False)
        rows = {
            "Role": [role(v) for v in versions],
            "Registered": [layout.moment(v.created_at) for v in versions],
            "Data": [layout.short(v.tags.get("data_version", "–")) for v in versions],  # noqa: RUF001
            "Trained on": [
                "simulated scans" if v.tags.get("simulated", "").lower() == "true" else "real scans" for v in versions
            ],
        } | {
            name: [interval(v, metric) for v in versions]
            for metric, name in METRICS.items()
            if any(metric in v.metrics for v in versions)
        }
        st.table(pd.DataFrame.from_dict(rows, orient="index", columns=[f"Version {v.version}" for v in versions]))
        note = "In brackets: 95 % interval, bootstrapped over groups of near-identical images."
        if len(models.versions) > SHOWN:
            note += f" {len(models.versions) - SHOWN} older versions are in MLflow."
        st.caption(note)


def ledger(models: Models) -> None:
    """Every decision with its reasons."""
    st.subheader("Promotion ledger", anchor=False)
    if not models.promotions:
        layout.empty(
            "No decision yet", "Each trained model is compared with the champion, and the reasons are written here."
        )
    for entry in models.promotions:
        with st.container(border=True, key=f"card-ledger-{entry.run_id}"):
            before = f", after version {entry.previous}" if entry.previous else ", as the first champion"
            with st.container(horizontal=True, vertical_alignment="center", gap="small"):
                st.markdown(f"**Version {plain(entry.version)}**", width="content")
                if entry.promoted:
                    st.badge("Promoted", icon=":material/check:", color="green")
                else:
                    st.badge("Not promoted", icon=":material/close:", color="gray")
                tail = before if entry.promoted else (f", version {entry.previous} stays" if entry.previous else "")
                st.caption(f"{layout.moment(entry.created_at)}{tail}. Run {plain(entry.run_id)}", width="content")
            st.markdown(
                "  \n".join(
                    f"{':green[:material/check:]' if check.passed else ':red[:material/close:]'} {plain(check.reason)}"
                    for check in entry.checks
                )
            )


layout.heading(
    "Models",
    "The champion answers every request. A challenger takes its place only if it is better where it "
    "matters and not worse elsewhere.",
)
answer = layout.load(layout.api().models)
if answer is not None:
    if answer.versions:
        comparison(answer)
    else:
        layout.empty(
            "No model yet", "The first build registers one. It takes a few minutes; Airflow shows how far it is."
        )
    if answer.versions or answer.promotions:
        ledger(answer)
    with st.container(horizontal=True, gap="small"):
        if answer.mlflow_url:
            st.link_button("Open MLflow", answer.mlflow_url, icon=":material/open_in_new:")
        st.link_button("Open Airflow", layout.settings().airflow_url, icon=":material/open_in_new:")
