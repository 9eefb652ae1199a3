"""The frontend's own small parts."""

import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from api_client import ApiClient, ApiProblem, Identity
from heatmap import grey, overlay
from layout import as_sentence, percent, plain
from session import Outcome, Upload, choose, current_upload, outcome_of

from neuroloop.core.errors import OutOfSpace, Unavailable
from neuroloop.imaging.decode import encode_png
from neuroloop.serving import problems
from serving.running import KEY

ANN = Identity(KEY, "Ann", "reader")


def test_an_outcome_is_given_only_for_the_very_choice_it_came_from():
    state = {}
    first, second = Upload(b"a", "a.png", "image/png"), Upload(b"b", "b.png", "image/png")
    again = Upload(b"a", "a.png", "image/png")
    choose(state, first)
    state["outcome"] = Outcome(first.key)

    assert outcome_of(state, first) is not None
    assert outcome_of(state, second) is None
    assert outcome_of(state, again) is None


def test_choosing_drops_the_outcome_before_it_even_where_nothing_is_chosen():
    state = {}
    upload = Upload(b"a", "a.png", "image/png")
    choose(state, upload)
    state["outcome"] = Outcome(upload.key)
    choose(state, None)

    assert current_upload(state) is None
    assert outcome_of(state, upload) is None


def test_the_overlay_leaves_cold_regions_and_zero_opacity_untouched():
    image = np.full((8, 8), 100, np.uint8)
    heat = np.zeros((8, 8), np.uint8)
    heat[:4] = 255
    mixed = overlay(image, heat, 1.0)

    assert (mixed[4:] == 100).all()
    assert (mixed[:4] != 100).any()
    assert (overlay(image, heat, 0.0) == 100).all()


def test_a_png_of_the_api_is_read_back_pixel_by_pixel():
    pixels = np.arange(64 * 48, dtype=np.uint32).reshape(64, 48).astype(np.uint8)

    assert (grey(encode_png(pixels)) == pixels).all()


@pytest.mark.parametrize(
    ("value", "words"), [(0.0, "0 %"), (0.004, "under 1 %"), (0.5, "50 %"), (0.996, "over 99 %"), (1.0, "100 %")]
)
def test_a_share_in_words_never_rounds_to_a_false_certainty(value, words):
    assert percent(value) == words


def test_text_from_outside_loses_its_markup_but_keeps_code_in_backticks():
    assert plain("[x](javascript:1) **b** <i>") == r"\[x\]\(javascript\:1\) \*\*b\*\* \<i\>"
    assert plain("run `make up`") == "run `make up`"
    assert plain("a ` b *c*") == r"a \` b \*c\*"


def test_fragments_of_a_problem_become_sentences():
    assert as_sentence("wait until it serves") == "Wait until it serves."
    assert as_sentence("Done.") == "Done."
    assert as_sentence("") == ""


def test_a_port_where_nobody_listens_gives_a_passing_problem_with_the_fix(free_port):
    with pytest.raises(ApiProblem) as caught:
        ApiClient(f"http://127.0.0.1:{free_port()}").monitoring()

    assert caught.value.passing
    assert "make up" in caught.value.fix


@pytest.mark.parametrize(
    ("status", "body"), [(404, b"<html>not here</html>"), (200, b'{"other": 1}'), (200, b"<html>")]
)
def test_a_server_that_is_not_the_api_is_explained_in_words(status, body):
    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ApiProblem) as caught:
            ApiClient(f"http://127.0.0.1:{server.server_port}").champion()
        server.shutdown()

    assert caught.value.title
    assert caught.value.fix
    assert not caught.value.passing


@contextmanager
def answering(response):
    """The address of a server that gives every request this answer."""

    class Stub(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(response.status_code)
            for name, value in response.headers.items():
                self.send_header(name, value)
            self.send_header("X-Request-Id", "req-4711")
            self.end_headers()
            self.wfile.write(response.body)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Stub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (problems.from_status(429, headers={"Retry-After": "17"}), "wait 17 s, then go on more slowly"),
        (problems.from_status(503, headers={"Retry-After": "8"}), "try again in 8 s"),
        (problems.from_error(Unavailable("no database")), "try again in 5 s"),
        (problems.from_error(OutOfSpace("full")), "try again later"),
        (problems.internal_error(), "give the operator the id of this request"),
        (problems.from_status(408), "send it again"),
    ],
)
def test_advice_can_be_followed_by_somebody_who_sees_no_headers(response, said):
    with answering(response) as url, pytest.raises(ApiProblem) as caught:
        ApiClient(url).monitoring()

    fault = caught.value
    assert said in fault.fix
    assert not {"Retry-After", "X-Request-Id"} & set(re.findall(r"[\w-]+", fault.title + fault.detail + fault.fix))
    assert fault.request_id == "req-4711"
    assert fault.passing


def test_a_server_that_does_not_answer_in_time_is_a_passing_problem():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ApiProblem) as caught:
        ApiClient(f"http://127.0.0.1:{silent.getsockname()[1]}", read_seconds=0.3).monitoring()

    assert caught.value.passing
    assert "takes too long" in caught.value.title


def test_feedback_on_an_unknown_prediction_says_so(live_api):
    from neuroloop.core.schemas import Verdict

    with pytest.raises(ApiProblem) as caught:
        ApiClient(f"http://127.0.0.1:{live_api.port}").acting_for(ANN).feedback("nobody", Verdict.AGREE)

    assert caught.value.status == 404
    assert not caught.value.passing
