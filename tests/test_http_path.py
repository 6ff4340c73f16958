"""The front door on a real uvicorn, spoken to over sockets: limits, error shape, request ids, strangers' bodies."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from starlette.types import ASGIApp

from fraud.errors import InvalidRequest, MalformedJson, Overloaded, RateLimited, StoreError
from fraud.pipeline.batching import MicroBatcher
from fraud.serving.bento_pages import with_own_errors
from fraud.serving.front_door import FrontDoor
from fraud.serving.http import Answer, Call, HttpLimits, Route
from fraud.serving.routes import Router

LIMITS = HttpLimits(max_body_bytes=10_000, body_timeout_s=0.3)


@dataclass(frozen=True)
class Numbers:
    values: list[float]
    explain: bool

    @property
    def n_rows(self) -> int:
        return len(self.values)


class EveryRowBad(InvalidRequest):
    def __init__(self) -> None:
        super().__init__("below zero", "$.instances[0]")
        self.errors = [{"code": self.code, "message": self.message, "path": self.path}]


class Doubler:
    """Routes whose score is twice the number, on a real batcher; `start` on the event loop that serves them."""

    def __init__(self) -> None:
        self.routes = [
            Route("POST", "/predict", "score", self.predict, ""),
            Route("POST", "/explain", "score", self.explain, ""),
        ]

    def start(self) -> None:
        self.batcher: MicroBatcher[Numbers, list[float]] = MicroBatcher(self.run)

    async def predict(self, call: Call) -> Answer:
        return await self.answer(decoded(await call.json_body(), explain=False))

    async def explain(self, call: Call) -> Answer:
        return await self.answer(decoded(await call.json_body(), explain=True))

    async def answer(self, numbers: Numbers) -> Answer:
        scores = await self.batcher.submit(numbers)
        return Answer(json.dumps({"predictions": scores, "explained": numbers.explain}).encode())

    async def run(self, requests: list[Numbers]) -> list[list[float] | Exception]:
        return [
            EveryRowBad() if any(value < 0 for value in request.values) else [2 * value for value in request.values]
            for request in requests
        ]


def decoded(body: bytes, *, explain: bool) -> Numbers:
    try:
        instances = json.loads(body)["instances"]
    except ValueError:
        raise MalformedJson("the body is no JSON") from None
    if instances == ["secret path"]:
        raise RuntimeError("/etc/fraud/secret is missing")
    if instances == ["lost store"]:
        raise StoreError("no connection to db.internal:5432")
    if instances == ["busy"]:
        raise Overloaded("3 rows are waiting already; try again shortly")
    return Numbers(instances, explain)


@dataclass
class Seen:
    """What the observers saw, and a request check that refuses one key."""

    answers: list[tuple[str, int, float]] = field(default_factory=list)

    def observe(self, call: Call, answer: Answer, seconds: float) -> None:
        self.answers.append((call.scope["path"], answer.status, seconds))

    def check(self, call: Call) -> None:
        if call.headers.get(b"authorization") == b"Bearer fast":
            raise RateLimited(2.5)


@dataclass(frozen=True)
class Server:
    port: int
    seen: Seen

    def request(
        self, path: str, body: bytes = b"", method: str = "POST", **headers: str
    ) -> tuple[int, dict[str, str], dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        sent = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        connection.request(method, path, body, sent)
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, json.loads(answer or b"{}")

    def score(self, *numbers: float) -> list[float]:
        status, _, answer = self.request("/predict", json.dumps({"instances": numbers}).encode())
        assert status == 200
        scores: list[float] = answer["predictions"]
        return scores

    def raw(self, *parts: bytes, wait_s: float = 0.0) -> bytes:
        """Send parts of a request, `wait_s` apart, until an answer comes; read until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            for part in parts:
                connection.sendall(part)
                if select.select([connection], [], [], wait_s)[0]:
                    break  # an answer is there already
            received = b""
            with contextlib.suppress(ConnectionResetError):  # a part crossed the answer on its way
                while chunk := connection.recv(65536):
                    received += chunk
        return received


