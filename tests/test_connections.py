"""Connections that never come to the point, on a real uvicorn: cut off in time, and nobody else held up."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from fraud.serving.connections import BoundedProtocol, ConnectionLimits

LIMITS = ConnectionLimits(header_timeout_s=0.5, max_header_bytes=2000, max_connections=20)
REQUEST = b"GET / HTTP/1.1\r\nhost: s\r\n\r\n"


async def app(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
    if scope["type"] == "http":
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    class Protocol(BoundedProtocol):
        limits = LIMITS

    with socket.create_server(("127.0.0.1", 0), backlog=200) as listener:
        server = uvicorn.Server(uvicorn.Config(app, http=Protocol, log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield int(listener.getsockname()[1])
        server.should_exit = True
        thread.join()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def everything(connection: socket.socket) -> bytes:
    """Read until the server closes."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def error_of(answer: bytes) -> tuple[str, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert error.keys() == {"code", "message", "path", "request_id"}
    assert f"x-request-id: {error['request_id']}".encode() in head
    assert f"content-length: {len(body)}".encode() in head
    assert b"connection: close" in head
    return head.split(b"\r\n")[0].decode(), error["code"]


def answers(port: int) -> bool:
    with connect(port) as connection:
        connection.sendall(REQUEST)
        return connection.recv(4096).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("first", [b"P", b"POST / HTTP/1.1\r\nhost: s\r\nx: "])
def test_headers_that_do_not_come_are_not_waited_for(port: int, first: bytes) -> None:
    with connect(port) as connection:
        started = time.monotonic()
        connection.sendall(first)
        assert error_of(everything(connection)) == ("HTTP/1.1 408 Request Timeout", "header_timeout")
        assert 0.4 < time.monotonic() - started < 2.0


@pytest.mark.parametrize("first", [b"", b"\r\n"])
def test_connection_without_a_byte_of_a_request_is_closed_without_an_answer(port: int, first: bytes) -> None:
    with connect(port) as connection:
        started = time.monotonic()
        connection.sendall(first)
        assert everything(connection) == b""
        assert 0.4 < time.monotonic() - started < 2.0


@pytest.mark.parametrize("n", [128, 129])
def test_headers_have_a_number(port: int, n: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n" + b"a:b\r\n" * n + b"\r\n")
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 200 " if n == 128 else b"HTTP/1.1 431 ")


def test_long_path_counts_as_headers(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\nhost: s\r\n\r\n")
        assert error_of(everything(connection))[1] == "headers_too_large"


def test_idle_connection_gives_way_before_one_that_sends_its_headers(port: int) -> None:
    with connect(port) as idle, connect(port) as sending:
        idle.sendall(REQUEST)
        assert idle.recv(4096).startswith(b"HTTP/1.1 200")
        sending.sendall(b"GET / HTTP/1.1\r\n")
        crowd = [connect(port) for _ in range(19)]
        assert idle.recv(1) == b""
        sending.sendall(b"\r\n")
        assert sending.recv(4096).startswith(b"HTTP/1.1 200")
        for connection in crowd:
            connection.close()


def test_trickling_does_not_buy_time(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nx: ")
        started = time.monotonic()
        stopped = threading.Event()

        def trickle() -> None:
            while not stopped.wait(0.05):
                try:
                    connection.send(b"a")
                except OSError:
                    return

        thread = threading.Thread(target=trickle)
        thread.start()
        assert b" 408 " in everything(connection)
        stopped.set()
        thread.join()
        assert time.monotonic() - started < 2.0


def test_second_request_of_a_connection_is_held_to_the_same(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(REQUEST)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.sendall(REQUEST[:-3])
        assert b" 408 " in everything(connection)


def test_kept_connection_without_a_request_is_not_cut_off(port: int) -> None:
    with connect(port) as connection:
        for _ in range(3):
            connection.sendall(REQUEST)
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
            time.sleep(0.7)


def test_slow_body_is_not_the_headers_business(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nhost: s\r\ncontent-length: 3\r\n\r\n")
        for _ in range(3):
            time.sleep(0.4)
            connection.send(b"a")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
@pytest.mark.parametrize("pieces", [1, 10])
def test_long_headers_are_refused(port: int, pieces: int, end: bytes) -> None:
    with connect(port) as connection:
        content = b"GET / HTTP/1.1\r\nhost: s\r\nx: " + b"a" * 3000 + end
        step = len(content) // pieces
        for begin in range(0, len(content), step):
            with contextlib.suppress(BrokenPipeError):  # it was refused before its end
                connection.send(content[begin : begin + step])
            time.sleep(0.01 if pieces > 1 else 0)
        assert error_of(everything(connection))[1] == "headers_too_large"


def test_long_body_is_not_taken_for_headers(port: int) -> None:
    with connect(port) as connection:
        for _ in range(2):
            connection.sendall(b"POST / HTTP/1.1\r\nhost: s\r\ncontent-length: 50000\r\n\r\n" + b"a" * 50_000)
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01\x02\x00\x01", b"BREW / HTTP/1.1\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"]
)
def test_what_is_no_http_is_told_so_in_the_one_shape(port: int, garbage: bytes) -> None:
    with connect(port) as connection:
        connection.sendall(garbage)
        assert error_of(everything(connection)) == ("HTTP/1.1 400 Bad Request", "malformed_http")


def test_crowd_of_idle_connections_gives_way_to_callers(port: int) -> None:
    crowd = [connect(port) for _ in range(19)]
    try:
        for _ in range(50):
            crowd.append(connect(port))
            crowd[-1].send(b"GET")
            assert answers(port)
    finally:
        for connection in crowd:
            connection.close()
