"""Classify: choose a scan, read the result with its explanation, tell the platform whether it is right."""

import base64
import dataclasses
import html
from typing import Any
from uuid import uuid4

import altair as alt
import heatmap
import layout
import pandas as pd
import samples
import signin
import streamlit as st
from api_client import Answer, ApiProblem
from layout import CLASS_NAMES, VERDICT_NAMES, percent
from session import Outcome, Upload, choose, current_upload, outcome_of
from streamlit.delta_generator import DeltaGenerator

from neuroloop.core.credentials import Role
from neuroloop.core.schemas import LABELS, NO_TUMOUR, Verdict
from neuroloop.imaging.decode import FORMATS

CONSENT = (
    "I understand that this is for research only and not for diagnosis, that the scan I choose is stored, and that it "
    "carries no patient's name."
)
RETRAIN = "The scan may be used to retrain the model (optional)."

SHORT_NAMES = {"glioma": "glioma", "meningioma": "meningioma", "notumor": "no tumour", "pituitary": "pituitary"}


def take_upload() -> None:
    """The uploader changed: its file, or nothing, is now the choice."""
    file = st.session_state.get(uploader_key())
    st.session_state["open"] = ""
    choose(st.session_state, Upload(file.getvalue(), file.name, file.type, consent=ticked()) if file else None)


def ticked() -> str:
    """The consent that the ticks state now."""
    return "training" if st.session_state.get("retrain") else "record"


def looked_at_anew(upload: Upload, **changes: Any) -> Upload:
    """The same file as a choice of its own, which is another request, with the consent that is ticked now."""
    consent = upload.consent if upload.simulated else ticked()
    return dataclasses.replace(upload, consent=consent, choice=uuid4().hex, **changes)


def take_sample(number: int) -> None:
    """A sample was clicked: it is now the choice, and the uploader is emptied; a second click changes nothing."""
    sample = samples.render(*samples.SAMPLES[number])
    name, upload = f"Sample {number + 1}", current_upload(st.session_state)
    if upload is not None and upload.simulated and upload.name == name:
        return
    empty_uploader()
    st.session_state["open"] = ""
    # No model of real scans shall learn from a simulated one.
    chosen = Upload(sample.png, name, "image/png", simulated=sample.caption, consent="simulated")
    choose(st.session_state, chosen)


def take_recorded() -> None:
    """An id was entered: the prediction of that id is now the choice, as it was recorded; it may be entered again."""
    prediction_id, st.session_state["open"] = st.session_state["open"].strip(), ""
    if prediction_id:
        empty_uploader()
        choose(st.session_state, reopened(prediction_id))


def reopened(prediction_id: str) -> Upload:
    """A recorded prediction as the choice; nothing is sent."""
    return Upload(b"", f"prediction {prediction_id}", "", recorded=prediction_id)


def empty_uploader() -> None:
    """The next drawing has a new one."""
    st.session_state["uploaders"] = st.session_state.get("uploaders", 0) + 1


def uploader_key() -> str:
    """A new key gives an empty uploader."""
    return f"file-{st.session_state.get('uploaders', 0)}"


def remember_consent() -> None:
    """Keep the ticks while the reader visits other pages."""
    st.session_state["consented"] = st.session_state["consent"]
    st.session_state["retrainable"] = st.session_state["retrain"]


