"""Who may call what: every route of the application, with every kind of key."""

import asyncio
import re
import time
import uuid
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import httpx
import psycopg2
import pytest
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Mount

from neuroloop.bootstrap import Services
from neuroloop.core.credentials import Role, new_key, parted, recorded
from neuroloop.core.errors import Unavailable
from neuroloop.core.schemas import now
from neuroloop.core.settings import Settings
from neuroloop.serving import access, keyring
from neuroloop.serving.access import FRESH_SECONDS, PERSON_HEADER, ROLE_HEADER, RULES
from neuroloop.serving.api import create_app
from serving.running import Api, encoded, head, serving, wait

# Not connected to anything: it only shows which routes an application has.
APP = create_app(Services(Settings(database_url="postgresql://nobody@127.0.0.1:9/none")))
ROUTES = sorted(
    f"{method} {route.path}" for route in APP.routes for method in getattr(route, "methods", None) or {"GET"}
    if method != "HEAD"
)  # fmt: skip
GUARDED = [route for route in ROUTES if RULES.get(route, Role.ADMIN) is not None]
LESSER = [(route, role) for route in GUARDED for role in Role if not role.covers(RULES.get(route) or Role.ADMIN)]
ENOUGH = [(route, role) for route in GUARDED for role in Role if role.covers(RULES.get(route) or Role.ADMIN)]
DOCS = Path(__file__).parents[2] / "docs" / "access.md"
FAR = {"X-Forwarded-For": "203.0.113.9"}  # so that what is open to this machine alone is not


@pytest.fixture(scope="module")
def api(tmp_path_factory, postgres_server, mlflow_uri, standard):
    """One API with room for many refused requests, serving the standard bundle."""
    from neuroloop.adapters.mlflow_registry import MlflowRegistry

    MlflowRegistry(mlflow_uri).set_alias("champion", standard[0])
    settings = Settings(
        home=tmp_path_factory.mktemp("access"),
        database_url=postgres_server.new_database(),
        mlflow_tracking_uri=mlflow_uri,
        refresh_seconds=0.2,
        rate_limit_strangers=100_000,
    )
    with serving(Services(settings)) as running:
        yield running


@pytest.fixture(scope="module")
def holders(api: Api):
    clients = {role: api.holder(role) for role in Role}
    yield clients
    for client in clients.values():
        client.close()


def call(client: httpx.Client, route: str) -> httpx.Response:
    """A request of this route that does nothing where it gets in."""
    method, _, path = route.partition(" ")
    return client.request(method, re.sub(r"\{\w+\}", str(uuid.UUID(int=0)), path), headers=FAR)


def refused(response: httpx.Response, status: int) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["fix"]
    if status == 401:
        assert response.headers["WWW-Authenticate"].startswith("Bearer")


def test_every_route_has_a_rule_and_every_rule_a_route():
    assert not [route for route in APP.routes if isinstance(route, Mount)]
    assert set(ROUTES) == set(RULES)


def test_the_documentation_gives_every_route_the_role_that_it_takes():
    written = dict(re.findall(r"^\| `([A-Z]+ [^`]+)` \| (\w+) \|", DOCS.read_text(), re.MULTILINE))
    assert written == {route: str(role or "open") for route, role in RULES.items()}


@pytest.mark.parametrize("route", GUARDED)
def test_a_route_refuses_a_request_without_a_key(api: Api, route: str):
    with api.client_of(None) as client:
        refused(call(client, route), 401)


@pytest.mark.parametrize("route", GUARDED)
def test_a_route_refuses_a_wrong_key(api: Api, route: str):
    right = parted(keyring.create(api.services.keys, "ann", Role.ADMIN, by="a test").key)
    for wrong in (new_key(), f"nl_{right[0]}_{parted(new_key())[1]}", "nl_short", "Basic"):
        with api.client_of(wrong) as client:
            refused(call(client, route), 401)


@pytest.mark.parametrize("route", GUARDED)
def test_a_route_refuses_a_revoked_and_an_expired_key(api: Api, route: str):
    revoked = keyring.create(api.services.keys, "ann", Role.ADMIN, by="a test")
    keyring.revoke(api.services.keys, revoked.id, by="a test")
    old = new_key()
    api.services.keys.record_api_key(
        recorded(old, name="ann", role=Role.ADMIN, expires_at=now() - timedelta(seconds=1))
    )
    for key, word in ((revoked.key, "revoked"), (old, "expired")):
        with api.client_of(key) as client:
            response = call(client, route)
        refused(response, 401)
        assert word in response.json()["detail"]


