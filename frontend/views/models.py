"""Models: the champion, its challengers, and why each was promoted or not."""

import layout
import pandas as pd
import signin
import streamlit as st
from api_client import ApiClient, ApiProblem, Models
from layout import CLASS_NAMES, plain

from neuroloop.core.credentials import Role
from neuroloop.core.schemas import LABELS, ModelVersion

METRICS = {
    "grouped_test_accuracy": "Accuracy",
    "grouped_test_macro_f1": "Macro F1",
    **{f"grouped_test_recall_{label}": f"Recall, {CLASS_NAMES[label].lower()}" for label in LABELS},
    "grouped_test_ece": "Calibration error (ECE)",
    "grouped_test_nll": "Log loss",
    "grouped_test_selective_answered": "Share answered: neither refused nor left to a reader",
    "grouped_test_selective_answered_accuracy": "Accuracy of what is answered",
    "grouped_test_baseline_majority_macro_f1": "To beat, macro F1: always the largest class",
    "grouped_test_baseline_border_macro_f1": "To beat, macro F1: border and outline only",
    "grouped_test_baseline_thumbnail_macro_f1": "To beat, macro F1: 8 x 8 pixels",
    "grouped_test_baseline_nearest_macro_f1": "To beat, macro F1: most alike training image",
}
LEGACY_METRICS = {
    "legacy_test_accuracy": "Accuracy, all of its test images",
    "legacy_test_leaked_share": "Share of them with a twin outside of the test part",
    "legacy_test_leaked_accuracy": "Accuracy on those, which leaked",
    "legacy_test_unleaked_accuracy": "Accuracy on the others",
    "legacy_test_macro_f1": "Macro F1, all of its test images",
    "legacy_test_baseline_majority_accuracy": "To beat, accuracy: always the largest class",
    "legacy_test_baseline_border_accuracy": "To beat, accuracy: border and outline only",
    "legacy_test_baseline_thumbnail_accuracy": "To beat, accuracy: 8 x 8 pixels",
    "legacy_test_baseline_nearest_accuracy": "To beat, accuracy: most alike training image",
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


def is_legacy(version: ModelVersion) -> bool:
    """Whether it was tested on the source's own, leaked split, so that its scores compare with no other version's."""
    return version.tags.get("split") == "legacy" or any(metric in version.metrics for metric in LEGACY_METRICS)


def comparison(versions: list[ModelVersion], metrics: dict[str, str]) -> None:
    """The newest of `versions`, one column each."""
    shown = versions[:SHOWN]
    rows = {
        "Role": [role(v) for v in shown],
        "Registered": [layout.moment(v.created_at) for v in shown],
        "Data": [layout.short(v.tags.get("data_version", "–")) for v in shown],  # noqa: RUF001
        "Trained on": [
            "simulated scans" if v.tags.get("simulated", "").lower() == "true" else "real scans" for v in shown
        ],
        "Network": [v.tags.get("architecture", "–") for v in shown],  # noqa: RUF001
    } | {
        name: [interval(v, metric) for v in shown]
        for metric, name in metrics.items()
        if any(metric in v.metrics for v in shown)
    }
    st.table(pd.DataFrame.from_dict(rows, orient="index", columns=[f"Version {v.version}" for v in shown]))
    note = "In brackets: 95 % interval, over groups of near-identical images."
    if len(versions) > SHOWN:
        note += f" {len(versions) - SHOWN} older versions are in MLflow."
    st.caption(note)


def compare(models: Models) -> None:
    """The versions of the frozen test part side by side, and apart from them those of the source's own."""
    versions = champion_first(models)
    fair, legacy = [v for v in versions if not is_legacy(v)], [v for v in versions if is_legacy(v)]
    if fair:
        with st.container(border=True, key="card-comparison"):
            st.subheader("Side by side on the frozen test part", anchor=False)
            comparison(fair, METRICS)
    if legacy:
        with st.container(border=True, key="card-legacy"):
            with st.container(horizontal=True, vertical_alignment="center", gap="small"):
                st.subheader("Legacy: on the source's own test part", anchor=False, width="content")
                st.badge("Leaked, compares with nothing above", icon=":material/warning:", color="orange")
            st.markdown(
                "The data came with a test part of its own, in which many images stand again, identical or mirrored, "
                "among those to train on. Published figures are of this kind. These versions only show how such a "
                "figure comes about; none of them is ever promoted."
            )
            comparison(legacy, LEGACY_METRICS)


def champion_card() -> None:
    """The model card of the model that answers now."""
    card = layout.load(layout.api().card)
    if card is None:
        return
    title, _, body = card.markdown.partition("\n")
    with st.expander(f"**Model card of the champion, version {card.version}**", icon=":material/description:"):
        st.markdown(f"##### {title.lstrip('# ')}\n{body.replace(chr(10) + '## ', chr(10) + '##### ')}")
        st.download_button("Download as Markdown", card.markdown, f"model-card-{card.version}.md", "text/markdown")


def change_champion(models: Models) -> None:
    """Another version is made the champion by hand, the one before as a rule; asks before it does."""
    candidates = [v for v in champion_first(models) if "champion" not in v.aliases and not is_legacy(v)]
    candidates.sort(key=lambda v: "previous" not in v.aliases)  # the one to go back to first; else as they were
    if latest := st.session_state.get("champion-notes", {}).pop("latest", None):
        layout.note(*latest)
    if not candidates:
        return
    with st.expander("**Go back to another version**", icon=":material/history:"):
        st.markdown(
            "The chosen version answers every request from then on, with the same probabilities as before. All servers "
            "follow within seconds, no request is lost, and the ledger keeps who did it and why."
        )
        version = st.selectbox(
            "Version",
            [v.version for v in candidates],
            key="champion-version",
            format_func={v.version: f"Version {v.version}: {role(v).lower()}" for v in candidates}.__getitem__,
        )
        reason = st.text_input("Why", key="champion-reason", max_chars=500)
        sure = st.checkbox(f"Yes, version {version} shall answer every request", key=f"champion-sure-{version}")
        st.button(
            "Make it the champion",
            key=f"champion-make-{version}",  # a second click on this button never means the version offered next
            disabled=not (sure and reason.strip()),
            icon=":material/history:",
            on_click=make_champion,
            args=(version,),
        )


def make_champion(version: str) -> None:
    """Ask the API for it and keep what came of it; a version that is the champion by then counts as done.

    Nothing where the session has ended since the button was drawn: the ledger would name whoever left.
    """
    if signin.gone(layout.settings()):
        return
    # As in Classify: all of the session that is needed is fetched before, and this dict outlasts the drawing.
    notes: dict[str, tuple[bool, str]] = st.session_state.setdefault("champion-notes", {})
    reason, api = st.session_state["champion-reason"].strip(), layout.api()
    try:
        api.make_champion(version, reason)
    except ApiProblem as fault:
        layout.own_key_refused(fault)
        if not (fault.status == 409 and is_champion(api, version)):
            notes["latest"] = False, layout.in_words(fault)
            return
    notes["latest"] = True, f"Version {plain(version)} is the champion now."


def is_champion(api: ApiClient, version: str) -> bool:
    """Whether the registry names this version so, as after a second click or an answer that was lost."""
    try:
        return any(v.version == version and "champion" in v.aliases for v in api.models().versions)
    except ApiProblem:
        return False


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
        compare(answer)
        champion_card()
        if st.session_state["person"].may(Role.ADMIN):
            change_champion(answer)
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
