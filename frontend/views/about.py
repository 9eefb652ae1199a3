"""About: what this is for and what not, the four classes, the way of an upload, and how the model learns."""

import layout
import samples
import streamlit as st
from layout import CLASS_NAMES

from neuroloop.core.schemas import LABELS

WHO_CNS = (
    "WHO Classification of Tumours Editorial Board. *Central Nervous System Tumours*. WHO Classification of Tumours, "
    "5th edition, volume 6. International Agency for Research on Cancer, Lyon, 2021."
)
LOUIS = (
    "Louis DN, Perry A, Wesseling P, et al. *The 2021 WHO Classification of Tumors of the Central Nervous System: a "
    "summary*. Neuro-Oncology 23(8), 2021."
)
EANO = (
    "Goldbrunner R, Stavrinou P, Jenkinson MD, et al. *EANO guideline on the diagnosis and management of meningiomas*. "
    "Neuro-Oncology 23(11), 2021."
)
ASA = (
    "Asa SL, Mete O, Perry A, Osamura RY. *Overview of the 2022 WHO Classification of Pituitary Tumors*. Endocrine "
    "Pathology 33, 2022."
)
CAM = (
    "Zhou B, Khosla A, Lapedriza A, Oliva A, Torralba A. *Learning Deep Features for Discriminative Localization*. "
    "CVPR 2016 (the heat map)."
)
GUO = (
    "Guo C, Pleiss G, Sun Y, Weinberger KQ. *On Calibration of Modern Neural Networks*. ICML 2017 (the calibrated "
    "probabilities)."
)
MNI = (
    "Fonov VS, Evans AC, McKinstry RC, Almli CR, Collins DL. *Unbiased nonlinear average age-appropriate brain "
    "templates from birth to adulthood*. NeuroImage 47, 2009 (the anatomy of the simulated scans)."
)
SOURCES = (WHO_CNS, LOUIS, EANO, ASA, CAM, GUO, MNI)

CLASSES = {
    "glioma": (
        "A tumour that arises from glial cells, or cells like them, inside the brain. It often grows without a "
        "sharp border; high grades tend to show a ring of contrast enhancement and swelling around it. [1, 2]"
    ),
    "meningioma": (
        "A tumour of the meninges, the coverings of the brain. It sits against the skull or the folds of the dura, is "
        "mostly round and sharply bounded, and enhances evenly. Most are benign. [1, 3]"
    ),
    "notumor": (
        "No tumour of these three kinds is seen. It does not mean a healthy brain: other diseases, and tumours "
        "too small or too faint for one slice, fall here as well."
    ),
    "pituitary": (
        "A tumour of the pituitary gland, in the midline below the brain (the sella). Most are benign neuroendocrine "
        "tumours, also called adenomas. [1, 4]"
    ),
}
UPLOAD_STEPS = (
    ("Sent", "The file goes to the inference API under an identity made by the server. Its name stays behind."),
    ("Decoded", "Pixels are read within limits of size and format. Everything else in the file is dropped."),
    (
        "Put in canonical form",
        "The head is cropped, padded and normalised, with the same code that prepared the training.",
    ),
    ("Checked by the gate", "Is it a brain MRI at all? If not, you are told why, and no class is given."),
    (
        "Classified",
        "One pass of the model gives four calibrated probabilities, the classes that stay open at 90 and 95 %, and the "
        "heat map. Where it is too unsure it says so, and refers the scan to a reader.",
    ),
    ("Stored and logged", "Scan, result, model and data version are kept before you see the answer."),
    (
        "Corrected by you",
        "Your verdict is attached. A corrected scan waits for the next retraining, if it may be used for that.",
    ),
)
RETRAINING_STEPS = (
    (
        "Corrections pile up",
        "A check runs on a schedule. With more than 50 unused corrections it goes on, otherwise it waits.",
    ),
    ("A batch is frozen", "Exactly once, so that no scan is used twice. A fifth is held out for ever, as a test."),
    ("The model is retrained", "From the present champion, on the original training scans and the corrections."),
    ("Both are compared", "On the same frozen test part and on the held-out corrections."),
    (
        "The better one serves",
        "Only if it gains on the corrections and loses next to nothing elsewhere. The reasons are on Models.",
    ),
)


def steps(items: tuple[tuple[str, str], ...]) -> None:
    """A numbered way."""
    listed = "".join(f"<li><b>{title}.</b> {text}</li>" for title, text in items)
    st.markdown(f'<ol class="nl-steps">{listed}</ol>', unsafe_allow_html=True)


layout.heading(
    "About NeuroLoop",
    "A platform for research on brain-MRI tumour classification that learns from the corrections of its readers.",
)
purpose, limits = st.columns(2, gap="small")
with purpose.container(border=True, key="card-purpose", height="stretch"):
    st.subheader("Intended use", anchor=False)
    st.markdown(
        "Research and teaching: studying how a classifier of brain-MRI slices behaves, how it explains itself, and how "
        "it changes with feedback. Its readers know the field and do not act on its answers."
    )
with limits.container(border=True, key="card-limits", height="stretch"):
    st.subheader("Not a medical device", anchor=False)
    st.markdown(
        "**Not for diagnosis, triage or treatment.** It is neither approved nor validated for clinical use. It sees "
        "one slice without history or other sequences, knows four classes only, and can be wrong while sounding sure. "
        "Never upload anything that identifies a patient."
    )

with st.container(border=True, key="card-classes"):
    st.subheader("The four classes", anchor=False)
    with st.spinner("Rendering simulated examples"):
        examples = {label: samples.render(label, 900_001) for label in LABELS}
    for label, column in zip(LABELS, st.columns(4, gap="medium"), strict=True):
        with column.container(key=f"picture-class-{label}"):
            st.image(examples[label].png, width="stretch", alt=f"Simulated scan: {examples[label].caption}")
            with st.container(horizontal=True, vertical_alignment="center", gap="small"):
                st.markdown(f"**{CLASS_NAMES[label]}**", width="content")
                st.badge("Simulated", icon=":material/science:", color="orange")
            st.markdown(CLASSES[label].replace("[", "\\["))

way, learning = st.columns(2, gap="small")
with way.container(border=True, key="card-way", height="stretch"):
    st.subheader("What happens to an upload", anchor=False)
    steps(UPLOAD_STEPS)
with learning.container(border=True, key="card-learning", height="stretch"):
    st.subheader("How the model is retrained", anchor=False)
    steps(RETRAINING_STEPS)

with st.container(border=True, key="card-sources"):
    st.subheader("Sources", anchor=False)
    st.markdown("\n".join(f"{number}. {source}" for number, source in enumerate(SOURCES, 1)))