@pytest.mark.parametrize(("route", "role"), LESSER)
def test_a_route_refuses_a_key_of_a_lesser_role(holders: dict[str, httpx.Client], route: str, role: Role):
    response = call(holders[role], route)
    refused(response, 403)
    assert f"takes the role {RULES[route]}" in response.json()["detail"]


@pytest.mark.parametrize(("route", "role"), ENOUGH)
def test_a_route_lets_a_key_of_its_role_or_a_greater_one_in(holders: dict[str, httpx.Client], route: str, role: Role):
    assert call(holders[role], route).status_code not in (401, 403, 429)


@pytest.mark.parametrize("route", [route for route in ROUTES if route not in GUARDED])
def test_health_and_documentation_are_open(api: Api, route: str):
    with api.client_of(None) as client:
        assert call(client, route).status_code == 200


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/ping", "/docs", "/openapi.json", "/metrics"])
def test_probes_may_ask_for_the_head_of_what_is_open(api: Api, path: str):
    with api.client_of(None) as stranger:
        said, whole = stranger.head(path), stranger.get(path)
        assert (said.status_code, said.content) == (200, b"")
        assert said.headers.get("Content-Type") == whole.headers.get("Content-Type")
        if path == "/metrics":
            assert stranger.head(path, headers=FAR).status_code == 401
    assert not any("head" in operations for operations in api.client.get("/openapi.json").json()["paths"].values())


def test_a_route_that_nobody_wrote_a_rule_for_takes_an_admin(api: Api, holders: dict[str, httpx.Client]):
    app: FastAPI = create_app(api.services)
    app.add_api_route("/v1/forgotten", lambda: {"secret": 1})

    async def statuses() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return [
                (await client.get("/v1/forgotten", headers=holders[role].headers if role else {})).status_code
                for role in (None, *Role)
            ]

    assert asyncio.run(statuses()) == [401, 403, 403, 200]


def test_without_any_key_in_the_database_nobody_gets_in(services: Services):
    with serving(services, model=False) as api, api.client_of(None) as stranger:
        assert stranger.get("/v1/model").status_code == 401
        assert stranger.get("/health/live").status_code == 200
        assert services.keys.api_keys() == []


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "rebound.example"}, 401),
        ({"Host": "127.0.0.1.evil.example"}, 401),
        ({"Host": "["}, 401),
        ({"X-Forwarded-For": "127.0.0.1"}, 401),
        ({"Via": "1.1 proxy"}, 401),
    ],
)
def test_metrics_are_open_to_this_machine_and_to_nobody_who_comes_through_it(api: Api, headers: dict, status: int):
    with api.client_of(None) as client:
        assert client.get("/metrics", headers=headers).status_code == status


def test_what_is_wrong_with_a_part_is_told_on_this_machine_only(tmp_path, postgres_url, free_port):
    nowhere = f"http://127.0.0.1:{free_port()}"
    settings = Settings(home=tmp_path, database_url=postgres_url, mlflow_tracking_uri=nowhere)
    with serving(Services(settings), model=False) as api, api.client_of(None) as client:
        near, far = client.get("/health/ready"), client.get("/health/ready", headers=FAR)
    assert near.status_code == far.status_code == 503
    assert "champion" in near.json()["checks"]["model"]
    assert far.json()["checks"]["model"] == "not usable, see the server's log"


# --- whose key it is ----------------------------------------------------------------------------


def test_a_key_says_whose_it_is_and_what_it_may(holders: dict[str, httpx.Client]):
    said = holders[Role.READER].get("/v1/me").json()
    assert (said["name"], said["role"], said["delegate"]) == ("reader", "reader", False)


