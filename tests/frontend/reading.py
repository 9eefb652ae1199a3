"""What a reader sees of a page."""

import json
from typing import Any

import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
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


def chart(app: AppTest, value: str) -> tuple[dict[str, Any], pd.DataFrame]:
    """The chart that draws the column `value` along x: its first layer, and the table it is drawn from."""
    for one in app.get("vega_lite_chart"):
        spec = json.loads(one.proto.spec)
        layer = spec["layer"][0] if "layer" in spec else spec
        if layer["encoding"]["x"]["field"] == value:
            return layer, pa.ipc.open_stream(one.proto.datasets[0].data.data).read_pandas()
    raise AssertionError(f"no chart shows {value}")


def picture(app: AppTest, caption: str) -> str:
    """The address of the picture above these words; it follows from the picture's content alone."""
    return next(image.value[0] for image in app.get("image") if image.captions[0] == caption)


def address(pixels: NDArray[Any]) -> str:
    """The address that these pixels get where they are shown as they are."""

    def show(pixels):  # its text runs by itself
        import streamlit as st

        st.image(pixels, output_format="PNG")

    return AppTest.from_function(show, kwargs={"pixels": pixels}).run().get("image")[0].value[0]
