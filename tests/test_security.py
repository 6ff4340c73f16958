"""Keys, scopes and rates, each refusal with its text and status."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from typer.testing import CliRunner

from fraud.cli.keys import app
from fraud.errors import Forbidden, RateLimited, SettingsError, Unauthenticated
from fraud.serving import security
from fraud.serving.app import service_routes
from fraud.serving.bento_pages import bento_routes
from fraud.serving.contracts.registered import contracts_of
from fraud.serving.engine import Engine
from fraud.serving.http import Answer, Call, Route
from fraud.serving.routes import Router
from fraud.serving.scopes import KEYLESS, SCOPES, Scope
from fraud.serving.security import AccessControl, ApiKey, TokenBucket, new_key, parse_keys
from fraud.settings import Settings


async def nothing(_: Call) -> Answer:
    return Answer(b"")


ROUTER = Router(
    [
        *service_routes(Engine(), Settings(), contracts_of(Engine(), Settings())),
        *bento_routes(Starlette()),
        Route("GET", "/docs.json", "read", nothing, ""),
        *[Route("GET", f"/only/{scope}", scope, nothing, "") for scope in SCOPES],
    ]
)


@dataclass
class Request:
    path: str = "/predict"
    key: str | None = None
    method: str = "POST"
    client: tuple[str, int] = ("192.0.2.1", 50000)
    header: bytes = b"authorization"
    headers: dict[bytes, bytes] = field(init=False)
    scope: dict[str, object] = field(init=False)
    route: Route = field(init=False)

    def __post_init__(self) -> None:
        value = "" if self.key is None else f"Bearer {self.key}" if self.header == b"authorization" else self.key
        self.headers = {} if self.key is None else {self.header: value.encode()}
        self.scope = {"path": self.path, "method": self.method, "client": self.client}
        self.route, _ = ROUTER.find(self.scope)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_key(*scopes: Scope, rate: float | None = None, burst: float | None = None) -> tuple[str, ApiKey]:
    return new_key(scopes, rate, burst)


def test_key_is_read_back_from_its_entry() -> None:
    _, scorer = make_key("score")
    _, operator = make_key("score", "read", "admin", rate=0.25, burst=2_000_000)
    entries = f"# the backend's\n{scorer.line()}  # until spring\n{operator.line()},"
    assert parse_keys(entries) == [scorer, operator]
    assert parse_keys(" # none yet\n") == []


def test_entry_holds_no_secret() -> None:
    secret, key = make_key("score")
    assert secret.split("_", 2)[2] not in key.line()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("deadbeef:1234:score", r"API key 1 of 1 is not id:sha256:scope\+scope"),
        (
            f"deadbeef:{'0' * 64}:write",
            r"scopes score, read, analyst, rules, supervisor, admin; `fraud keys create` prints such an entry",
        ),
        (f"deadbeef:{'0' * 64}:score:0", "API key deadbeef: a rate or burst of 0 is not a number above zero"),
        (f"deadbeef:{'0' * 64}:score:1.2.3", "a rate or burst of 1.2.3 is not a number above zero"),
        (f"deadbeef:{'0' * 64}:score deadbeef:{'1' * 64}:read", "API key deadbeef is given twice"),
    ],
)
def test_broken_entry_is_refused_without_showing_it(entry: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as refusal:
        parse_keys(entry)
    assert "0" * 64 not in str(refusal.value)


@pytest.mark.parametrize("header", [b"authorization", b"x-api-key"])
def test_right_key_passes(header: bytes) -> None:
    secret, key = make_key("score")
    AccessControl([key], required=True)(Request(key=secret, header=header))


def test_health_needs_no_key() -> None:
    access = AccessControl([], required=True, rate=1, burst=1)
    for path in ("/livez", "/readyz", "/healthz") * 3:
        access(Request(path, method="GET"))


@pytest.mark.parametrize("path", ["/predict", "/explain", "/metrics", "/docs.json", "/", "/admin/models"])
def test_all_else_needs_one_when_required(path: str) -> None:
    """Also for a method that the path does not answer."""
    _, key = make_key("score", "read", "admin")
    with pytest.raises(Unauthenticated, match=r"no API key arrived; send it as Authorization: Bearer fk_…"):
        AccessControl([key], required=True)(Request(path, method="GET"))


def test_wrong_keys_are_refused_alike() -> None:
    secret, key = make_key("score")
    other, _ = make_key("score")
    access = AccessControl([key], required=True)
    altered = secret[:-1] + ("A" if secret[-1] != "A" else "B")
    borrowed_id = f"fk_{key.id}_{other.split('_', 2)[2]}"
    for wrong in (altered, other, borrowed_id, "", "fk_", "é" * 60, key.sha256, key.line()):
        with pytest.raises(Unauthenticated, match=r"^this API key is not known here$"):
            access(Request(key=wrong))
    with pytest.raises(Unauthenticated):
        access(Request(key=wrong, header=b"x-api-key"))


def test_wrong_key_is_refused_where_none_is_required() -> None:
    wrong, _ = make_key("score")
    with pytest.raises(Unauthenticated):
        AccessControl([])(Request(key=wrong))


def test_secrets_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for an id that is unknown, so that the time does not tell which ids exist."""
    compared: list[tuple[str, str]] = []
    real = hmac.compare_digest

    def counted(a: str, b: str) -> bool:
        compared.append((a, b))
        return bool(real(a, b))

    monkeypatch.setattr("fraud.serving.security.hmac.compare_digest", counted)
    secret, key = make_key("score")
    wrong, _ = make_key("score")
    access = AccessControl([key], required=True)
    access(Request(key=secret))
    for bad in (wrong, "nonsense"):
        with pytest.raises(Unauthenticated):
            access(Request(key=bad))
    assert [len(a) == len(b) == 64 for a, b in compared] == [True] * 3


