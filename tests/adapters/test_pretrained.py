"""Fetching ImageNet weights, from a small server on this machine that behaves well or badly."""

import hashlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from neuroloop.adapters.pretrained import locate
from neuroloop.core.errors import InvalidSetting, Unavailable


@pytest.fixture
def publisher() -> Iterator[str]:
    """Sends something that is no weights file; for ResNet, a byte now and then, for ever."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if "inception" in self.path:
                self.send_error(404)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>login</html>")
            while "resnet" in self.path and not ended.wait(0.05):
                try:
                    self.wfile.write(b".")
                except OSError:
                    return

        def log_message(self, *_: object) -> None:
            pass

    ended = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    ended.set()
    server.shutdown()
    server.server_close()


def test_architectures_without_pretrained_weights_and_the_choice_none_ask_nobody(tmp_path: Path):
    assert locate("imagenet", "compact", tmp_path) is None
    assert locate("none", "xception", tmp_path) is None


def test_a_file_of_ones_own_is_taken_as_it_is(tmp_path: Path):
    file = tmp_path / "mine.h5"
    file.write_bytes(b"x")
    assert locate(str(file), "xception", tmp_path / "cache") == file
    with pytest.raises(InvalidSetting, match=r"NEUROLOOP_PRETRAINED=.*other\.h5 is no file"):
        locate(str(tmp_path / "other.h5"), "xception", tmp_path)


@pytest.mark.parametrize(
    ("architecture", "why"),
    [("xception", "is not the file"), ("inceptionv3", "404"), ("resnet101v2", "not complete after 1 seconds")],
)
def test_a_publisher_that_sends_something_else_or_never_ends_is_given_up(
    publisher: str, tmp_path: Path, architecture: str, why: str
):
    start = time.monotonic()
    with pytest.raises(Unavailable, match=f"ImageNet weights of {architecture} cannot.*{why}.*NEUROLOOP_PRETRAINED"):
        locate("imagenet", architecture, tmp_path, publisher=publisher, budget=1)
    assert time.monotonic() - start < 10
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_the_error_names_the_file_and_where_to_put_it(tmp_path: Path, free_port):
    start = time.monotonic()
    with pytest.raises(Unavailable, match=f"xception_weights.*put it at {tmp_path}"):
        locate("imagenet", "xception", tmp_path, publisher=f"http://127.0.0.1:{free_port()}")
    assert time.monotonic() - start < 20


def test_a_file_put_into_the_cache_by_hand_counts_only_with_the_right_hash(tmp_path: Path, free_port):
    file = tmp_path / "xception_weights_tf_dim_ordering_tf_kernels_notop.h5"
    file.write_bytes(b"not it")
    assert hashlib.md5(file.read_bytes()).hexdigest() != "b0042744bf5b25fce3cb969f33bebb97"
    with pytest.raises(Unavailable):
        locate("imagenet", "xception", tmp_path, publisher=f"http://127.0.0.1:{free_port()}")
    assert file.read_bytes() == b"not it"
