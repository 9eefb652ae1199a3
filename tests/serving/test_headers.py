"""The headers of every answer, whatever it is."""

import re

import pytest

from serving.running import Api, encoded, head

ALWAYS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


def answers(api: Api):
    """One answer of each kind: images, JSON, problems, open pages, refusals."""
    made = api.predict(head("glioma"))
    image = f"/v1/predictions/{made.json()['id']}/image"
    yield made
    yield from (
        api.client.get(path) for path in (image, "/v1/model", "/v1/nothing", "/health/live", "/metrics", "/docs")
    )
    yield api.client.delete("/v1/model")
    yield api.upload(b"no image")
    with api.client_of(None) as stranger:
        yield stranger.get("/v1/model")


def test_every_answer_forbids_a_browser_to_do_more_than_show_it(api: Api):
    for answer in answers(api):
        assert ALWAYS.items() <= dict(answer.headers).items(), answer.request.url
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "frame-ancestors 'none'" in policy


def test_what_belongs_to_somebody_is_kept_in_no_cache(api: Api):
    for answer in answers(api):
        if answer.request.url.path.startswith("/v1/"):
            assert answer.headers["cache-control"] == "no-store"


def test_a_fault_of_ours_carries_them_too(api: Api):
    prediction_log = api.services.log
    location = api.predict(head("glioma")).headers["Location"]
    with prediction_log._transaction() as cursor:
        cursor.execute("ALTER TABLE predictions RENAME COLUMN sha256 TO misplaced")
    try:
        answer = api.client.get(location)
    finally:
        with prediction_log._transaction() as cursor:
            cursor.execute("ALTER TABLE predictions RENAME COLUMN misplaced TO sha256")
    assert answer.status_code == 500
    assert ALWAYS.items() <= dict(answer.headers).items()
    assert answer.headers["cache-control"] == "no-store"


def test_no_other_site_may_read_an_answer(api: Api):
    site = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for answer in (api.client.get("/v1/model", headers=site), api.client.options("/v1/predictions", headers=site)):
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert answer.status_code == 405


@pytest.mark.parametrize(
    "script", [b"<script>alert(1)</script>", b"<svg xmlns='http://www.w3.org/2000/svg' onload='x'/>"]
)
def test_markup_inside_an_upload_never_comes_back(api: Api, script: bytes):
    before = api.stored()
    response = api.upload(encoded(head("glioma")) + script)
    assert response.status_code == 400
    assert script not in response.content
    assert api.stored() == before


def test_the_documentation_runs_its_own_script_and_no_other(api: Api):
    page = api.client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    scripts = re.search(r"script-src ([^;]*)", policy)[1].split()
    assert scripts[0] == "https://cdn.jsdelivr.net"
    assert len(scripts) == 2
    assert scripts[1].startswith("'sha256-")
    assert "SwaggerUIBundle(" in page.text
    assert "/openapi.json" in page.text


def test_openapi_says_which_routes_take_a_key(api: Api):
    schema = api.client.get("/openapi.json").json()
    assert schema["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert schema["paths"]["/health/live"]["get"]["security"] == []
    guarded = schema["paths"]["/v1/mails"]["get"]
    assert guarded["security"] == [{"key": []}]
    assert "Role: **admin**" in guarded["description"]
    assert {"401", "403", "429"} <= set(guarded["responses"])
