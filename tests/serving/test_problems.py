"""Every error is a problem document, also those of the framework."""

import pytest

from serving.running import Api, head

FIELDS = {"type", "title", "status", "detail", "fix"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/predictions/unknown", 404),
        ("GET", "/v1/predictions/unknown/image", 404),
        ("DELETE", "/v1/model", 405),
        ("POST", "/v1/predictions/unknown/feedback", 422),
    ],
)
def test_errors_are_problem_documents_with_the_research_notice(api: Api, method: str, path: str, status: int):
    response = api.client.request(method, path)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["X-Research-Use-Only"]
    assert set(response.json()) == FIELDS
    assert response.json()["status"] == status
    if status == 405:
        assert response.headers["Allow"] == "GET"


def test_broken_json_is_a_problem_that_does_not_repeat_it(api: Api):
    response = api.client.post(
        "/v1/predictions/x/feedback", content=b'{"secret-word": ', headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 422
    assert "secret-word" not in response.text


def test_an_unexpected_fault_gives_no_details_away_and_is_logged(api: Api, caplog: pytest.LogCaptureFixture):
    location = api.predict(head("glioma")).headers["Location"]
    prediction_log = api.services.log
    with prediction_log._transaction() as cursor:
        cursor.execute("ALTER TABLE predictions RENAME COLUMN sha256 TO misplaced")
    try:
        response = api.client.get(location)
    finally:
        with prediction_log._transaction() as cursor:
            cursor.execute("ALTER TABLE predictions RENAME COLUMN misplaced TO sha256")
    assert (response.status_code, response.json()["type"]) == (500, "urn:neuroloop:problem:internal-error")
    assert "misplaced" not in response.text
    assert "Traceback" not in response.text
    assert response.headers["X-Request-Id"] in caplog.text
    assert "misplaced" in caplog.text


def test_openapi_documents_errors_as_what_they_are(api: Api):
    schema = api.client.get("/openapi.json").json()
    assert "research" in schema["info"]["description"].lower()
    predict = schema["paths"]["/v1/predictions"]["post"]
    assert set(predict["responses"]) == {
        "201", "400", "401", "403", "408", "410", "413", "415", "422", "429", "503", "507",
    }  # fmt: skip
    assert "multipart/form-data" in predict["requestBody"]["content"]
    for path in schema["paths"].values():
        for operation in path.values():
            for code, response in operation["responses"].items():
                if code >= "400":
                    assert list(response["content"]) == ["application/problem+json"]
    assert set(schema["components"]["schemas"]["Problem"]["properties"]) == FIELDS


@pytest.mark.parametrize("path", ["/v1/predictions/", "/v1/model/", "/health/live/"])
def test_a_trailing_slash_is_no_path_and_leads_nowhere_else(api: Api, path: str):
    response = api.client.request("POST", path, headers={"Host": "scans.example.org"})
    assert (response.status_code, response.headers["content-type"]) == (404, "application/problem+json")
    assert "Location" not in response.headers
