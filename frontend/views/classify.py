"""Classify: choose a scan, read the result with its explanation, tell the platform whether it is right."""

import dataclasses
import html
from typing import Any
from uuid import uuid4

import altair as alt
import heatmap
import layout
import pandas as pd
import samples
import streamlit as st
from api_client import Answer, ApiProblem
from layout import CLASS_NAMES, percent
from session import Outcome, Upload, choose, current_upload, outcome_of
from streamlit.delta_generator import DeltaGenerator

from neuroloop.core.credentials import Role
from neuroloop.core.schemas import LABELS, Verdict
from neuroloop.imaging.decode import FORMATS

CONSENT = (
    "I understand that this is for research only and not for diagnosis, that the scan I choose is stored and may be "
    "used to retrain the model, and that it carries no patient's name."
)

SHORT_NAMES = {"glioma": "Glioma", "meningioma": "Meningioma", "notumor": "None", "pituitary": "Pituitary"}


def take_upload() -> None:
    """The uploader changed: its file, or nothing, is now the choice."""
    file = st.session_state.get(uploader_key())
    choose(st.session_state, Upload(file.getvalue(), file.name, file.type) if file else None)


def take_sample(number: int) -> None:
    """A sample was clicked: it is now the choice, and the uploader is emptied."""
    sample = samples.render(*samples.SAMPLES[number])
    st.session_state["uploaders"] = st.session_state.get("uploaders", 0) + 1
    choose(st.session_state, Upload(sample.png, f"Sample {number + 1}", "image/png", simulated=sample.caption))


def uploader_key() -> str:
    """A new key gives an empty uploader."""
    return f"file-{st.session_state.get('uploaders', 0)}"


def remember_consent() -> None:
    """Keep the tick while the reader visits other pages."""
    st.session_state["consented"] = st.session_state["consent"]


def input_panel() -> tuple[bool, DeltaGenerator]:
    """Consent and upload; returns whether consent is given, and the place for the samples."""
    with st.container(border=True, key="card-input"):
        st.subheader("1. Before you start", anchor=False)
        consent = st.checkbox(
            CONSENT, value=st.session_state.get("consented", False), key="consent", on_change=remember_consent
        )
        st.subheader("2. Choose a scan", anchor=False)
        st.file_uploader(
            "Upload one slice of a brain MRI, or a series or volume of them",
            help=f"Read are {', '.join(FORMATS[:-1])} and {FORMATS[-1]} (.nii, .nii.gz). Of several slices the middle "
            "one is read first; then you can choose another. Only pixels are kept, never names or dates.",
            key=uploader_key(),
            on_change=take_upload,
            disabled=not consent,
            max_upload_size=max(1, round(layout.settings().max_upload_mb)),
        )
        st.markdown("Or try a **simulated** scan:")
        tiles = st.container()
    return consent, tiles


def sample_tiles(consent: bool) -> None:
    """The simulated samples, each a picture and its button."""
    with st.spinner("Rendering simulated scans"):
        rendered = [samples.render(*sample) for sample in samples.SAMPLES]
    for row in range(0, len(rendered), 4):
        for number, column in enumerate(st.columns(4, gap="small"), row):
            sample = rendered[number]
            with column.container(key=f"sample-{number}"):
                st.image(sample.png, width="stretch")
                st.button(
                    SHORT_NAMES[sample.label],
                    key=f"take-{number}",
                    help=f"Sample {number + 1}: {sample.caption}",
                    on_click=take_sample,
                    args=(number,),
                    disabled=not consent,
                    width="stretch",
                )


def welcome(consent: bool) -> None:
    """What stands where the result will be."""
    try:
        champion = layout.api().champion()
    except ApiProblem as fault:
        layout.problem(fault)
        return
    steps = (
        ("Tick the notice", "Nothing leaves your browser before."),
        ("Choose a scan", "A picture, a DICOM or NIfTI file, or one of the simulated samples."),
        ("Read the result", "Class, calibrated probability, and where the model looked."),
        ("Say whether it is right", "Corrections are what the model learns from next."),
    )
    with st.container(border=True, key="card-welcome"):
        st.subheader("Choose a scan to see its result here" if consent else "How it works", anchor=False)
        st.markdown(
            '<ol class="nl-steps">' + "".join(f"<li><b>{a}.</b> {b}</li>" for a, b in steps) + "</ol>",
            unsafe_allow_html=True,
        )
        st.markdown(
            facts(("Model", f"version {champion.version}"), ("Data", layout.short(champion.data_version))),
            unsafe_allow_html=True,
        )
        if champion.simulated:
            st.badge("Model trained on simulated scans", icon=":material/science:", color="orange")