def input_panel() -> tuple[bool, DeltaGenerator]:
    """Consent and upload; returns whether consent is given, and the place for the samples."""
    with st.container(border=True, key="card-input"):
        st.subheader("1. Before you start", anchor=False)
        consent = st.checkbox(
            CONSENT, value=st.session_state.get("consented", False), key="consent", on_change=remember_consent
        )
        st.checkbox(
            RETRAIN,
            value=st.session_state.get("retrainable", False),
            key="retrain",
            on_change=remember_consent,
            help="It counts for the scans that you choose from then on. Without it a scan, and what readers say of it, "
            "is kept for the record only.",
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
    if layout.person().may(Role.READER):
        with st.container(border=True, key="card-open"):
            st.text_input(
                "Or open a prediction by its id",
                key="open",
                max_chars=100,
                on_change=take_recorded,
                placeholder="It stands beside each result",
                help="To judge a scan that somebody else uploaded, such as one referred to a reader.",
            )
    return consent, tiles


def sample_tiles(consent: bool) -> None:
    """The simulated samples, each a picture and its button."""
    with st.spinner("Rendering simulated scans"):
        rendered = [samples.render(*sample) for sample in samples.SAMPLES]
    for row in range(0, len(rendered), 4):
        for number, column in enumerate(st.columns(4, gap="small"), row):
            sample = rendered[number]
            with column.container(key=f"sample-{number}"):
                st.image(sample.png, width="stretch", alt=f"Simulated scan: {sample.caption}")
                st.button(
                    f"Sample {number + 1}: {SHORT_NAMES[sample.label]}",
                    key=f"take-{number}",
                    help=f"Simulated: {sample.caption}",
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
                outcome = look_up(upload) if upload.recorded else ask(upload)
            except ApiProblem as fault:
                outcome = Outcome(upload.key, problem=fault, simulated=upload.simulated)
        st.session_state["outcome"] = outcome
    return outcome


def ask(upload: Upload) -> Outcome:
    """Has the model look at it. Its key makes "try again" a repeat, no second record, unless the consent is another."""
    answer = layout.api().predict(
        upload.data, upload.media_type, frame=upload.frame, key=upload.key, consent=upload.consent
    )
    return Outcome(upload.key, answer=answer, simulated=upload.simulated)


def look_up(upload: Upload) -> Outcome:
    """What was recorded of a prediction, as it was answered then, but for the heat map, which is not kept."""
    row = layout.api().prediction(upload.recorded)
    said = tuple(f"{one.reader}: {VERDICT_NAMES[one.verdict]}{shown_class(one.label)}" for one in row.feedback)
    scan = "A simulated scan" if row.consent == "simulated" else "A scan"
    history = (f"{scan} from {layout.moment(row.created_at)}, uploaded by {row.owner or 'nobody named'}", *said)
    simulated = "it shows nobody" if row.consent == "simulated" else ""
    if row.label is None:
        refusal = ApiProblem("", detail=row.gate.reason, status=422, gate=row.gate, prediction_id=row.id)
        return Outcome(upload.key, problem=refusal, history=history, simulated=simulated)
    facts_of_row = row.model_dump(exclude={"created_at", "owner", "consent", "feedback"})
    png = base64.b64encode(layout.api().image(row.id))
    answer = Answer.model_validate(facts_of_row | {"tumour": row.label != NO_TUMOUR, "image": png})
    return Outcome(upload.key, answer=answer, history=history, simulated=simulated)


def shown_class(label: str | None) -> str:
    """The class that a correction names."""
    return f" to {CLASS_NAMES[label].lower()}" if label else ""


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
    right.button("Show this slice", key="take-frame", on_click=take_frame, args=(upload.choice,), width="stretch")


def take_frame(choice: str) -> None:
    """Another slice of the same file is now the choice; the one that is shown already is not asked for again.

    Nor is one for a click on a button of the choice before: the field of the new one may not be drawn yet.
    """
    upload = current_upload(st.session_state)
    if upload is None or upload.choice != choice:
        return
    outcome = outcome_of(st.session_state, upload)
    seen = outcome.seen if outcome is not None else None
    frame = int(st.session_state[frame_key(upload)])
    if frame != (seen.frame if seen is not None else upload.frame):
        frames = seen.frames if seen is not None else upload.frames
        choose(st.session_state, looked_at_anew(upload, frame=frame, frames=frames))
    elif seen is None:  # this slice brought a fault
        try_again()


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


def verdict(upload: Upload, answer: Answer) -> str:
    """The result for all who see or hear the page; before any class, that and why a reader should look."""
    eyebrow, line = f"Result for {html.escape(upload.name)}", html.escape(verdict_line(answer))
    if not answer.refer:
        tone = "nl-tumour" if answer.tumour else "nl-none"
        return announced(eyebrow, f'<p class="nl-verdict {tone}" role="heading" aria-level="2">{line}</p>')
    return announced(
        eyebrow,
        '<div class="nl-refer"><p class="nl-verdict" role="heading" aria-level="2">Refer to a reader</p>'
        f"<p>{html.escape(answer.refer_reason)} What the model would say stands below for the record."
        f"{'' if layout.person().may(Role.READER) else f' {pass_on(answer.id)}'}</p></div>"
        f'<p class="nl-verdict nl-unsure">{line}</p>',
    )


def pass_on(prediction_id: str, bold: str = "<b>", end: str = "</b>") -> str:
    """How an uploader gets a reader to look at it."""
    return f"Give a reader the id {bold}{prediction_id}{end}: it opens this result on their Classify page."


def announced(eyebrow: str, markup: str) -> str:
    """Markup that a screen reader reads out as soon as it is there."""
    return f'<div role="status"><p class="nl-eyebrow">{eyebrow}</p>{markup}</div>'


def prediction_sets(answer: Answer) -> None:
    """What else it may be, at each coverage, in plain words."""
    if answer.prediction_sets:
        st.markdown(
            "  \n".join(layout.set_line(*one) for one in sorted(answer.prediction_sets.items())),
            help="Prediction sets: of the scans of each class, 90 and 95 in a hundred have their class in such a set, "
            "as long as they are like those of the training.",
        )


def show_history(history: tuple[str, ...]) -> None:
    """Of a prediction that was opened again: when it was made, and what readers have said of it."""
    for line in history:
        st.caption(layout.plain(line))


def badges(simulated: str, simulated_model: bool = False) -> None:
    """What of this is simulated: the scan, the images the model learned from."""
    if simulated or simulated_model:
        with st.container(horizontal=True, gap="small"):
            if simulated:
                st.badge(f"Simulated scan: {simulated}", icon=":material/science:", color="orange")
            if simulated_model:
                st.badge("Model trained on simulated scans", icon=":material/science:", color="orange")


def show_answer(upload: Upload, answer: Answer, outcome: Outcome) -> None:
    """Result, explanation and feedback."""
    with st.container(border=True, key="card-result"):
        st.markdown(
            verdict(upload, answer)
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
        show_history(outcome.history)
        choose_frame(upload, answer.frames, answer.frame)
        badges(outcome.simulated, answer.simulated_model)
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
        show_explanation(answer, opacity / 100, again=bool(upload.recorded))
    show_feedback(answer.id, answer.label, refer=answer.refer)


def show_explanation(answer: Answer, opacity: float, *, again: bool) -> None:
    """The scan, and beside it where the model looked, or in words why there is no such picture."""
    st.subheader("Where the model looked", anchor=False)
    image = heatmap.grey(answer.image)
    left, right = st.columns(2, gap="small")
    with left.container(key=f"picture-scan-{answer.id}"):
        caption = "The scan as it was read"
        st.image(image, caption=caption, width="stretch", output_format="PNG", alt=caption)
    if answer.heatmap is not None:
        mixed = heatmap.overlay(image, heatmap.grey(answer.heatmap), opacity)
        with right.container(key=f"picture-heat-{answer.id}"):
            caption = f"What speaks for {CLASS_NAMES[answer.label].lower()}"
            alt_text = f"The scan under its heat map: {caption[0].lower()}{caption[1:]}"
            st.image(mixed, caption=caption, width="stretch", output_format="PNG", alt=alt_text)
        st.caption("Brighter regions weighed more. This explains the model; it is no outline of a tumour.")
    elif again:
        right.markdown("**There is no heat map here.** It came with the answer and is not kept.")
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
        if prediction_id in (notes := st.session_state.get("notes", {})):
            layout.note(*notes[prediction_id])


def send_feedback(prediction_id: str, verdict: Verdict) -> None:
    """Record a verdict, and keep what came of it in the place of what came of the one before.

    Nothing where the session has ended since the button was drawn: it would count in the name of whoever left.
    """
    if signin.gone(layout.settings()):
        return
    label = st.session_state[f"class-{prediction_id}"] if verdict is Verdict.CORRECT else None
    # All of the session that is needed is fetched before: who touches the page meanwhile ends this drawing, and with it
    # the access to the session. What is written into this dict is there all the same.
    notes: dict[str, tuple[bool, str]] = st.session_state.setdefault("notes", {})
    name, needed = layout.plain(layout.person().name), layout.settings().feedback_threshold
    upload = current_upload(st.session_state)
    again = upload is not None and upload.recorded == prediction_id
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
    count = f"{waiting} of {needed} needed (more than {needed} start a retraining)."
    if receipt.verdict is Verdict.CORRECT and not receipt.may_train:
        count = "It is kept for the record, and no retraining learns from it: "
        count += "whoever uploaded this scan did not agree to that, or it is a simulated one."
    notes[prediction_id] = (
        True,
        f"Thank you, {name}. {said} {count} You may change your verdict; the last one counts.",
    )
    if again:  # it shows what readers have said
        st.session_state["outcome"] = None


def show_problem(upload: Upload, fault: ApiProblem, outcome: Outcome) -> None:
    """Why there is no result: the gate's refusal, or a fault in words."""
    if fault.gate is None:
        layout.problem(fault, on_retry=try_again if fault.passing else None)
        if upload.frame is not None:  # another slice of the same file may do better
            choose_frame(upload, upload.frames, upload.frame)
        return
    with st.container(border=True, key="card-refused"):
        st.markdown(
            announced(
                f"No result for {html.escape(upload.name)}",
                '<p class="nl-verdict nl-refused" role="heading" aria-level="2">'
                "This does not look like a brain MRI</p>",
            )
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
            show_history(outcome.history)
            choose_frame(upload, fault.frames, fault.frame)
            badges(outcome.simulated)
            if fault.gate.threshold_origin:
                st.caption(layout.plain(fault.gate.threshold_origin))
            st.markdown(
                "The model knows only slices of a brain MRI. For anything else its answer would mean nothing, so it "
                "gives none.\n\n**What you can do**\n\n"
                "- Upload a single slice, without a collage, a report page or a photo of a screen.\n"
                "- Use the image as the scanner exported it: head whole, no frame, no arrows or text.\n"
                "- Try a simulated sample to see what a result looks like."
                + ("" if layout.person().may(Role.READER) else f"\n- {pass_on(fault.prediction_id, '**', '**')}")
            )
    if fault.prediction_id:
        show_feedback(fault.prediction_id, None)


def show_refused(prediction_id: str) -> None:
    """The refused image as the platform read it: what a reader chose may be no picture that a browser knows."""
    try:
        st.image(layout.api().image(prediction_id), width="stretch", alt="The refused image as it was read")
    except ApiProblem:
        st.caption("The picture cannot be shown for now.")


def try_again() -> None:
    """Ask the API again for the same choice; where another consent is ticked by now, as a choice of its own."""
    upload = current_upload(st.session_state)
    if upload is not None and upload.data and not upload.simulated and upload.consent != ticked():
        choose(st.session_state, looked_at_anew(upload))
    st.session_state["outcome"] = None


layout.heading(
    "Classify a scan",
    "Upload one slice of a brain MRI. The model says whether it sees a tumour, of which kind, how sure it is, and "
    "where it looked.",
)
linked = st.query_params.pop("prediction", "")  # a link to one prediction
if linked and layout.person().may(Role.READER):
    choose(st.session_state, reopened(linked))
panel, result = st.columns([4, 8], gap="medium")
with panel:
    consent_given, tiles_place = input_panel()
with result:
    chosen = current_upload(st.session_state)
    if chosen is not None and not (consent_given or chosen.recorded):
        chosen = None
    with place_of(chosen):
        if chosen is None:
            welcome(consent_given)
        else:
            happened = classify(chosen)
            if happened.answer is not None:
                show_answer(chosen, happened.answer, happened)
            elif happened.problem is not None:
                show_problem(chosen, happened.problem, happened)
with tiles_place:  # last: rendering them takes a moment at first, and the rest of the page need not wait for it
    sample_tiles(consent_given)
