"""An API on a real uvicorn, and a small network whose answers are known beforehand."""

import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import onnx
import psycopg2
import uvicorn
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from neuroloop.bootstrap import Services
from neuroloop.core.credentials import Role, new_key
from neuroloop.core.schemas import LABELS, SplitName
from neuroloop.imaging.canonical import canonicalize
from neuroloop.model import bundle as bundles
from neuroloop.model.calibration import Calibration
from neuroloop.model.canary import Canary, choose
from neuroloop.model.gate import _MEASURES, FittedGate, Gate
from neuroloop.model.gate import SIDE as GATE_SIDE
from neuroloop.serving import keyring
from neuroloop.serving.api import create_app
from neuroloop.serving.server import BoundedHttp

SIZE, CELLS = 64, 8
KEY = new_key()
"""The frontend's key to every API of these tests that has no other in its settings."""
BEARER = {"Authorization": f"Bearer {KEY}"}
CORNERS = dict(zip(LABELS, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True))
"""class -> (lower?, right?): the quarter whose brightness speaks for it in the network below."""


def quarter_network() -> bytes:
    """The class is the brightest quarter: cam = brightness of each cell inside the class's quarter."""
    masks = np.zeros((1, CELLS, CELLS, len(LABELS)), np.float32)
    half = CELLS // 2
    for index, (lower, right) in enumerate(CORNERS.values()):
        masks[0, lower * half : (lower + 1) * half, right * half : (right + 1) * half, index] = 0.2
    nodes = [
        helper.make_node("Transpose", ["image"], ["channels_first"], perm=[0, 3, 1, 2]),
        helper.make_node(
            "AveragePool", ["channels_first"], ["pooled"], kernel_shape=[SIZE // CELLS] * 2, strides=[SIZE // CELLS] * 2
        ),
        helper.make_node("Transpose", ["pooled"], ["cells"], perm=[0, 2, 3, 1]),
        helper.make_node("Mul", ["cells", "masks"], ["cam"]),
        helper.make_node("ReduceMean", ["cam", "rows_columns"], ["logits"], keepdims=0),
        helper.make_node("ReduceMean", ["cells", "rows_channel"], ["features"], keepdims=0),
    ]
    shapes = {"logits": ["n", 4], "cam": ["n", CELLS, CELLS, 4], "features": ["n", CELLS]}
    graph = helper.make_graph(
        nodes,
        "quarters",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", SIZE, SIZE, 1])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [
            numpy_helper.from_array(masks, "masks"),
            numpy_helper.from_array(np.array([1, 2], np.int64), "rows_columns"),
            numpy_helper.from_array(np.array([1, 3], np.int64), "rows_channel"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def texture_gate(*, roughest: float = 0.12, far: float = 1000.0) -> FittedGate:
    """Refuses what is rougher all over than `roughest`, such as noise; brighter cells than `far` are novel."""
    nodes = [
        helper.make_node("Transpose", ["image"], ["first"], perm=[0, 3, 1, 2]),
        helper.make_node("Div", ["first", "white"], ["x"]),
        helper.make_node("Mul", ["x", "x"], ["square"]),
        helper.make_node("AveragePool", ["x"], ["mean"], kernel_shape=[5, 5], auto_pad="SAME_UPPER"),
        helper.make_node("AveragePool", ["square"], ["mean_square"], kernel_shape=[5, 5], auto_pad="SAME_UPPER"),
        helper.make_node("Mul", ["mean", "mean"], ["squared_mean"]),
        helper.make_node("Sub", ["mean_square", "squared_mean"], ["variance"]),
        helper.make_node("Relu", ["variance"], ["positive"]),
        helper.make_node("Sqrt", ["positive"], ["local"]),
        helper.make_node("ReduceMean", ["local", "places"], ["texture"], keepdims=0),
        helper.make_node("Neg", ["texture"], ["logit"]),
    ]
    graph = helper.make_graph(
        nodes,
        "texture",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", GATE_SIDE, GATE_SIDE, 1])],
        [helper.make_tensor_value_info("logit", TensorProto.FLOAT, ["n", 1])],
        [
            numpy_helper.from_array(np.array(255, np.float32), "white"),
            numpy_helper.from_array(np.array([2, 3], np.int64), "places"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    facts = Gate(
        offset=-roughest,
        width=0.01,
        threshold=0.5,
        threshold_origin="chosen for this test",
        usual=((0.0, 0.1),) * len(_MEASURES),
        centre=(0.0,) * CELLS,
        scale=(60.0,) * CELLS,
        far=far,
        doubt=(0.0,) * CELLS,
        doubt_bias=-20.0,
        doubtful=1.0,
        far_origin="chosen for this test",
        accepted_brains=1.0,
        accepted_widened=1.0,
        accepted_rendered=1.0,
        novel_widened=0.0,
        novel_rendered=0.0,
        missed_widened=0.0,
        rejected={},
    )
    return FittedGate(facts, model.SerializeToString())


def calibration(*, temperature: float = 1.0, refer_below: float = 0.5) -> Calibration:
    """At 90 %, a class is in the set from a probability of 0.4 on; at 95 %, from 0.1 on."""
    levels = {"0.90": 0.6, "0.95": 0.9}
    return Calibration(
        temperature=temperature,
        conformal={level: dict.fromkeys(LABELS, q) for level, q in levels.items()},
        refer_below=refer_below,
    )


def write_bundle(
    folder: Path,
    *,
    data_version: str = "d1",
    temperature: float = 1.0,
    refer_below: float = 0.5,
    roughest: float = 0.12,
    far: float = 1000.0,
    split: SplitName = "grouped",
    canary: Canary | None = None,
) -> Path:
    return bundles.write(
        folder,
        onnx=quarter_network(),
        gate=texture_gate(roughest=roughest, far=far),
        statistics=b"{}",
        image_size=SIZE,
        architecture="tiny",
        calibration=calibration(temperature=temperature, refer_below=refer_below),
        data_version=data_version,
        split=split,
        simulated=True,
        metrics={"macro_f1": 0.9},
        canary=canary,
    )


def canary_of(folder: Path) -> Canary:
    """Heads of every class, as the bundle in `folder` answers them."""
    places = [(label, 160 + 8 * n) for label in range(len(LABELS)) for n in range(4)]
    images = np.stack([canonicalize(head(LABELS[label], height=height), SIZE) for label, height in places])
    labels = np.array([label for label, _ in places])
    found = choose(images, labels, bundles.Bundle.load(folder).predict(images).probabilities)
    assert found is not None
    assert len(found.labels) == 16
    return found


def head(label: str, *, height: int = 200, width: int = 240) -> np.ndarray:
    """A smooth round head, uint8 (height, width), with a bright spot in the quarter that speaks for `label`."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    lower, right = CORNERS[label]
    image = 90.0 * (np.hypot(x, y) < 0.8)
    image += 140 * (np.hypot(x - (0.35 if right else -0.35), y - (0.35 if lower else -0.35)) < 0.25)
    return image.astype(np.uint8)


def noise(side: int = 200) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


@dataclass
class Api:
    """A running API; `client` sends `key`, the frontend's, which may do everything in anybody's name."""

    client: httpx.Client
    services: Services
    port: int
    key: str = ""

    def predict(self, pixels: np.ndarray) -> httpx.Response:
        return self.upload(encoded(pixels))

    def upload(self, data: bytes, name: str = "scan.png", **query: int) -> httpx.Response:
        return self.client.post("/v1/predictions", files={"file": (name, data)}, params=query)

    def feedback(
        self, prediction_id: str, verdict: str, label: str | None = None, reader: str = "ann"
    ) -> httpx.Response:
        said = {"verdict": verdict, "reader": reader} | ({"label": label} if label else {})
        return self.client.post(f"/v1/predictions/{prediction_id}/feedback", json=said)

    def holder(self, role: str, name: str = "") -> httpx.Client:
        """A client with a new key of its own; the caller closes it."""
        return self.client_of(keyring.create(self.services.keys, name or role, Role(role), by="a test").key)

    def client_of(self, key: str | None) -> httpx.Client:
        """A client that sends this key, or none."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30, headers=headers)

    def stored(self) -> list[str]:
        return self.services.store.list("InferenceLogs/")

    def rows(self) -> list[str]:
        """Every row of every table of the database, as text."""
        with contextlib.closing(psycopg2.connect(self.services.settings.database_url)) as connection:
            cursor = connection.cursor()
            cursor.execute(
                "SELECT quote_ident(table_schema) || '.' || quote_ident(table_name) FROM information_schema.tables "
                "WHERE table_schema NOT IN ('pg_catalog', 'information_schema') AND table_type = 'BASE TABLE'"
            )
            rows = []
            for (table,) in cursor.fetchall():
                cursor.execute(f"SELECT t::text FROM {table} t")
                rows += [text for (text,) in cursor.fetchall()]
            return rows


@contextlib.contextmanager
def serving(services: Services, *, model: bool = True) -> Iterator[Api]:
    """Serve the API on a free port until the end of the block; waits for a model unless told not to.

    The key of the settings gets in; where they have none, `KEY`.
    """
    key = services.settings.ui_api_key or KEY
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        app = create_app(services, first_key=key)
        server = uvicorn.Server(
            uvicorn.Config(app, http=BoundedHttp, log_config=None, access_log=False, timeout_keep_alive=75)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            headers = {"Authorization": f"Bearer {key}"}
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, headers=headers) as client:
                wait(lambda: server.started)
                if model:
                    wait(lambda: client.get("/v1/model").status_code == 200)
                yield Api(client, services, port, key)
        finally:
            server.should_exit = True
            thread.join()


def wait(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
