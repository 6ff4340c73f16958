"""Whatever a caller sends: no answer of 500, every refusal in the one error shape, every answer as documented.

FRAUD_FUZZ_CALLS sets the number of calls; the default keeps the suite quick.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from fraud.checks.carriers import CARRIERS
from fraud.checks.fuzz import Target, fuzz_server, has_shape, routes_of, unserved_of
from fraud.checks.mutator import RARE, Mutator
from fraud.serving.app import declared
from fraud.serving.contracts.registered import CONTRACTS
from fraud.serving.http import ONE_SHAPE, ErrorShape
from fraud.serving.scopes import SCOPES
from fraud.serving.security import new_key
from fraud.settings import Settings
from tests.servers import bentoml_serve
from tests.tiny import form_rows, ready_rows, store_of_tiny_models, tiny_anomaly_model, tiny_form_model, transactions

ROOT = Path(__file__).parent.parent
CALLS = int(os.environ.get("FRAUD_FUZZ_CALLS", "900"))

SETTINGS = settings(
    max_examples=CALLS // 3,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
SECRET, KEY = new_key(["score", "read"], rate=1e6)
READER_SECRET, READER = new_key(["read"])
ADMIN_SECRET, ADMIN = new_key(["admin"])
ALL_SECRET, ALL = new_key(tuple(SCOPES), rate=1e6)
LIMITED_SECRET, LIMITED = new_key(["score"], rate=1, burst=3)
MAX_BODY_BYTES = 100_000
ROUTER = declared(Settings())
"""Finds the error shape of a path."""


@dataclass
class Server:
    url: str
    statuses: Counter[int] = field(default_factory=Counter)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            given_headers = {"Content-Type": "application/json", "Authorization": f"Bearer {SECRET}"}
            connection.request(method, path, body, given_headers if headers is None else headers)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        self.statuses[answer.status] += 1
        return answer.status, content, {name.lower(): value for name, value in answer.getheaders()}

    def worker(self) -> int:
        """Return the process that answers requests."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            mine = connection.getsockname()
            connection.sendall(b"GET /livez HTTP/1.1\r\nhost: s\r\n\r\n")
            assert connection.recv(4096)  # it is accepted
            (pid,) = {other.pid for other in psutil.net_connections("tcp") if other.raddr == mine}
        assert pid is not None
        return int(pid)

    def still_scores(self) -> None:
        body = json.dumps({"instances": ready_rows(1, 1), "model": "tiny-features"}).encode()
        status, content, _ = self.ask("POST", "/predict", body)
        assert status == 200, content


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    models = store_of_tiny_models(home)
    environment = {
        **models,
        "FRAUD_MODEL": f"{models['FRAUD_MODEL']},{tiny_form_model(home)}",
        "FRAUD_ANOMALY_MODEL": tiny_anomaly_model(home),
        "FRAUD_API_KEYS": f"{KEY.line()} {READER.line()} {ADMIN.line()} {LIMITED.line()} {ALL.line()}",
        "FRAUD_REQUIRE_KEYS": "true",
        "FRAUD_MAX_BODY_BYTES": str(MAX_BODY_BYTES),
        "FRAUD_DURABLE": "false",
        "FRAUD_LOG_REQUESTS": "all",
    }
    log = home / "log"
    with bentoml_serve(environment, log) as url:
        yield Server(url)
    text = log.read_text()
    assert "Traceback" not in text
    for secret in (SECRET, READER_SECRET, LIMITED_SECRET):
        assert secret.split("_", 2)[2] not in text


def check(status: int, content: bytes, headers: dict[str, str], shape: ErrorShape = ONE_SHAPE) -> None:
    """Hold one answer to what all have in common, and an error to its shape."""
    assert status < 500, content
    assert headers["x-request-id"]
    if status < 400:
        return
    assert headers["content-type"] == "application/json"
    assert has_shape(content, shape), content
    if shape is ONE_SHAPE:
        error = json.loads(content)["error"]
        assert error["request_id"] == headers["x-request-id"]
        assert error["code"]
        assert error["message"]
    for internal in ("Traceback", str(ROOT), "site-packages", "object at 0x"):
        assert internal not in content.decode()