@pytest.mark.parametrize(
    ("path", "method", "scope"),
    [
        ("/predict", "POST", "score"),
        ("/explain", "POST", "score"),
        ("/metrics", "GET", "read"),
        ("/docs.json", "GET", "read"),
        ("/v1/labels", "POST", "score"),
        ("/v1/users/c1/profile", "GET", "read"),
        ("/v1/users/c1/profile", "DELETE", "admin"),
        ("/admin/models", "GET", "admin"),
        ("/admin/models/refresh", "POST", "admin"),
        ("/livez", "GET", None),
    ],
)
def test_scope_of_path(path: str, method: str, scope: Scope | None) -> None:
    assert Request(path, method=method).route.scope == scope
    if scope is None:
        return
    for other in SCOPES:
        secret, key = make_key(other)
        access = AccessControl([key])
        if other == scope:
            access(Request(path, secret, method))
        else:
            with pytest.raises(Forbidden, match=rf"has the scope {other}; this path asks for {scope}"):
                access(Request(path, secret, method))


def test_administration_asks_for_a_key_where_nothing_else_does() -> None:
    access = AccessControl([])
    access(Request("/predict"))
    with pytest.raises(Unauthenticated):
        access(Request("/admin/models", method="GET"))


@pytest.mark.parametrize("scope", SCOPES)
def test_each_scope_opens_what_it_names_and_nothing_else(scope: Scope) -> None:
    """Scopes are flat: none includes another, admin neither."""
    secret, key = make_key(scope)
    access = AccessControl([key])
    for asked in SCOPES:
        request = Request(f"/only/{asked}", secret, "GET")
        if asked == scope:
            access(request)
        else:
            with pytest.raises(Forbidden):
                access(request)
    without_key = Request(f"/only/{scope}", method="GET")
    if scope in KEYLESS:
        access(without_key)
    else:
        with pytest.raises(Unauthenticated):
            access(without_key)


def test_rate_holds_for_each_key_by_itself() -> None:
    clock = Clock()
    (one, key_one), (two, key_two) = make_key("score"), make_key("score", rate=1, burst=2)
    access = AccessControl([key_one, key_two], required=True, rate=10, burst=5, clock=clock)
    for _ in range(5):
        access(Request(key=one))
    with pytest.raises(RateLimited, match=r"too many requests for this key; try again in 0\.1 s") as refusal:
        access(Request(key=one))
    assert refusal.value.retry_after_s == pytest.approx(0.1)
    access(Request(key=two))
    access(Request(key=two))
    with pytest.raises(RateLimited, match=r"1\.0 s"):
        access(Request(key=two))
    clock.now += 0.1
    access(Request(key=one))
    with pytest.raises(RateLimited):
        access(Request(key=two))


def test_callers_without_key_are_told_apart_by_address() -> None:
    access = AccessControl([], rate=1, burst=1, clock=Clock())
    access(Request(client=("192.0.2.1", 1)))
    access(Request(client=("192.0.2.2", 1)))
    with pytest.raises(RateLimited):
        access(Request(client=("192.0.2.1", 2)))


def test_number_of_callers_remembered_is_bounded() -> None:
    access = AccessControl([], rate=1, burst=1, clock=Clock())
    for n in range(security.MAX_CALLERS + 500):
        access(Request(client=(f"host-{n}", 1)))
    assert len(access._of_addresses) == security.MAX_CALLERS