def place_of(upload: Upload | None) -> DeltaGenerator:
    """Where what came of `upload` is shown: of two places the one in use, or, while it is still to be read, the other.

    Streamlit leaves what stood in a place until something else is written there. In one place the result of the choice
    before, with its buttons, would stand beside the new file for as long as that is being read.
    """
    readings = st.session_state.get("readings", 0)
    if upload is not None and outcome_of(st.session_state, upload) is None:
        readings += 1
        st.session_state["readings"] = readings
    if readings % 2:
        st.empty()
        return st.container()
    place = st.container()
    st.empty()
    return place


def classify(upload: Upload) -> Outcome:
    """The outcome of this upload; the API is asked once for each choice."""
    outcome = outcome_of(st.session_state, upload)
    if outcome is None:
        with st.spinner("Reading the scan"):
            try:
                # The consent is the ticked notice's; but no model of real scans shall learn from a simulated sample.
                # The key makes "try again" a repeat, never a second record.
                answer = layout.api().predict(
                    upload.data,
                    upload.media_type,
                    frame=upload.frame,
                    key=upload.key,
                    consent="simulated" if upload.simulated else "training",
                )
                outcome = Outcome(upload.key, answer=answer)
            except ApiProblem as fault:
                outcome = Outcome(upload.key, problem=fault)
        st.session_state["outcome"] = outcome
    return outcome


def frame_key(upload: Upload) -> str:
    """A field of its own for each choice: one kept from another series would go on showing that one's slice."""
    return f"frame-{upload.choice}"


def choose_frame(upload: Upload, frames: int, frame: int) -> None:
    """Lets the reader look at another slice of a file that has several; each look is a prediction of its own."""
    if frames < 2:
        return
    left, right = st.columns([3, 2], gap="small", vertical_alignment="bottom")
    with left:
        st.number_input(
            f"Slice, of {frames:,}",
            1,
            frames,
            frame,
            key=frame_key(upload),
            help="Type a number, or step through the slices.",
        )
    right.button("Show this slice", key="take-frame", on_click=take_frame, width="stretch")


def take_frame() -> None:
    """Another slice of the same file is now the choice."""
    upload = current_upload(st.session_state)
    if upload is not None:
        frame = int(st.session_state[frame_key(upload)])
        choose(st.session_state, dataclasses.replace(upload, frame=frame, choice=uuid4().hex))


def facts(*pairs: tuple[str, str]) -> str:
    """A line of small facts."""
    cells = "".join(f"<span>{html.escape(name)} <b>{html.escape(value)}</b></span>" for name, value in pairs)
    return f'<div class="nl-facts">{cells}</div>'


def verdict_line(answer: Answer) -> str:
    """The result in one plain line."""
    chance = percent(answer.probabilities[answer.label])
    if answer.refer:
        return f"Most probable, but no answer: {CLASS_NAMES[answer.label].lower()} ({chance})"
    if answer.tumour:
        name = CLASS_NAMES[answer.label].lower()
        return f"Tumour: the model sees a {name} ({chance})"
    return f"No tumour: the model sees none ({chance})"


def referral(answer: Answer) -> None:
    """That, and why, this scan should go to a reader."""
    st.markdown(
        f'<div class="nl-refer"><p class="nl-verdict">Refer to a reader</p>'
        f"<p>{html.escape(answer.refer_reason)} What the model would say stands below for the record.</p></div>",
        unsafe_allow_html=True,
    )


def prediction_sets(answer: Answer) -> None:
    """What else it may be, at each coverage, in plain words."""
    if answer.prediction_sets:
        st.markdown(
            "  \n".join(layout.set_line(*one) for one in sorted(answer.prediction_sets.items())),
            help="Prediction sets: of the scans of each class, 90 and 95 in a hundred have their class in such a set, "
            "as long as they are like those of the training.",
        )


def show_answer(upload: Upload, answer: Answer) -> None:
    """Result, explanation and feedback."""
    with st.container(border=True, key="card-result"):
        tone = "nl-unsure" if answer.refer else "nl-tumour" if answer.tumour else "nl-none"
        st.markdown(f'<p class="nl-eyebrow">Result for {html.escape(upload.name)}</p>', unsafe_allow_html=True)
        if answer.refer:
            referral(answer)
        st.markdown(
            f'<p class="nl-verdict {tone}">{html.escape(verdict_line(answer))}</p>'
            + facts(
                ("Prediction", answer.id),
                ("Model", f"version {answer.model_version}"),
                ("Data", layout.short(answer.data_version)),
                ("Gate score", f"{answer.gate.score:.2f}"),
                ("Novelty", f"{answer.gate.novelty:.2f}"),
                ("Time", f"{answer.seconds * 1000:.0f} ms"),
                ("Size", f"{answer.width} x {answer.height} px"),
            ),
            unsafe_allow_html=True,
        )
        prediction_sets(answer)
        choose_frame(upload, answer.frames, answer.frame)
        if upload.simulated or answer.simulated_model:
            with st.container(horizontal=True, gap="small"):
                if upload.simulated:
                    st.badge(f"Simulated scan: {upload.simulated}", icon=":material/science:", color="orange")
                if answer.simulated_model:
                    st.badge("Model trained on simulated scans", icon=":material/science:", color="orange")
    pictures, figures = st.columns([3, 2], gap="small")
    with figures.container(border=True, key="card-probabilities", height="stretch"):
        st.subheader("Calibrated probabilities", anchor=False)
        st.altair_chart(probability_chart(answer), width="stretch")
        opacity = 0
        if answer.heatmap is not None:
            opacity = st.slider("Heat map opacity", 0, 100, 65, 5, format="%d %%", key=f"opacity-{answer.id}")
        st.caption(
            "Calibrated: of scans given 80 %, about 80 % are right, as long as they are like those of the training."
        )
    with pictures.container(border=True, key="card-explanation", height="stretch"):
        show_explanation(answer, opacity / 100)
    show_feedback(answer.id, answer.label, refer=answer.refer)


