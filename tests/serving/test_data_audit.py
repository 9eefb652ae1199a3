"""The audit of the data behind the served model, as page and as JSON."""

from neuroloop.bootstrap import Services
from neuroloop.core import keys
from serving.running import Api, serving


def test_the_audit_of_the_champions_data_is_served_as_a_sandboxed_page_and_as_json(api: Api):
    version = api.client.get("/v1/model").json()["data_version"]
    api.services.store.put(keys.audit_page(version), b"<!doctype html><p>r\xc3\xb6port</p>")
    api.services.store.put(keys.audit(version), b'{"images": 3}')
    page = api.client.get("/v1/data/audit")
    assert page.text == "<!doctype html><p>röport</p>"
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert policy.startswith("sandbox; default-src 'none'")
    assert "script" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert api.client.get("/v1/data/audit.json").json() == {"images": 3}


def test_data_that_was_never_audited_is_a_404_that_says_what_to_do(api: Api):
    version = api.client.get("/v1/model").json()["data_version"]
    for key in (keys.audit_page(version), keys.audit(version)):
        api.services.store.delete(key)
    for path in ("/v1/data/audit", "/v1/data/audit.json"):
        answer = api.client.get(path)
        assert answer.status_code == 404
        assert "has no audit report" in answer.json()["detail"]
        assert "build the model again" in answer.json()["fix"].lower()


def test_the_latest_audit_is_served_whether_or_not_a_model_came_of_it(api: Api):
    store = api.services.store
    store.delete(keys.LATEST_AUDIT)
    for path in ("/v1/data/audit", "/v1/data/audit.json"):
        answer = api.client.get(path, params={"latest": True})
        assert (answer.status_code, "No data has been audited" in answer.json()["detail"]) == (404, True)
    store.put(keys.audit_page("stopped"), b"<!doctype html><p>it leaks</p>")
    store.put(keys.audit("stopped"), b'{"images": 5}')
    store.put(keys.LATEST_AUDIT, b"stopped")
    assert "it leaks" in api.client.get("/v1/data/audit", params={"latest": True}).text
    assert api.client.get("/v1/data/audit.json", params={"latest": True}).json() == {"images": 5}
    assert api.client.get("/v1/data/audit.json").status_code == 404


def test_before_the_first_model_the_latest_audit_can_be_read(services: Services, free_port):
    no_registry = services.settings.model_copy(update={"mlflow_tracking_uri": f"http://127.0.0.1:{free_port()}"})
    services = Services(no_registry)
    services.store.put(keys.audit_page("first"), b"<!doctype html><p>first</p>")
    services.store.put(keys.LATEST_AUDIT, b"first")
    with serving(services, model=False) as api:
        assert api.client.get("/v1/data/audit").status_code == 503
        assert "first" in api.client.get("/v1/data/audit", params={"latest": True}).text