def test_wrong_keys_of_one_address_are_limited() -> None:
    clock = Clock()
    secret, key = make_key("score")
    access = AccessControl([key], required=True, failures=1, clock=clock)
    for _ in range(int(security.FAILURES_AT_ONCE)):
        with pytest.raises(Unauthenticated):
            access(Request(key="fk_00000000_wrong"))
    for wrong in ("fk_00000000_wrong", None):
        with pytest.raises(RateLimited):
            access(Request(key=wrong))
    access(Request(key=secret))  # a right key is not its neighbours' hostage
    with pytest.raises(Unauthenticated):
        access(Request(key="fk_00000000_wrong", client=("192.0.2.2", 1)))
    clock.now += 1
    with pytest.raises(Unauthenticated):
        access(Request(key="fk_00000000_wrong"))
    for n in range(security.MAX_CALLERS + 100):
        with pytest.raises(Unauthenticated):
            access(Request(key="wrong", client=(f"10.0.{n >> 8}.{n & 255}", 1)))
    assert len(access._of_failures) == security.MAX_CALLERS


def test_a_crowd_of_addresses_gives_no_key_its_burst_again() -> None:
    secret, key = make_key("score", rate=1, burst=1)
    access = AccessControl([key], rate=1, failures=1, clock=Clock())
    access(Request(key=secret))
    for n in range(security.MAX_CALLERS + 1):
        access(Request(client=(f"host-{n}", 1)))
    with pytest.raises(RateLimited):
        access(Request(key=secret))


@pytest.mark.parametrize(
    ("host", "counted"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:aaaa::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:bbbb::2", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("no:address", "no:address"),
        ("x" * 5000, "x" * 64),
    ],
)
def test_who_is_one_caller(host: str, counted: str) -> None:
    assert security.address_of({"client": (host, 1)}) == counted
    assert security.address_of({"client": None}) == "unknown"


@given(
    rate=st.floats(0.1, 1000),
    burst=st.floats(1, 100),
    gaps=st.lists(st.floats(0, 5), min_size=1, max_size=200),
)
def test_no_window_admits_more_than_burst_and_rate_allow(rate: float, burst: float, gaps: list[float]) -> None:
    bucket = TokenBucket(rate, burst, 0.0)
    now = 0.0
    admitted: list[float] = []
    for gap in gaps:
        now += gap
        wait_s = bucket.take(now)
        if wait_s == 0.0:
            admitted.append(now)
        else:
            assert 0 < wait_s <= 1 / rate + 1e-9
    for i, start in enumerate(admitted):
        for j in range(i, len(admitted)):
            assert j - i + 1 <= burst + rate * (admitted[j] - start) + 1e-6


def test_gate_is_made_of_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret, key = make_key("score")
    file = tmp_path / "keys"
    file.write_text(f"# the backend\n{key.line()}\n")
    monkeypatch.setenv("FRAUD_API_KEYS_FILE", str(file))
    monkeypatch.setenv("FRAUD_REQUIRE_KEYS", "true")
    monkeypatch.setenv("FRAUD_RATE_LIMIT_PER_S", "2")
    access = AccessControl.of(Settings.read())
    access(Request(key=secret))
    access(Request(key=secret))
    with pytest.raises(RateLimited):
        access(Request(key=secret))
    with pytest.raises(Unauthenticated):
        access(Request())
    assert key.sha256 not in repr(Settings.read())


def test_keys_that_are_required_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAUD_REQUIRE_KEYS", "true")
    with pytest.raises(SettingsError, match="FRAUD_API_KEYS has no key; `fraud keys create` makes one"):
        AccessControl.of(Settings.read())


def test_secret_file_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAUD_AUDIT_KEY_FILE", "/nowhere/key")
    with pytest.raises(SettingsError, match="FRAUD_AUDIT_KEY_FILE='/nowhere/key' cannot be read"):
        Settings.read()


def test_command_makes_a_key_that_the_service_takes() -> None:
    result = CliRunner().invoke(app, ["--scope", "score", "--scope", "read", "--rate", "20"])
    assert result.exit_code == 0, result.output
    secret, entry = result.output.split()
    access = AccessControl(parse_keys(entry), required=True)
    access(Request("/predict", secret))
    access(Request("/metrics", secret, "GET"))
    with pytest.raises(Forbidden):
        access(Request("/admin/models", secret, "GET"))


def test_command_refuses_an_unknown_scope() -> None:
    result = CliRunner().invoke(app, ["--scope", "write"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "allowed: score, read, analyst, rules, supervisor, admin" in result.output
