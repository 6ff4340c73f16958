"""Routes: what is declared is answered, checked, documented and counted by its declaration; all else is closed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Annotated, Any
from urllib.parse import unquote

import msgspec
import pytest
from msgspec import Meta
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse
from starlette.routing import Route as StarletteRoute

from fraud.errors import InvalidRequest, SettingsError
from fraud.serving.contract import ScoreBody
from fraud.serving.descriptors import descriptor
from fraud.serving.front_door import FrontDoor
from fraud.serving.http import Answer, Call, ErrorShape, Failure, HttpLimits, Route
from fraud.serving.openapi import document
from fraud.serving.parameters import parameters
from fraud.serving.routes import OTHER, Closed, Mount, Router
from fraud.serving.security import AccessControl, new_key
from fraud.settings import HttpSettings


class Detail(msgspec.Struct):
    """FastAPI's shape of an error."""

    detail: str


def detailed(failure: Failure) -> Answer:
    return Answer(msgspec.json.encode(Detail(failure.problem.message)), failure.status)


FASTAPI = ErrorShape(detailed, Detail)


class Search(msgspec.Struct):
    """Which orders."""

    shop: Annotated[str, Meta(max_length=5, description="Whose orders.")]
    most: Annotated[int, Meta(ge=1, le=100)] = 10


async def echo(call: Call) -> Answer:
    return Answer(msgspec.json.encode([call.route.path, dict(call.names)]))


async def search(call: Call) -> Answer:
    return Answer(msgspec.json.encode(parameters(call, Search)))


async def read(call: Call) -> Answer:
    body = await call.json_body()
    if body == b"1":
        raise InvalidRequest("one is not taken")
    return Answer(body)


async def failing(_: Call) -> Answer:
    raise RuntimeError("/etc/secret")


@dataclass
class Sent:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Door:
    """A front door without a server, and what its observers saw."""

    def __init__(self, router: Router, access: AccessControl | None = None) -> None:
        self.seen: list[tuple[str, int, str]] = []
        self.app = FrontDoor(router, self._lifespan, HttpLimits(100, 1.0), [access] if access else [], [self._observe])

    async def _lifespan(self, *_: object) -> None:
        raise AssertionError("there is no lifespan in this test")

    def _observe(self, call: Call, answer: Answer, _: float) -> None:
        self.seen.append((call.route.path, answer.status, answer.code))

    def ask(self, method: str, path: str, body: bytes = b"", query: str = "", **headers: str) -> Sent:
        sent = Sent()

        async def receive() -> MutableMapping[str, Any]:
            return {"type": "http.request", "body": body}

        async def send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                sent.status = message["status"]
                sent.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
            else:
                sent.body += message.get("body", b"")

        scope = {
            "type": "http",
            "method": method,
            "path": unquote(path),
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
        }
        asyncio.run(self.app(scope, receive, send))
        return sent


ROUTES = [
    Route("GET", "/things", "read", echo, "All of them.", answer=Detail, tag="Things"),
    Route("POST", "/things", "rules", read, "One more.", request=Detail, answer=Detail, tag="Things"),
    Route("GET", "/things/{id}/parts/{part}", "read", echo, "A part.", tag="Things"),
    Route("GET", "/things/all/parts/first", "read", echo, "The first part of all."),
    Route("GET", "/shops/{shop}/orders", "read", search, "Orders.", parameters=Search, answer=Search, tag="Orders"),
    Route("POST", "/old/check", "score", read, "The old way.", request=Detail, errors=FASTAPI, tag="Old"),
    Route("GET", "/old/check", "admin", failing, "Fails.", errors=FASTAPI),
]


@pytest.fixture
def door() -> Door:
    return Door(Router(ROUTES, closed=[Closed("/old", FASTAPI)]))


def test_a_whole_path_comes_before_a_pattern_and_names_are_one_segment(door: Door) -> None:
    assert door.ask("GET", "/things/7/parts/b%2Fc").json == [
        "/things/{id}/parts/{part}",
        {"id": "7", "part": "b%2Fc"},
    ]
    assert door.ask("GET", "/things/all/parts/first").json == ["/things/all/parts/first", {}]
    assert door.ask("GET", "/things/7/parts/b/c").status == 404