@pytest.fixture(scope="module")
def document(server: Server) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/docs.json", headers={"Authorization": f"Bearer {SECRET}"})


def test_openapi_document_is_true(document: Any, server: Server) -> None:
    """Every operation of the document, called with what it says may be sent, answers as it says."""
    operations = [result.ok() for result in document.get_all_operations()]
    router = declared(Settings())
    assert {operation.path for operation in operations} >= {
        "/predict",
        "/explain",
        "/livez",
        "/readyz",
        "/admin/models",
        "/v1/labels",
        "/v1/users/{id}/profile",
    }
    for operation in operations:
        needs_admin = "/admin/" in operation.path or operation.method == "delete"
        secret = ADMIN_SECRET if needs_admin else SECRET
        route, _ = router.find({"method": operation.method.upper(), "path": operation.path})
        examples = CALLS // 6 if operation.method == "post" else CALLS // 30 if "{" in operation.path else 3

        @settings(SETTINGS, max_examples=examples)
        @given(case=operation.as_strategy())
        def answers_as_documented(case: Any) -> None:
            answer = case.call(headers={"Authorization": f"Bearer {secret}"})  # noqa: B023
            server.statuses[answer.status_code] += 1
            if answer.status_code >= 400:
                sent = {name.lower(): values[0] for name, values in answer.headers.items()}
                check(answer.status_code, answer.content, sent, route.errors)  # noqa: B023
            case.validate_response(answer, checks=CHECKS)

        answers_as_documented()


numbers = st.one_of(st.floats(), st.integers(-(2**70), 2**70), st.sampled_from([0, -0.0, 1e308, 5e-324]))
texts = st.one_of(st.text(max_size=40), st.sampled_from(["", "\x00", "\ud800", "a" * 200, "2026-01-01T00:00:00"]))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=12,
)
METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "BREW"]
PATHS = ["/predict", "/explain", "/v1/labels", "/v1/users/c1/profile", "/v1/users/"]
FIELDS = [*transactions(1, 1)[0], "income", "velocity", "has_phone", "email_domain", "extra"]


@st.composite
def bent_instances(draw: st.DrawFn) -> Any:
    """A good instance with a few of its fields changed, taken away or added."""
    seed = draw(st.integers(0, 50))
    good = transactions(1, seed)[0] if draw(st.booleans()) else ready_rows(1, seed)[0]
    instance: dict[str, Any] = dict(good)
    for name in draw(st.lists(st.sampled_from(FIELDS), max_size=3)):
        if draw(st.booleans()):
            instance.pop(name, None)
        else:
            instance[name] = draw(values)
    return draw(st.one_of(st.just(instance), st.just(instance), values))


models = st.sampled_from([None, "tiny-transaction", "tiny-features", "../../etc/passwd", "", 7])
bodies = st.builds(
    lambda instances, model, extra: {"instances": instances, "model": model, **extra},
    st.one_of(st.lists(bent_instances(), max_size=5), values),
    models,
    st.dictionaries(texts, values, max_size=2),
)


@given(body=bodies, path=st.sampled_from(["/predict", "/explain"]))
@SETTINGS
def test_bent_bodies(server: Server, body: Any, path: str) -> None:
    content = json.dumps(body, ensure_ascii=True).encode()
    check(*server.ask("POST", path, content))


label_fields = st.fixed_dictionaries(
    {
        "transaction_id": st.one_of(st.sampled_from(["t1-0", "tiny-features\x1ft1-0"]), values),
        "is_fraud": st.one_of(st.just(True), values),
    },
    optional={"label_time": st.one_of(st.just("2026-02-01T00:00:00+01:00"), values), "labelTime": values},
)
label_lists = st.one_of(st.lists(st.one_of(label_fields, values), max_size=5), values)


@given(body=st.one_of(st.fixed_dictionaries({"labels": label_lists}), values))
@SETTINGS
def test_bent_labels(server: Server, body: Any) -> None:
    check(*server.ask("POST", "/v1/labels", json.dumps(body).encode()))


customer_names = st.text("ab/.%\x00\x1f\xff\u20ac ", max_size=6).map(lambda text: quote(text.encode(), safe=""))


