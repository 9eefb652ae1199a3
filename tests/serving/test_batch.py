"""Several files in one request."""

import asyncio
import logging
import uuid

import numpy as np
import pytest

from neuroloop.core.schemas import LABELS
from neuroloop.serving import batch
from neuroloop.serving.batch import FILES
from neuroloop.serving.inference import Answer
from serving.running import Api, encoded, head, noise, serving


def send(api: Api, files: list[bytes], key: str = "", **query: str):
    headers = {"Idempotency-Key": key} if key else {}
    form = [("file", (f"{n}.png", data)) for n, data in enumerate(files)]
    return api.client.post("/v1/predictions:batch", files=form, headers=headers, params=query)


def test_every_file_gets_its_answer_or_its_problem_in_order(api: Api):
    files = [encoded(head(label)) for label in LABELS] * 3
    files[2:2] = [b"no image", encoded(noise()), encoded(head("glioma"))[:400], b"", bytes(1_100_000)]
    response = send(api, files)
    items = response.json()["results"]
    assert response.status_code == 200
    assert [item["status"] for item in items] == [201, 201, 415, 422, 400, 400, 413, *([201] * 10)]
    accepted = [item["answer"] for item in items if item["answer"]]
    assert [answer["label"] for answer in accepted] == list(LABELS) * 3
    assert all(bool(item["answer"]) != bool(item["problem"]) for item in items)
    for item in items:
        if item["problem"]:
            assert item["problem"]["status"] == item["status"]
            assert item["problem"]["fix"]
    assert items[3]["problem"]["type"] == "urn:neuroloop:problem:not-a-brain-mri"
    for answer in accepted:
        row = api.client.get(f"/v1/predictions/{answer['id']}").json()
        assert (row["label"], row["probabilities"]) == (answer["label"], answer["probabilities"])


def test_a_batch_again_with_its_key_is_the_same_batch(api: Api):
    key, files = str(uuid.uuid4()), [encoded(head("glioma")), encoded(noise()), encoded(head("pituitary"))]
    first = send(api, files, key).json()
    stored = api.stored()
    assert send(api, files, key).json() == first
    assert api.stored() == stored
    # With a file more, the ones before keep theirs.
    more = send(api, [*files, encoded(head("notumor"))], key).json()["results"]
    assert more[:3] == first["results"]
    assert more[3]["answer"]["label"] == "notumor"


def test_images_are_left_out_of_an_answer_on_request(api: Api):
    (item,) = send(api, [encoded(head("glioma"))], images="false").json()["results"]
    assert (item["answer"]["image"], item["answer"]["heatmap"]) == (None, None)
    (item,) = send(api, [encoded(head("glioma"))]).json()["results"]
    assert item["answer"]["image"]
    assert item["answer"]["heatmap"]


@pytest.mark.parametrize(("count", "size", "status"), [(FILES + 1, 10, 400), (6, 999_000, 413)])
def test_too_many_files_or_bytes_are_a_problem_before_any_is_looked_at(api: Api, count: int, size: int, status: int):
    stored = api.stored()
    response = send(api, [bytes(size)] * count)
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    assert api.stored() == stored


def test_a_form_without_files_and_a_body_that_is_none_are_problems(api: Api):
    assert api.client.post("/v1/predictions:batch", files={"other": ("a", b"x")}).status_code == 400
    assert api.client.post("/v1/predictions:batch", content=b"x").status_code == 415
    bad = {"Content-Type": "multipart/form-data; boundary=b"}
    assert api.client.post("/v1/predictions:batch", content=b"--b\r\nno form", headers=bad).status_code in (400, 422)


@pytest.mark.parametrize(
    ("second", "end", "said"),
    [
        ('name="file"; filename="2"', b"--b", "cut off"),
        ('name="file"; filename="2"', b"", "cut off"),
        ('name="files"; filename="2"', b"--b--\r\n", "'files'"),
        ('name="file"', b"--b--\r\n", "not a file"),
    ],
)
def test_a_form_that_would_lose_a_file_is_refused_as_a_whole(api: Api, second: str, end: bytes, said: str):
    stored, image = api.stored(), encoded(head("glioma"))
    body = b"".join(
        b"--b\r\nContent-Disposition: form-data; " + each.encode() + b"\r\n\r\n" + image + b"\r\n"
        for each in ('name="file"; filename="1"', second)
    )
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    response = api.client.post("/v1/predictions:batch", content=body + end, headers=kind)
    assert (response.status_code, said in response.json()["detail"]) == (400, True)
    assert api.stored() == stored


def test_without_the_database_the_whole_batch_is_503_at_once_and_its_repeat_succeeds(
    services, champion, postgres_server
):
    files = [encoded(head("glioma", height=100 + n)) for n in range(12)]
    with serving(services) as api:
        postgres_server.stop()
        try:
            response = send(api, files, "batch-1")
        finally:
            postgres_server.start()
        assert (response.status_code, bool(response.headers["Retry-After"])) == (503, True)
        assert response.elapsed.total_seconds() < 15
        assert api.stored() == []
        again = send(api, files, "batch-1").json()["results"]
        assert [item["status"] for item in again] == [201] * 12
        assert len({item["answer"]["id"] for item in again}) == 12
        assert len(api.stored()) == 12


def test_answers_of_a_batch_belong_to_their_own_files_whatever_their_sizes(api: Api):
    generator = np.random.default_rng(3)
    wanted = [(LABELS[generator.integers(4)], int(generator.integers(64, 400))) for _ in range(FILES)]
    items = send(api, [encoded(head(label, height=height)) for label, height in wanted], images="false").json()
    found = [(item["answer"]["label"], item["answer"]["height"]) for item in items["results"]]
    assert found == wanted


def test_an_unexpected_fault_in_one_file_is_a_problem_of_that_file_and_the_rest_is_answered(
    api: Api, caplog: pytest.LogCaptureFixture
):
    said = send(api, [encoded(head("glioma"))], images="false").json()["results"][0]["answer"]

    async def ask(index: int, data: bytes):
        if data == b"broken":
            raise RuntimeError("a fault nobody thought of")
        return Answer.model_validate(said)

    with caplog.at_level(logging.ERROR, logger="neuroloop.serving.batch"):
        answered = asyncio.run(batch.answer([b"fine", b"broken", b"fine", b"fine"], ask))
    assert isinstance(answered, batch.BatchAnswer)
    assert [item.status for item in answered.results] == [201, 500, 201, 201]
    problem = answered.results[1].problem
    assert problem["type"] == "urn:neuroloop:problem:internal-error"
    assert "nobody thought of" not in str(problem)
    (line,) = caplog.records
    assert "file 2 of a batch" in line.getMessage()
    assert "nobody thought of" in str(line.exc_info[1])