@pytest.mark.parametrize("path", ["/", "/thing", "/things/", "//things", "/things/7/parts/1/", "/c-77\n", "/things;x"])
def test_an_undeclared_path_is_closed_and_counted_without_its_name(door: Door, path: str) -> None:
    for method in ("GET", "POST", "DELETE", "OPTIONS"):
        sent = door.ask(method, path, host="evil.example")
        assert (sent.status, sent.json["error"]["code"]) == (404, "not_found")
        assert "location" not in sent.headers
    assert set(door.seen) == {(OTHER, 404, "not_found")}


def test_an_undeclared_path_is_closed_before_keys_are_looked_at() -> None:
    door = Door(Router(ROUTES), AccessControl([], required=True))
    assert door.ask("GET", "/nowhere").status == 404
    assert door.ask("GET", "/things").status == 401


def test_an_undeclared_method_says_which_there_are(door: Door) -> None:
    sent = door.ask("PUT", "/things")
    assert (sent.status, sent.headers["allow"]) == (405, "GET, POST, HEAD")
    assert sent.json["error"]["message"] == "this path answers GET, POST, HEAD, not PUT"
    assert door.ask("POST", "/things/7/parts/1").status == 405


def test_head_is_answered_wherever_get_is(door: Door) -> None:
    for path in ("/things", "/things/7/parts/1", "/shops/a/orders"):
        assert door.ask("HEAD", path).headers["content-length"] == door.ask("GET", path).headers["content-length"]


def test_each_method_asks_for_its_own_scope() -> None:
    reader, key = new_key(["read"])
    door = Door(Router(ROUTES), AccessControl([key]))
    assert door.ask("GET", "/things", x_api_key=reader).status == 200
    refused = door.ask("POST", "/things", b"2", x_api_key=reader)
    assert refused.json["error"]["message"] == f"the key {key.id} has the scope read; this path asks for rules"


def test_a_path_and_a_method_are_declared_once() -> None:
    again = Route("GET", "/things/{name}/parts/{which}", None, echo, "")
    with pytest.raises(SettingsError, match=r"GET /things/\{name\}/parts/\{which\} is declared twice"):
        Router([*ROUTES, again])


def test_parameters_are_typed_and_refused_with_their_names(door: Door) -> None:
    assert door.ask("GET", "/shops/%C3%A9t%C3%A9/orders", query="most=3").json == {"shop": "été", "most": 3}
    for path, query, message, where in (
        ("/shops/a/orders", "most=0", "Expected `int` >= 1; '0' arrived", "$.most"),
        ("/shops/a/orders", "most=x", "Expected `int`, got `str`; 'x' arrived", "$.most"),
        ("/shops/a/orders", "most=1&most=2", "this parameter is given twice", "$.most"),
        ("/shops/a/orders", "limit=2", "unknown parameter 'limit'; allowed: most", None),
        ("/shops/a/orders", "shop=b", "unknown parameter 'shop'; allowed: most", None),
        ("/shops/abcdef/orders", "", "Expected `str` of length <= 5; 'abcdef' arrived", "$.shop"),
        ("/shops/%ff/orders", "", "the path and the query must be percent-encoded UTF-8", None),
        ("/shops/a/orders", "most=%ff", "the path and the query must be percent-encoded UTF-8", None),
    ):
        sent = door.ask("GET", path, query=query)
        assert (sent.status, sent.json["error"]["message"], sent.json["error"]["path"]) == (422, message, where)