@given(name=st.one_of(customer_names, st.binary(max_size=4).map(quote), st.just("c1")), method=st.sampled_from(METHODS))
@SETTINGS
def test_any_customer_in_the_path(server: Server, name: str, method: str) -> None:
    headers = {"Authorization": f"Bearer {ADMIN_SECRET if method == 'DELETE' else SECRET}"}
    answer = server.ask(method, f"/v1/users/{name}/profile", None, headers)
    if method != "HEAD":
        check(*answer)
    refused = {"BREW": (400,), "POST": (405,), "PUT": (405,), "PATCH": (405,), "OPTIONS": (405,)}
    assert answer[0] in refused.get(method, (200, 404, 422))


@given(
    content=st.one_of(
        st.binary(max_size=300),
        st.builds(lambda b, n: json.dumps(b).encode()[:n], bodies, st.integers(0, 400)),
        st.builds(lambda n: b'{"instances":' + b"[" * n, st.integers(1, 5000)),
    ),
    path=st.one_of(
        st.sampled_from([*PATHS, "/predict/", "//predict", "/metrics", "/docs.json", "/admin/models"]),
        st.text("abc/._-~%2e0", max_size=30).map(lambda text: f"/{text}"),
    ),
    method=st.sampled_from(METHODS),
    media_type=st.sampled_from(["application/json", "application/json; charset=utf-8", "text/plain", "", "x"]),
)
@SETTINGS
def test_raw_bytes_on_any_path(server: Server, content: bytes, path: str, method: str, media_type: str) -> None:
    headers = {"Content-Type": media_type, "Authorization": f"Bearer {SECRET}"}
    status, answered, given_headers = server.ask(method, path, content, headers)
    if method != "HEAD":
        plain = unquote(path)
        route, _ = ROUTER.find({"method": method, "path": plain, "raw_path": path.encode()})
        is_read = method != "BREW"  # of a request that cannot be read, no route is known
        check(status, answered, given_headers, route.errors if is_read else ONE_SHAPE)
    assert status < 500


@pytest.mark.parametrize(
    ("headers", "path", "status", "code"),
    [
        ({}, "/predict", 401, "unauthenticated"),
        ({"Authorization": "Bearer fk_00000000_nobody"}, "/predict", 401, "unauthenticated"),
        ({"Authorization": "Basic dXNlcjpwYXNz"}, "/predict", 401, "unauthenticated"),
        ({"X-API-Key": READER_SECRET}, "/predict", 403, "forbidden"),
        ({"X-API-Key": READER_SECRET}, "/v1/labels", 403, "forbidden"),
        ({}, "/v1/labels", 401, "unauthenticated"),
        ({"X-API-Key": SECRET}, "/admin/models/refresh", 403, "forbidden"),
        ({}, "/metrics", 401, "unauthenticated"),
        ({}, "/docs.json", 401, "unauthenticated"),
    ],
)
def test_strangers_are_refused(server: Server, headers: dict[str, str], path: str, status: int, code: str) -> None:
    answer = server.ask("POST", path, b"{}", {"Content-Type": "application/json", **headers})
    check(*answer)
    assert answer[0] == status
    assert json.loads(answer[1])["error"]["code"] == code
    server.still_scores()


def test_rate_is_held_with_a_time_to_come_back(server: Server) -> None:
    headers = {"Content-Type": "application/json", "X-API-Key": LIMITED_SECRET}
    answers = [server.ask("POST", "/predict", b"{}", headers) for _ in range(5)]
    assert [status for status, _, _ in answers] == [422, 422, 422, 429, 429]
    assert answers[-1][2]["retry-after"] == "1"
    check(*answers[-1])