def test_an_uploader_sees_their_own_answers_and_not_even_that_there_are_others(api: Api):
    with api.holder("uploader", "ann") as ann, api.holder("uploader", "bob") as bob, api.holder("reader") as reader:
        mine = ann.post("/v1/predictions", files={"file": ("x", encoded(head("glioma")))}).json()["id"]
        assert ann.get(f"/v1/predictions/{mine}").json()["owner"] == "ann"
        assert ann.get(f"/v1/predictions/{mine}/image").status_code == 200
        gone = ann.post("/v1/predictions", files={"file": ("x", encoded(head("glioma")))}).json()["id"]
        asked = {"reason": "requested", "by": "dr x"}
        assert api.client.delete(f"/v1/predictions/{gone}", params=asked).status_code == 200
        assert reader.get(f"/v1/predictions/{gone}").status_code == 410
        assert bob.get(f"/v1/predictions/{gone}").status_code == 404
        never = bob.get(f"/v1/predictions/{uuid.uuid4()}").json()["detail"]
        for path in (f"/v1/predictions/{mine}", f"/v1/predictions/{mine}/image"):
            assert bob.get(path).status_code == 404
            assert re.sub(r"'.*'", "", bob.get(path).json()["detail"]) == re.sub(r"'.*'", "", never)
            assert reader.get(path).status_code == 200


def test_nobody_votes_in_the_name_of_another(api: Api):
    prediction = api.predict(head("glioma")).json()["id"]
    path = f"/v1/predictions/{prediction}/feedback"
    with api.holder("reader", "ann") as ann:
        assert ann.post(path, json={"verdict": "agree", "reader": "bob"}).status_code == 403
        assert ann.post(path, json={"verdict": "agree"}).status_code == 200
        assert ann.post(path, json={"verdict": "not_sure", "reader": "ann"}).status_code == 200
        given = ann.get(f"/v1/predictions/{prediction}").json()["feedback"]
    assert [(one["reader"], one["verdict"]) for one in given] == [("ann", "not_sure")]


def test_a_key_that_speaks_for_others_has_to_say_for_whom(api: Api):
    """Whatever it does in a person's name; the fault is not called one of feedback, for clients branch on the type."""
    prediction = api.predict(head("glioma")).json()["id"]
    path = f"/v1/predictions/{prediction}"
    for response in (
        api.client.post(f"{path}/feedback", json={"verdict": "agree"}),
        api.client.delete(path, params={"reason": "requested"}),
        api.client.post("/v1/models/1/champion", json={"reason": "better"}),
    ):
        assert (response.status_code, response.json()["type"]) == (422, "urn:neuroloop:problem:names-nobody")


def test_the_frontend_acts_for_the_person_who_signed_in_and_with_that_persons_role(api: Api):
    prediction = api.predict(head("glioma")).json()["id"]
    person = {PERSON_HEADER: quote("Zoë Müller"), ROLE_HEADER: "reader"}
    path = f"/v1/predictions/{prediction}/feedback"
    assert api.client.get("/v1/me", headers=person).json()["name"] == "Zoë Müller"
    assert api.client.get("/v1/mails", headers=person).status_code == 403
    assert api.client.post(path, json={"verdict": "agree"}, headers=person).status_code == 200
    assert api.client.post(path, json={"verdict": "agree", "reader": "bob"}, headers=person).status_code == 403
    row = api.client.get(f"/v1/predictions/{prediction}").json()
    assert [one["reader"] for one in row["feedback"]] == ["Zoë Müller"]


@pytest.mark.parametrize("headers", [
    {PERSON_HEADER: "ann"},
    {ROLE_HEADER: "reader"},
    {PERSON_HEADER: "ann", ROLE_HEADER: "king"},
    {PERSON_HEADER: "%00", ROLE_HEADER: "reader"},
    {PERSON_HEADER: "%20", ROLE_HEADER: "reader"},
])  # fmt: skip
def test_a_person_that_is_named_badly_is_refused(api: Api, headers: dict[str, str]):
    refused(api.client.get("/v1/me", headers=headers), 403)


def test_no_other_key_may_name_a_person(holders: dict[str, httpx.Client]):
    person = {PERSON_HEADER: "ann", ROLE_HEADER: "uploader"}
    refused(holders[Role.ADMIN].get("/v1/me", headers=person), 403)


# --- the life of a key --------------------------------------------------------------------------


def test_an_admin_makes_lists_and_revokes_keys_and_a_key_is_shown_once(api: Api, holders: dict[str, httpx.Client]):
    admin = holders[Role.ADMIN]
    made = admin.post("/v1/keys", json={"name": "carl", "role": "reader", "days": 30})
    assert made.status_code == 201
    key = made.json()
    with api.client_of(key["key"]) as carl:
        assert carl.get("/v1/me").json()["name"] == "carl"
        listed = admin.get("/v1/keys")
        shown = next(one for one in listed.json() if one["id"] == key["id"])
        assert shown == {name: value for name, value in key.items() if name != "key"}
        assert parted(key["key"])[1] not in listed.text
        assert admin.delete(f"/v1/keys/{key['id']}").json()["standing"] == "revoked"
        assert carl.get("/v1/me").status_code == 401  # at once on the server that was told
    assert admin.delete("/v1/keys/000000000000").status_code == 404