def test_a_contract_words_every_error_of_its_routes() -> None:
    reader, key = new_key(["read"])
    scorer, other = new_key(["score", "admin"], rate=1, burst=6)
    door = Door(
        Router(ROUTES, closed=[Closed("/old", FASTAPI)]),
        AccessControl([key, other], required=True, clock=lambda: 0.0),
    )
    answers = {
        401: door.ask("POST", "/old/check"),
        403: door.ask("POST", "/old/check", x_api_key=reader),
        404: door.ask("POST", "/old/checks"),
        405: door.ask("PUT", "/old/check", x_api_key=scorer),
        413: door.ask("POST", "/old/check", x_api_key=scorer, content_length="101"),
        415: door.ask("POST", "/old/check", x_api_key=scorer, content_type="text/csv"),
        422: door.ask("POST", "/old/check", b"1", x_api_key=scorer),
        500: door.ask("GET", "/old/check", x_api_key=scorer),
    }
    assert {status: sent.status for status, sent in answers.items()} == {status: status for status in answers}
    assert all(sent.json.keys() == {"detail"} for sent in answers.values())
    assert answers[422].json == {"detail": "one is not taken"}
    assert answers[405].headers["allow"] == "POST, GET, HEAD"
    assert answers[413].headers["connection"] == "close"
    assert b"secret" not in answers[500].body
    door.ask("POST", "/old/check", b"2", x_api_key=scorer)
    limited = door.ask("POST", "/old/check", b"2", x_api_key=scorer)
    assert (limited.status, limited.headers["retry-after"], limited.json.keys()) == (429, "1", {"detail"})
    codes = {status: code for _, status, code in door.seen}
    assert (codes[422], codes[500], codes[429]) == ("invalid_request", "internal", "rate_limited")


async def strict(request: Request) -> JSONResponse:
    if request.query_params.get("n") == "7":
        return JSONResponse({"root": request.scope["root_path"], "path": request.url.path})
    return JSONResponse({"detail": [{"loc": ["query", "n"]}]}, 422, {"x-own": "kept", "x-request-id": "own"})


async def moved(_: Request) -> RedirectResponse:
    return RedirectResponse("/ui/strict?n=7")


async def broken(_: Request) -> PlainTextResponse:
    raise RuntimeError("/etc/secret")


async def adding(request: Request, call_next: Any) -> Any:
    answer = await call_next(request)
    answer.headers["x-page"] = "yes"
    return answer


UI = Starlette(
    routes=[
        StarletteRoute("/strict", strict),
        StarletteRoute("/moved", moved, methods=["GET", "POST"]),
        StarletteRoute("/broken", broken),
    ],
    middleware=[Middleware(BaseHTTPMiddleware, dispatch=adding)],
)


def test_a_mounted_application_keeps_its_errors_and_its_headers() -> None:
    door = Door(Router(ROUTES, [Mount("/ui", "analyst", UI)]))
    refused = door.ask("GET", "/ui/strict", query="n=8")
    assert (refused.status, refused.json) == (422, {"detail": [{"loc": ["query", "n"]}]})
    assert (refused.headers["x-own"], refused.headers["x-request-id"]) == ("kept", "own")
    answered = door.ask("GET", "/ui/strict", query="n=7", x_request_id="r-1")
    assert answered.json == {"root": "/ui", "path": "/ui/strict"}
    assert (answered.headers["x-page"], answered.headers["x-request-id"]) == ("yes", "r-1")
    assert door.ask("POST", "/ui/moved").headers["location"] == "/ui/strict?n=7"
    missing = door.ask("GET", "/ui/c-77")
    assert (missing.status, missing.body) == (404, b"Not Found")
    assert door.ask("GET", "/uix").json["error"]["code"] == "not_found"
    assert {route for route, _, _ in door.seen} == {"/ui", OTHER}


def test_a_mounted_application_asks_for_its_scope_for_every_method() -> None:
    analyst, key = new_key(["analyst"])
    reader, other = new_key(["read"])
    door = Door(Router([], [Mount("/ui", "analyst", UI)]), AccessControl([key, other]))
    assert door.ask("GET", "/ui/strict", query="n=7", x_api_key=analyst).status == 200
    for method in ("GET", "POST", "DELETE", "BREW"):
        assert door.ask(method, "/ui/strict", x_api_key=reader).status == 403
        assert door.ask(method, "/ui/strict").status == 401
    assert door.ask("POST", "/ui/moved", x_api_key=analyst, content_length="101").status == 413