def test_huge_body_is_refused_before_it_is_sent(server: Server) -> None:
    """100 MB are announced; the service answers after the first piece and closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        head = (
            f"POST /predict HTTP/1.1\r\nhost: s\r\nauthorization: Bearer {SECRET}\r\ncontent-type: application/json\r\n"
        )
        connection.sendall(f"{head}content-length: {100 * 1024 * 1024}\r\n\r\n".encode() + b"{" * 1000)
        answer = b""
        while part := connection.recv(4096):
            answer += part
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"payload_too_large"' in answer
    server.still_scores()


def test_trickled_headers_hold_nobody_up(server: Server) -> None:
    """A few hundred connections that send a byte of a header now and then, as far as this place allows."""
    idle: list[socket.socket] = []
    stopped = threading.Event()

    def trickle() -> None:
        while not stopped.wait(0.2):
            for connection in idle:
                try:
                    connection.send(b"x")
                except OSError:
                    continue

    try:
        for _ in range(400):
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
            connection.sendall(b"POST /predict HTTP/1.1\r\nhost: s\r\nx-slow: ")
            idle.append(connection)
        thread = threading.Thread(target=trickle)
        thread.start()
        slowest = 0.0
        for _ in range(50):
            started = time.monotonic()
            server.still_scores()
            slowest = max(slowest, time.monotonic() - started)
        assert slowest < 1.0
    finally:
        stopped.set()
        for connection in idle:
            connection.close()
    thread.join()
    server.still_scores()


def test_long_header_is_refused(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        try:
            connection.sendall(b"POST /predict HTTP/1.1\r\nhost: s\r\nx-long: " + b"a" * 1_000_000 + b"\r\n\r\n")
            answer = connection.recv(4096)
        except (ConnectionResetError, BrokenPipeError):
            answer = b""
    assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 400"))
    server.still_scores()


@pytest.mark.parametrize("opening", [b"[", b'{"instances":[', b'{"a":'])
def test_deep_nesting_is_refused(server: Server, opening: bytes) -> None:
    for begin in (b"", b'{"instances":[', b'{"instances":[{"transaction_id":"t","x":'):
        status, content, headers = server.ask("POST", "/predict", begin + opening * (60_000 // len(opening)))
        check(status, content, headers)
        assert json.loads(content)["error"]["code"] in ("malformed_json", "invalid_request")


@pytest.fixture(scope="module")
def target(server: Server) -> Target:
    ready = json.loads(server.ask("GET", "/readyz")[1])
    return Target(server.port, server.worker(), ALL_SECRET, declared(Settings()), unserved_of(ready))


ROWS = {"tiny-transaction": transactions(8, 1), "tiny-features": ready_rows(8, 1), "tiny-form": form_rows(8, 1)}


def test_nearly_right_calls_of_every_route(server: Server, target: Target, document: Any) -> None:
    """`fraud verify fuzz` at a small size, on models of both kinds: it makes 20,000 calls."""
    routes = routes_of(document.raw_schema)
    assert {path for _, path in routes} >= {"/predict", "/explain", "/v1/labels", "/readyz", "/admin/models"}
    for seed, (name, rows) in enumerate(ROWS.items()):
        result = asyncio.run(fuzz_server(target, Mutator(seed, routes, rows, name), CALLS * 5 // 6))
        server.statuses += result.statuses
        assert result.broken == []
        assert result.slow == []
        assert result.statuses[200] > 0.1 * result.calls
        assert result.statuses[422] > 0.05 * result.calls
        assert result.routes.keys() >= {path for _, path in routes} - RARE


@pytest.mark.parametrize("contract", CONTRACTS)
def test_nearly_right_calls_of_a_contract(contract: str, server: Server, target: Target, document: Any) -> None:
    """`fraud verify fuzz --contract` at a small size: 2,000 calls of each are made by hand."""
    assert contract in CARRIERS, "add how it carries a row"
    routes = routes_of(document.raw_schema, contract)
    statuses: Counter[int] = Counter()
    for seed, (name, rows) in enumerate(ROWS.items()):
        result = asyncio.run(fuzz_server(target, Mutator(seed, routes, rows, name), CALLS // 6))
        assert (result.broken, result.slow) == ([], [])
        statuses += result.statuses
    if contract in target.unserved:
        del statuses[503]
    else:
        assert statuses[200] > 0.05 * statuses.total()
    server.statuses += statuses


def test_the_mutator_is_repeatable() -> None:
    routes = [("POST", "/predict"), ("GET", "/v1/users/{id}/profile")]
    rows = transactions(4, 1)  # of this moment
    one, two = (Mutator(7, routes, rows, "m") for _ in range(2))
    assert [one.request() for _ in range(200)] == [two.request() for _ in range(200)]


def test_no_call_of_all_was_answered_with_500(server: Server) -> None:
    assert sum(server.statuses.values()) >= CALLS * 0.8
    assert [status for status in server.statuses if status >= 500] == []