@pytest.mark.parametrize("asked", [
    {"name": "", "role": "reader"},
    {"name": "x", "role": "king"},
    {"name": "x", "role": "reader", "days": -1},
    {"name": "x", "role": "reader", "days": 99_999_999},
    {"name": "x", "role": "reader", "delegates": True},
])  # fmt: skip
def test_a_key_that_is_asked_for_badly_is_not_made(api: Api, holders: dict[str, httpx.Client], asked: dict):
    before = len(api.services.keys.api_keys())
    assert holders[Role.ADMIN].post("/v1/keys", json=asked).status_code == 422
    assert len(api.services.keys.api_keys()) == before


def test_only_a_hash_of_a_key_is_at_rest(api: Api, postgres_server):
    key = keyring.create(api.services.keys, "ann", Role.READER, by="a test").key
    with psycopg2.connect(api.services.settings.database_url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT row_to_json(api_keys)::text FROM api_keys")
        rows = "\n".join(row[0] for row in cursor.fetchall())
    assert parted(key)[0] in rows
    assert parted(key)[1] not in rows
    assert parted(api.key)[1] not in rows


def test_a_revocation_elsewhere_is_heard_of_within_seconds(api: Api):
    key = keyring.create(api.services.keys, "ann", Role.READER, by="a test")
    with api.client_of(key.key) as client:
        assert client.get("/v1/me").status_code == 200
        keyring.revoke(api.services.keys, key.id, by="a test")  # as the command line does: this server is not told
        wait(lambda: client.get("/v1/me").status_code == 401, FRESH_SECONDS + 10)


def test_a_key_is_not_looked_up_for_each_request(api: Api):
    key = keyring.create(api.services.keys, "ann", Role.READER, by="a test").key
    log = api.services.log

    def scans() -> int:
        with log._transaction() as cursor:
            cursor.execute("SELECT pg_stat_force_next_flush()")
            cursor.execute("SELECT coalesce(sum(idx_scan + seq_scan), 0) AS n FROM pg_stat_user_tables"
                           " WHERE relname = 'api_keys'")  # fmt: skip
            return int(cursor.fetchone()["n"])

    before, started = scans(), time.monotonic()
    with api.client_of(key) as client:
        for _ in range(60):
            assert client.get("/v1/me").status_code == 200
    took = time.monotonic() - started
    assert scans() - before <= took / FRESH_SECONDS + 2 < 60


def test_a_new_key_in_the_settings_takes_the_place_of_the_one_before(services: Services):
    with serving(services, model=False) as first:
        assert first.client.get("/v1/me").json()["name"] == access.FRONTEND
    changed = Services(services.settings.model_copy(update={"ui_api_key": new_key()}))
    with serving(changed, model=False) as second:
        assert second.client.get("/v1/me").status_code == 200
        with second.client_of(first.key) as old:
            assert old.get("/v1/me").status_code == 401


def test_known_keys_count_for_a_while_without_the_database_and_unknown_ones_get_a_503(
    postgres_server, tmp_path, mlflow_uri
):
    url = postgres_server.new_database()
    services = Services(Settings(home=tmp_path, database_url=url, mlflow_tracking_uri=mlflow_uri))
    with serving(services, model=False) as api:
        assert api.client.get("/v1/me").status_code == 200
        postgres_server.stop()
        try:
            time.sleep(FRESH_SECONDS)
            assert api.client.get("/v1/me").status_code == 200
            with api.client_of(new_key()) as stranger:
                response = stranger.get("/v1/me")
        finally:
            postgres_server.start()
        assert response.status_code == 503
        assert response.headers["Retry-After"]
        wait(lambda: api.client.get("/v1/monitoring").status_code == 200)


# --- how often ----------------------------------------------------------------------------------


def limited(tmp_path: Path, postgres_url: str, mlflow_uri: str, **limits: int) -> Services:
    return Services(Settings(home=tmp_path, database_url=postgres_url, mlflow_tracking_uri=mlflow_uri, **limits))


def test_beyond_its_rate_a_key_gets_429_with_the_seconds_to_wait_and_others_do_not(tmp_path, postgres_url, mlflow_uri):
    with serving(limited(tmp_path, postgres_url, mlflow_uri, rate_limit=20), model=False) as api:
        with api.holder("reader", "ann") as ann, api.holder("reader", "bob") as bob:
            answers = [ann.get("/v1/me") for _ in range(25)]
            assert [one.status_code for one in answers[:20]] == [200] * 20
            refused(answers[-1], 429)
            assert 1 <= int(answers[-1].headers["Retry-After"]) <= 60
            assert bob.get("/v1/me").status_code == 200
        people = [{PERSON_HEADER: name, ROLE_HEADER: "reader"} for name in ("carl", "dora")]
        carl, dora = ([api.client.get("/v1/me", headers=person) for _ in range(20)] for person in people)
        assert {one.status_code for one in carl + dora} == {200}  # one key, but each person's own rate


def test_guessing_ends_in_429_without_a_look_at_the_database_and_keys_in_use_go_on(tmp_path, postgres_url, mlflow_uri):
    with serving(limited(tmp_path, postgres_url, mlflow_uri, rate_limit_strangers=10), model=False) as api:
        assert api.client.get("/v1/me").status_code == 200
        with api.client_of(new_key()) as guesser:
            answers = [guesser.get("/v1/me") for _ in range(12)]
        assert [one.status_code for one in answers] == [401] * 10 + [429] * 2
        assert answers[-1].headers["Retry-After"]
        assert api.client.get("/v1/me").status_code == 200  # from the same address


def request_with(key: str) -> Request:
    headers = [(b"authorization", f"Bearer {key}".encode())]
    return Request({"type": "http", "headers": headers, "client": ("203.0.113.9", 1)})


class SlowKeys:
    """Keys of a database that takes its time and counts how often it is asked."""

    def __init__(self, *known: str) -> None:
        self.asked = 0
        self._known = {one.id: one for one in (recorded(key, name="ann", role=Role.READER) for key in known)}

    def api_key(self, key_id: str):
        self.asked += 1
        time.sleep(0.05)
        return self._known.get(key_id)


async def outcomes(door: access.Access, keys: list[str]) -> list[int]:
    async def outcome(key: str) -> int:
        try:
            await door.admit(request_with(key), Role.UPLOADER)
        except HTTPException as error:
            return error.status_code
        return 200

    return await asyncio.gather(*(outcome(key) for key in keys))


def test_a_thousand_guesses_at_once_are_not_a_thousand_look_ups():
    database = SlowKeys()
    door = access.Access(lambda: database, strangers_per_minute=10)
    said = asyncio.run(outcomes(door, [new_key() for _ in range(1000)]))
    assert sorted(said) == [401] * 10 + [429] * 990
    assert database.asked == 10


def test_valid_keys_at_their_first_use_cost_nothing_of_what_strangers_may():
    keys = [new_key() for _ in range(30)]
    database = SlowKeys(*keys)
    door = access.Access(lambda: database, strangers_per_minute=10)

    async def play() -> None:
        assert await outcomes(door, [keys[0]] * 100) == [200] * 100  # of those at once, one asks
        for key in keys:
            assert await outcomes(door, [key]) == [200]
        assert await outcomes(door, [new_key() for _ in range(11)]) == [401] * 10 + [429]

    asyncio.run(play())
    assert database.asked == 30 + 10


def test_a_database_slower_than_the_wait_lets_a_new_key_in_at_its_next_try(monkeypatch):
    monkeypatch.setattr(access, "LOOK_UP_SECONDS", 0.01)
    key = new_key()
    door = access.Access(lambda: SlowKeys(key))

    async def play() -> list[int]:
        with pytest.raises(Unavailable):
            await outcomes(door, [key])
        await asyncio.sleep(0.5)
        return await outcomes(door, [key])

    assert asyncio.run(play()) == [200]


def test_only_a_key_that_was_seen_valid_is_known_without_asking():
    good, gone = new_key(), new_key()
    database = SlowKeys(good)
    door = access.Access(lambda: database)
    before = door.knows(request_with(good).scope)
    asyncio.run(outcomes(door, [good, gone]))
    other_secret = f"nl_{parted(good)[0]}_{parted(new_key())[1]}"
    shown = [door.knows(request_with(key).scope) for key in (good, gone, other_secret, "none")]
    assert (before, shown) == (False, [True, False, False, False])
    assert database.asked == 2