def show_explanation(answer: Answer, opacity: float) -> None:
    """The scan, and beside it where the model looked, or in words why there is no such picture."""
    st.subheader("Where the model looked", anchor=False)
    image = heatmap.grey(answer.image)
    left, right = st.columns(2, gap="small")
    with left.container(key=f"picture-scan-{answer.id}"):
        st.image(image, caption="The scan as it was read", width="stretch", output_format="PNG")
    if answer.heatmap is not None:
        mixed = heatmap.overlay(image, heatmap.grey(answer.heatmap), opacity)
        with right.container(key=f"picture-heat-{answer.id}"):
            caption = f"What speaks for {CLASS_NAMES[answer.label].lower()}"
            st.image(mixed, caption=caption, width="stretch", output_format="PNG")
        st.caption("Brighter regions weighed more. This explains the model; it is no outline of a tumour.")
    elif answer.tumour:
        right.markdown("**There is no heat map here.** No region spoke for this class more than the others.")
    elif answer.refer:
        right.markdown(
            "**There is no heat map here.** A heat map shows what speaks for a tumour. The most probable class is no "
            "tumour, but too uncertain to be an answer: it does not say that there is none."
        )
    else:
        right.markdown(
            "**There is no heat map here.** A heat map shows what speaks for a tumour. The model found none, so there "
            "is no region to point at."
        )


def probability_chart(answer: Answer) -> alt.LayerChart:
    """Four bars, the model's choice in full colour."""
    table = pd.DataFrame(
        {
            "Class": [CLASS_NAMES[label] for label in LABELS],
            "Probability": [answer.probabilities[label] for label in LABELS],
            "Words": [percent(answer.probabilities[label]) for label in LABELS],
            "Colour": [layout.ACCENT if label == answer.label else layout.MUTED for label in LABELS],
        }
    )
    return layout.bars(table, "Class", "Probability", order=layout.ORDER, height=140, top=1)


def show_feedback(prediction_id: str, predicted: str | None, *, refer: bool = False) -> None:
    """The reader's verdict, and what came of it; `predicted` is None for an image that the gate refused.

    A referred scan has no answer to agree with: the reader says what it shows, any class of the four.
    """
    if not layout.person().may(Role.READER):
        return

    def button(place: DeltaGenerator, words: str, verdict: Verdict, icon: str | None = None, **how: Any) -> None:
        key = f"{verdict}-{prediction_id}"
        place.button(words, key=key, icon=icon, on_click=send_feedback, args=(prediction_id, verdict), **how)

    with st.container(border=True, key="card-feedback"):
        heading = "What does it show?" if refer else "Is this right?" if predicted else "Was it right to refuse this?"
        st.subheader(heading, anchor=False)
        st.caption(f"Your verdict counts as {layout.plain(layout.person().name)}'s.")
        row = st.container(horizontal=True, gap="small")
        if not refer:
            button(row, "Agree", Verdict.AGREE, ":material/check:", type="primary")
        button(row, "Not sure", Verdict.NOT_SURE, ":material/question_mark:")
        if predicted is None:
            button(row, "It is a brain MRI", Verdict.BRAIN_MRI, ":material/undo:")
        else:
            button(row, "Not a brain MRI", Verdict.NOT_BRAIN_MRI, ":material/block:")
        choice, send = st.columns([2, 3], gap="small", vertical_alignment="bottom")
        label = choice.selectbox(
            "It shows" if refer else "Or correct it to" if predicted else "Or say what it shows",
            [label for label in LABELS if refer or label != predicted],
            index=None,
            key=f"class-{prediction_id}",
            format_func=CLASS_NAMES.__getitem__,
            placeholder="The right class",
        )
        # Of a referred scan the most probable class may be chosen too; the API records that as agreement.
        button(send, "Send" if refer else "Send correction", Verdict.CORRECT, disabled=label is None)
        recorded, note = st.session_state.get("notes", {}).get(prediction_id, (True, ""))
        if note:
            show = st.success if recorded else st.warning
            show(note, icon=":material/task_alt:" if recorded else ":material/warning:")


