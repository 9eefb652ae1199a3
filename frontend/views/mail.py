"""Mail: what the platform sent, as the local mail sink kept it."""

import layout
import streamlit as st

layout.heading(
    "Mail",
    "What the platform told its operators: builds, retrainings, promotions and failures. Kept by the local mail sink.",
)
mails = layout.load(layout.api().mails)
if mails is not None and not mails:
    layout.empty(
        "No mail yet",
        "A mail comes with each finished build or retraining, and with each failure. "
        "With a mail server of your own, mails go there instead.",
    )
for number, mail in enumerate(mails or ()):
    with st.expander(f"**{layout.plain(mail.subject)}** · {layout.moment(mail.at)}", expanded=number == 0):
        st.caption(f"To {layout.plain(mail.to)}")
        st.text(mail.body.replace("\r\n", "\n").strip() or "This mail has no text.")
