"""What a reader sees of a page."""

from streamlit.testing.v1 import AppTest

KINDS = ("title", "subheader", "markdown", "caption", "text", "success", "warning", "error")


def words(app: AppTest) -> str:
    """All text of the page, by kind."""
    shown = [str(element.value) for kind in KINDS for element in app.get(kind)]
    shown += [f"{metric.label} {metric.value}" for metric in app.metric]
    shown += [f"{table.value}" for table in app.table]
    shown += [expander.label for expander in app.expander]
    return "\n".join(shown)


def labels(app: AppTest) -> list[str]:
    """The labels of all buttons that can be pressed."""
    return [button.label for button in app.button if not button.disabled]