def send_feedback(prediction_id: str, verdict: Verdict) -> None:
    """Record a verdict, and keep what came of it in the place of what came of the one before."""
    label = st.session_state[f"class-{prediction_id}"] if verdict is Verdict.CORRECT else None
    # All of the session that is needed is fetched before: who touches the page meanwhile ends this drawing, and with it
    # the access to the session. What is written into this dict is there all the same.
    notes: dict[str, tuple[bool, str]] = st.session_state.setdefault("notes", {})
    name, needed = layout.plain(layout.person().name), layout.settings().feedback_threshold
    try:
        receipt = layout.api().feedback(prediction_id, verdict, label)
    except ApiProblem as fault:
        layout.own_key_refused(fault)
        lost = "It is not certain that your verdict was recorded" if fault.passing else "Your verdict was NOT recorded"
        notes[prediction_id] = False, f"**{lost}.** {layout.in_words(fault)}"
        return
    said = {
        Verdict.AGREE: f"You say: {CLASS_NAMES[label].lower()}." if label else "You agree.",
        Verdict.CORRECT: f"Corrected to {CLASS_NAMES.get(receipt.label or '', 'another class').lower()}.",
        Verdict.NOT_SURE: "You are not sure.",
        Verdict.NOT_BRAIN_MRI: "You say this is no brain MRI.",
        Verdict.BRAIN_MRI: "You say this is a brain MRI.",
    }[receipt.verdict]
    waiting = f"{receipt.corrections_waiting} correction{'' if receipt.corrections_waiting == 1 else 's'} waiting"
    notes[prediction_id] = (
        True,
        f"Thank you, {name}. {said} {waiting} of {needed} needed (more than {needed} start a retraining). "
        "You may change your verdict; the last one counts.",
    )


def show_problem(upload: Upload, fault: ApiProblem) -> None:
    """Why there is no result: the gate's refusal, or a fault in words."""
    if fault.gate is None:
        layout.problem(fault, on_retry=forget_outcome if fault.passing else None)
        return
    with st.container(border=True, key="card-refused"):
        st.markdown(
            f'<p class="nl-eyebrow">No result for {html.escape(upload.name)}</p>'
            '<p class="nl-verdict nl-refused">This does not look like a brain MRI</p>'
            + facts(
                ("Prediction", fault.prediction_id),
                ("Gate score", f"{fault.gate.score:.2f}"),
                ("Needed", f"{fault.gate.threshold:.2f} or more"),
            ),
            unsafe_allow_html=True,
        )
        picture, words = st.columns([2, 3], gap="medium")
        with picture.container(key="picture-refused"):
            show_refused(fault.prediction_id)
        with words:
            st.markdown(layout.plain(layout.as_sentence(fault.gate.reason or fault.detail)))
            choose_frame(upload, fault.frames, fault.frame)
            if fault.gate.threshold_origin:
                st.caption(layout.plain(fault.gate.threshold_origin))
            st.markdown(
                "The model knows only slices of a brain MRI. For anything else its answer would mean nothing, so it "
                "gives none.\n\n**What you can do**\n\n"
                "- Upload a single slice, without a collage, a report page or a photo of a screen.\n"
                "- Use the image as the scanner exported it: head whole, no frame, no arrows or text.\n"
                "- Try a simulated sample to see what a result looks like."
            )
    if fault.prediction_id:
        show_feedback(fault.prediction_id, None)


def show_refused(prediction_id: str) -> None:
    """The refused image as the platform read it: what a reader chose may be no picture that a browser knows."""
    try:
        st.image(heatmap.grey(layout.api().image(prediction_id)), width="stretch")
    except ApiProblem:
        st.caption("The picture cannot be shown for now.")


def forget_outcome() -> None:
    """Ask the API again for the same choice."""
    st.session_state["outcome"] = None


layout.heading(
    "Classify a scan",
    "Upload one slice of a brain MRI. The model says whether it sees a tumour, of which kind, how sure it is, and "
    "where it looked.",
)
panel, result = st.columns([4, 8], gap="medium")
with panel:
    consent_given, tiles_place = input_panel()
with result:
    chosen = current_upload(st.session_state) if consent_given else None
    with place_of(chosen):
        if chosen is None:
            welcome(consent_given)
        else:
            happened = classify(chosen)
            if happened.answer is not None:
                show_answer(chosen, happened.answer)
            elif happened.problem is not None:
                show_problem(chosen, happened.problem)
with tiles_place:  # last: rendering them takes a moment at first, and the rest of the page need not wait for it
    sample_tiles(consent_given)