def test_an_application_that_breaks_before_it_answers_shows_nothing_of_it() -> None:
    async def breaks(*_: object) -> None:
        raise RuntimeError("/etc/secret")

    door = Door(Router([], [Mount("/ui", None, breaks), Mount("/ui/deep", None, UI)]))
    sent = door.ask("GET", "/ui/x")
    assert (sent.status, sent.json["error"]["code"]) == (500, "internal")
    assert b"secret" not in sent.body
    assert door.ask("GET", "/ui/deep/strict", query="n=7").status == 200


@pytest.mark.parametrize("prefix", ["/proxy/fraud", ""])
def test_under_a_root_path_a_proxy_may_pass_it_on_or_strip_it(prefix: str) -> None:
    mounts, closed = [Mount("/ui", None, UI)], [Closed("/old", FASTAPI)]
    door = Door(Router(ROUTES, mounts, closed, root_path="/proxy/fraud"))
    assert door.ask("GET", f"{prefix}/things").status == 200
    assert door.ask("GET", f"{prefix}/things/a%2Fb/parts/1").json[1] == {"id": "a%2Fb", "part": "1"}
    assert door.ask("BREW", f"{prefix}/things").status == 405
    assert door.ask("GET", f"{prefix}/old/nowhere").json.keys() == {"detail"}
    assert door.ask("GET", f"{prefix}/nowhere").json["error"]["code"] == "not_found"
    answered = door.ask("GET", f"{prefix}/ui/strict", query="n=7")
    assert answered.json == {"root": "/proxy/fraud/ui", "path": "/proxy/fraud/ui/strict"}
    assert {route for route, _, _ in door.seen} >= {"/things", "/things/{id}/parts/{part}", "/ui"}, "labels lack it"


def test_a_root_path_with_an_encoded_letter_is_none() -> None:
    door = Door(Router(ROUTES, root_path="/fraud"))
    assert door.ask("GET", "/fraud/things").status == 200
    assert door.ask("GET", "/%66raud/things").status == 404


@pytest.mark.parametrize("root_path", ["/things", "/old", "/ui"])
def test_a_root_path_is_not_the_beginning_of_a_path(root_path: str) -> None:
    with pytest.raises(SettingsError, match=rf"^FRAUD_ROOT_PATH='{root_path}' is the beginning of {root_path}"):
        Router(ROUTES, [Mount("/ui", None, UI)], root_path=root_path)


@pytest.mark.parametrize("value", ["fraud", "/", "/fraud/", "//fraud", "/a/../b", "/a b", "/%66raud"])
def test_what_is_no_root_path(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAUD_ROOT_PATH", value)
    with pytest.raises(SettingsError, match="FRAUD_ROOT_PATH="):
        HttpSettings.read()


def test_web_sockets_are_closed() -> None:
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "websocket.connect"}

    asyncio.run(Door(Router(ROUTES)).app({"type": "websocket", "path": "/things"}, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_the_document_says_what_the_routes_say() -> None:
    made = document(ROUTES, "Shop", "Things.", "1")
    paths = made["paths"]
    assert paths.keys() == {"/things", "/things/{id}/parts/{part}", "/shops/{shop}/orders", "/old/check"}
    assert paths["/things"].keys() == {"get", "post"}
    orders = paths["/shops/{shop}/orders"]["get"]
    assert [(p["name"], p["in"], p["required"]) for p in orders["parameters"]] == [
        ("shop", "path", True),
        ("most", "query", False),
    ]
    assert orders["parameters"][1]["schema"] == {"type": "integer", "minimum": 1, "maximum": 100, "default": 10}
    assert orders["security"] == [{}, {"bearer": []}, {"header": []}]
    assert paths["/things"]["post"]["security"] == [{"bearer": []}, {"header": []}]
    old = paths["/old/check"]["post"]["responses"]
    assert old["429"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Detail"}
    assert "415" in old
    assert "415" not in orders["responses"]


def test_bentoml_describes_a_body_without_a_warning_and_fills_in_what_is_left_out() -> None:
    question = descriptor(ScoreBody)
    assert question.model_json_schema(mode="serialization")["properties"].keys() == {"instances", "model"}
    assert question.model_validate({}).model_dump() == {"instances": [], "model": None}
