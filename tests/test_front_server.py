"""A service as `bentoml serve` starts it: limits of connections, encodings and forwarded addresses are in force."""

from __future__ import annotations

import gzip
import http.client
import json
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import pytest
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fraud.errors import SettingsError
from fraud.serving import connections
from fraud.serving.connections import OVERRIDDEN, ConnectionLimits, install
from fraud.serving.security import new_key
from tests.servers import bentoml_serve
from tests.tiny import ready_rows, store_of_tiny_models

SECRET, KEY = new_key(["score", "read"])
BODY = json.dumps({"instances": ready_rows(2, 1), "model": "tiny-features"}).encode()


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    home = tmp_path_factory.mktemp("home")
    environment = {
        **store_of_tiny_models(home),
        "FRAUD_HEADER_TIMEOUT_S": "0.5",
        "FRAUD_MAX_HEADER_BYTES": "2000",
        "FRAUD_MAX_CONNECTIONS": "20",
        "FRAUD_KEEP_ALIVE_S": "1.5",
        "FRAUD_GZIP_MIN_BYTES": "10",
        "FRAUD_MAX_BODY_BYTES": "100000",
        "FRAUD_API_KEYS": KEY.line(),
        "FRAUD_RATE_LIMIT_PER_S": "0.001",
        "FRAUD_RATE_LIMIT_BURST": "12",
        "FRAUD_TRUSTED_PROXIES": "127.0.0.2, 10.0.0.0/8",
    }
    with bentoml_serve(environment, home / "log") as url:
        yield int(url.rpartition(":")[2])
    assert "Traceback" not in (home / "log").read_text()


def ask(
    port: int, method: str, path: str, body: bytes = b"", address: str = "127.0.0.1", **headers: str
) -> tuple[int, Mapping[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10, source_address=(address, 0))
    sent = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, sent)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, content


def sent_raw(port: int, content: bytes) -> tuple[bytes, float]:
    """Send bytes; return what comes until the server closes, and after how many seconds it did."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        started = time.monotonic()
        connection.sendall(content)
        received = b""
        while part := connection.recv(65536):
            received += part
        return received, time.monotonic() - started


def test_headers_have_a_time_a_length_and_a_number(port: int) -> None:
    assert sent_raw(port, b"GET /livez HTTP/1.1\r\nhost: ")[0].startswith(b"HTTP/1.1 408 ")
    assert sent_raw(port, b"GET /livez HTTP/1.1\r\nx: " + b"a" * 3000)[0].startswith(b"HTTP/1.1 431 ")
    lines = b"".join(b"a%d:b\r\n" % i for i in range(130))
    assert sent_raw(port, b"GET /livez HTTP/1.1\r\n" + lines + b"\r\n")[0].startswith(b"HTTP/1.1 431 ")
    assert sent_raw(port, b"GET /livez?" + b"q" * 3000 + b" HTTP/1.1\r\n\r\n")[0].startswith(b"HTTP/1.1 431 ")


def test_a_connection_opened_ahead_of_need_is_closed_without_a_word(port: int) -> None:
    received, after_s = sent_raw(port, b"")
    assert received == b""
    assert 0.3 < after_s < 5


def test_a_connection_is_kept_for_as_long_as_is_set(port: int) -> None:
    received, after_s = sent_raw(port, b"GET /livez HTTP/1.1\r\nhost: s\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 200 ")
    assert 1.2 < after_s < 5


def test_idle_connections_give_way(port: int) -> None:
    with ExitStack() as closing:
        idle = []
        for _ in range(30):
            connection = closing.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            connection.sendall(b"GET /livez HTTP/1.1\r\nhost: s\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
            idle.append(connection)
        while idle[0].recv(4096):  # what was left of its answer; the one that was idle longest is closed
            pass


def test_a_forwarded_address_counts_only_from_a_trusted_proxy(port: int) -> None:
    statuses = [
        ask(port, "POST", "/predict", BODY, address="127.0.0.3", x_forwarded_for=f"192.0.2.{i}")[0] for i in range(14)
    ]
    assert statuses == [200] * 12 + [429] * 2
    statuses = [
        ask(port, "POST", "/predict", BODY, address="127.0.0.2", x_forwarded_for=f"192.0.2.{i}")[0] for i in range(14)
    ]
    assert statuses == [200] * 14
    chain = [
        ask(port, "POST", "/predict", BODY, address="127.0.0.2", x_forwarded_for=f"6.6.6.{i}, 198.51.100.7, 10.0.0.9")[
            0
        ]
        for i in range(14)
    ]
    assert chain == [200] * 12 + [429] * 2  # what stands before the first untrusted address is the caller's own word


def test_wrong_keys_are_limited_and_the_right_one_is_not(port: int) -> None:
    wrong = [ask(port, "GET", "/docs.json", address="127.0.0.4", x_api_key=f"fk_{i:08x}_x")[0] for i in range(40)]
    assert wrong[:30] == [401] * 30
    assert set(wrong[34:]) == {429}
    assert ask(port, "GET", "/docs.json", address="127.0.0.4", x_api_key=SECRET)[0] == 200


def test_encodings_of_bodies_and_answers(port: int) -> None:
    def predict(body: bytes, **headers: str) -> tuple[int, Mapping[str, str], bytes]:
        return ask(port, "POST", "/predict", body, address="127.0.0.5", **headers)

    assert predict(gzip.compress(BODY), content_encoding="gzip")[0] == 200
    assert predict(b"\xef\xbb\xbf" + BODY)[0] == 200
    status, headers, answer = predict(BODY, content_encoding="br")
    assert (status, headers["accept-encoding"]) == (415, "gzip, identity")
    assert json.loads(answer)["error"]["message"] == "content encoding 'br' is not read here; send gzip or none"
    assert predict(gzip.compress(b"0" * 200_000), content_encoding="gzip")[0] == 413
    _, headers, answer = predict(BODY, accept_encoding="gzip")
    assert headers["content-encoding"] == "gzip"
    assert json.loads(gzip.decompress(answer))["predictions"]
    _, headers, answer = predict(BODY, accept_encoding="gzip;q=0")
    assert "content-encoding" not in headers
    assert json.loads(answer)["predictions"]


def test_head_is_answered_where_get_is(port: int) -> None:
    for path in ("/livez", "/readyz"):
        assert ask(port, "HEAD", path)[::2] == (200, b"")


def test_a_uvicorn_that_moved_its_private_part_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(name in vars(HttpToolsProtocol) for name in OVERRIDDEN)
    monkeypatch.setattr(connections, "DEFAULT_PROTOCOL", "auto2")
    with pytest.raises(SettingsError, match=r"uvicorn \d+\.\d+\.\d+ cannot be held to limits of connections"):
        install(ConnectionLimits())
    monkeypatch.undo()
    monkeypatch.setattr(connections, "OVERRIDDEN", ("on_message_start",))
    with pytest.raises(SettingsError, match="its protocol has no on_message_start; install the version that"):
        install(ConnectionLimits())
    assert "auto2" not in HTTP_PROTOCOLS