async def behind(scope: Any, receive: Any, send: Any) -> None:
    """An application of its own, two of whose paths are declared."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
    status = {"/hello": 200, "/broken": 500}.get(scope["path"], 404)
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b'"Traceback: ', "more_body": True})
    await send({"type": "http.response.body", "body": b'internals"'})


async def page(_: Call) -> ASGIApp:
    return with_own_errors(behind)


PAGES = [Route("GET", path, "read", page, "") for path in ("/hello", "/broken")]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    seen, doubler = Seen(), Doubler()
    router = Router([*doubler.routes, *PAGES])
    door = FrontDoor(router, behind, LIMITS, checks=[seen.check], observers=[seen.observe])
    listener = socket.create_server(("127.0.0.1", 0))
    uvicorn_server = uvicorn.Server(
        uvicorn.Config(door, http="httptools", loop="uvloop", log_level="critical", access_log=False)
    )

    async def serve() -> None:
        doubler.start()
        await uvicorn_server.serve(sockets=[listener])
        await doubler.batcher.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    yield Server(listener.getsockname()[1], seen)
    uvicorn_server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def test_predict_and_explain_are_answered(server: Server) -> None:
    status, headers, answer = server.request("/predict", b'{"instances": [1, 2.5]}')
    assert (status, answer) == (200, {"predictions": [2, 5.0], "explained": False})
    assert headers["content-type"] == "application/json"
    assert server.request("/explain", b'{"instances": [4]}')[2] == {"predictions": [8], "explained": True}
    assert server.request("/predict", b'{"instances": [4]}', content_type="Application/JSON; charset=utf-8")[0] == 200


def test_concurrent_callers_get_their_own_answers_and_errors(server: Server) -> None:
    def call(i: int) -> bool:
        if i % 20 == 7:
            status, _, answer = server.request("/predict", json.dumps({"instances": [-i]}).encode())
            return status == 422 and answer["error"]["path"] == "$.instances[0]"
        return server.score(i, i + 0.5) == [2 * i, 2 * i + 1]

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(call, range(600)))


@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        (b'{"instances": [', 400, "malformed_json", "the body is no JSON"),
        (b'{"instances": [-1]}', 422, "invalid_request", "below zero"),
        (b" " * 10_001, 413, "payload_too_large", "the body is larger than the 10000 bytes allowed"),
        (b'{"instances": ["busy"]}', 503, "overloaded", "3 rows are waiting already"),
        (b'{"instances": ["secret path"]}', 500, "internal", "the service failed on this request"),
        (b'{"instances": ["lost store"]}', 503, "unavailable", "the service failed on this request"),
    ],
)
def test_errors_have_one_shape_and_reveal_no_internals(
    server: Server, body: bytes, status: int, code: str, message: str
) -> None:
    got, headers, answer = server.request("/predict", body, X_Request_ID="order-17/a")
    error = answer["error"]
    assert (got, error["code"]) == (status, code)
    assert error["message"].startswith(message)
    assert set(error) == {"code", "message", "path", "request_id"}
    assert error["request_id"] == headers["x-request-id"] == "order-17/a"
    assert "secret" not in str(answer)
    assert "db.internal" not in str(answer)
    assert ("retry-after" in headers) is (status == 503)
    row_errors = [{"code": code, "message": message, "path": "$.instances[0]"}]
    assert answer.get("errors") == (row_errors if code == "invalid_request" else None)


def test_methods_and_media_types(server: Server) -> None:
    status, headers, answer = server.request("/predict", method="GET")
    assert (status, headers["allow"]) == (405, "POST")
    assert answer["error"]["message"] == "this path answers POST, not GET"
    for given in ("text/csv", "application/json-seq", "application/vnd.bentoml+pickle"):
        status, _, answer = server.request("/predict", b"[]", content_type=given)
        assert (status, answer["error"]["code"]) == (415, "unsupported_media_type")
        assert answer["error"]["message"] == f"content type '{given}' is not read here; send application/json"


def test_request_ids_are_kept_when_plain_and_made_when_not(server: Server) -> None:
    made = {
        server.request("/predict", b'{"instances": [1]}', **({"X_Request_ID": given} if given else {}))[1][
            "x-request-id"
        ]
        for given in ("", "a" * 129, "with space", "<script>")
    }
    assert len(made) == 4
    assert all(len(name) < 64 and name.replace("-", "").isalnum() for name in made)


def test_checks_run_before_the_body_and_observers_see_the_answer(server: Server) -> None:
    before = len(server.seen.answers)
    status, headers, answer = server.request("/predict", b"not json", Authorization="Bearer fast")
    assert (status, headers["retry-after"], answer["error"]["code"]) == (429, "3", "rate_limited")
    assert server.request("/hello", method="GET", Authorization="Bearer fast")[0] == 429
    server.score(1)
    seen = server.seen.answers[before:]
    assert [(path, status) for path, status, _ in seen] == [("/predict", 429), ("/hello", 429), ("/predict", 200)]
    assert all(0 < seconds < 5 for _, _, seconds in seen)


def test_the_application_behind_answers_the_rest_and_its_errors_are_reshaped(server: Server) -> None:
    status, headers, _ = server.request("/hello", method="GET", X_Request_ID="me")
    assert (status, headers["x-request-id"]) == (200, "me")
    status, _, answer = server.request("/nowhere", method="GET")
    assert (status, answer["error"]["code"], answer["error"]["message"]) == (404, "not_found", "not found: /nowhere")
    status, _, answer = server.request("/broken", method="GET")
    assert (status, answer["error"]["code"]) == (500, "internal")
    assert "Traceback" not in str(answer)


def head(length: int | None) -> bytes:
    framing = b"Transfer-Encoding: chunked" if length is None else b"Content-Length: %d" % length
    return b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + framing + b"\r\n\r\n"


def test_a_declared_body_that_is_too_large_is_refused_before_it_is_sent(server: Server) -> None:
    answer = server.raw(head(100_000_000))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer


def test_an_undeclared_body_is_counted_while_it_streams(server: Server) -> None:
    chunk = b"7d0\r\n" + b" " * 2000 + b"\r\n"
    answer = server.raw(head(None), *[chunk] * 6, wait_s=0.01)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer


def test_a_body_in_pieces_is_put_together(server: Server) -> None:
    body = b'{"instances": [1, 2, 3]}'
    request = [head(len(body)).replace(b"Host: x", b"Host: x\r\nConnection: close"), *[bytes([b]) for b in body]]
    assert server.raw(*request, wait_s=0.001).endswith(b'{"predictions": [2, 4, 6], "explained": false}')


@pytest.mark.parametrize("trickle", [[], [b"{", b'"', b"i", b"n", b"s", b"t", b"a", b"n"]])
def test_slow_bodies_are_given_up_and_hurt_nobody(server: Server, trickle: list[bytes]) -> None:
    started = time.monotonic()
    with ThreadPoolExecutor(50) as pool:
        slow = [pool.submit(server.raw, head(500), *trickle, wait_s=0.15) for _ in range(49)]
        assert server.score(21) == [42]
        answers = [caller.result() for caller in slow]
    assert time.monotonic() - started < 5
    received = [answer for answer in answers if answer or not trickle]
    assert len(received) > 20
    assert all(answer.startswith(b"HTTP/1.1 408 ") for answer in received)
    assert all(b'"the body did not arrive within 0.3 s"' in answer for answer in received)


def leave_early(server: Server, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(sent)


@pytest.mark.parametrize("sent", [head(500), head(500) + b"{", head(None) + b"1\r\n{\r\n"])
def test_callers_that_leave_hurt_nobody(server: Server, sent: bytes) -> None:
    with ThreadPoolExecutor(16) as pool:
        leaving: list[Callable[[], Any]] = [lambda: leave_early(server, sent)] * 30
        staying: list[Callable[[], Any]] = [lambda: server.score(3) == [6]] * 30
        done = list(pool.map(lambda call: call(), [c for pair in zip(leaving, staying, strict=True) for c in pair]))
    assert done[1::2] == [True] * 30
