"""What most people would write: FastAPI around `keras.Model.predict`. The rival of `bench/serving.py`.

`BUNDLE=folder uvicorn plain_service:app` serves the weights of a bundle at `POST /predict`: decode, resize, predict,
probabilities. No gate, no heat map, no store, no log, no keys, no limits.
"""

import os
from pathlib import Path
from typing import Annotated

import numpy as np
from fastapi import FastAPI, File, UploadFile
from PIL import Image

from neuroloop.core.schemas import LABELS
from neuroloop.model import export, network
from neuroloop.model.bundle import Bundle
from neuroloop.model.calibration import softmax

_bundle = Bundle.load(Path(os.environ["BUNDLE"]))
_size = _bundle.image_size
_model = network.build(_size, arch=_bundle.manifest.architecture)
export.load_weights(_model, _bundle.weights)
_model.predict(np.zeros((1, _size, _size, 1), np.float32), verbose=0)  # traced before the first client comes

app = FastAPI()


@app.get("/health")
def health() -> dict[str, str]:
    """Whether it is up."""
    return {"status": "up"}


@app.post("/predict")
def predict(file: Annotated[UploadFile, File()]) -> dict[str, float]:
    """The probability of each class."""
    image = Image.open(file.file).convert("L").resize((_size, _size))
    said = _model.predict(np.asarray(image, np.float32)[None, ..., None], verbose=0)
    return dict(zip(LABELS, softmax(said["logits"])[0].astype(float).tolist(), strict=True))
