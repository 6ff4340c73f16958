"""Nearly valid requests of every route: a valid body of its contract, bent here and there."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fraud.checks.carriers import CARRIERS, OWN, Carrier, Row

MAX_BODY_BYTES = 3_000_000
SEGMENTS = ("c1", "%00", "%ff", "%ed%a0%80", "a" * 129, "a" * 4000, "%e2%82%ac", "..%2f..", "%1f", "%", "")
RARE = {"/admin/models/refresh", "/admin/refresh-models", "/v1/admin/refresh-models", "/api/v1/model/reload"}
"""Start a process that asks W&B, for seconds."""
METHODS = ("GET", "POST", "DELETE", "HEAD", "PUT", "OPTIONS", "PATCH")
HEADERS = (
    "",
    "",
    "",
    "x-request-id: \xe9\xff\r\n",
    f"x-request-id: {'r' * 500}\r\n",
    "accept-encoding: gzip;q=0, br\r\n",
    "content-encoding: br\r\n",
    "content-encoding: gzip\r\n",
    "x-forwarded-for: 1.2.3.4, nobody\r\n",
    "traceparent: 00-zz-zz-01\r\n",
    "idempotency-key: k-1\r\n",
    f"idempotency-key: {'k' * 200}\r\n",
    "idempotency-key: \xe9\r\n",
    "".join(f"x-{i}: {i}\r\n" for i in range(100)),
)
LABELS = Carrier(
    "/v1/labels",
    lambda rows, _: {"labels": [{"transaction_id": "t-1", "is_fraud": True} for _ in rows]},
    lambda _: [],
    60,
)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    body: bytes = b""
    headers: str = ""


class Mutator:
    """Makes nearly valid requests; the same seed makes the same requests.

    Parameters
    ----------
    seed : int
    routes : sequence of (str, str)
        Method and path of every route, a parameter in braces.
    instances : sequence of mapping
        Rows that are taken.
    model : str
        The name of the model that takes them.
    """

    def __init__(self, seed: int, routes: Sequence[tuple[str, str]], instances: Sequence[Row], model: str) -> None:
        self._random = random.Random(seed)
        self._routes = routes
        self._instances = instances
        self._model = model
        carriers = (*OWN, LABELS, *(carrier for some in CARRIERS.values() for carrier in some))
        self._carriers: dict[str, list[Carrier]] = {}
        for carrier in carriers:
            self._carriers.setdefault(carrier.path, []).append(carrier)

    def request(self) -> tuple[str, Request]:
        """Return the next request and the path of the route that it is for."""
        choose = self._random.choice
        method, route = choose(self._routes)
        while route in RARE and self._random.random() < 0.98:
            method, route = choose(self._routes)
        if self._random.random() < 0.1:
            method = choose(METHODS)
        path = "/".join(self._segment(part) for part in route.split("/"))
        if self._random.random() < 0.1:
            path += choose(
                ("/", "?a=" + "b" * 3000, "?limit=nan&limit=%ff", "?" + "&".join(f"q{i}=1" for i in range(500)))
            )
        body = self._body(route) if method in ("POST", "PUT", "PATCH") or self._random.random() < 0.05 else b""
        headers = choose(HEADERS)
        if headers.startswith("content-encoding: gzip") and self._random.random() < 0.7:
            body = gzip.compress(body, 1, mtime=0)[: None if self._random.random() < 0.8 else -5]
        return route, Request(method, path, body, headers)

    def _segment(self, part: str) -> str:
        """Return a part of a path, a parameter filled in: mostly the model where it is one's name."""
        if part.startswith("{name}") and self._random.random() < 0.8:
            return part.replace("{name}", self._model)
        return self._random.choice(SEGMENTS) if part.startswith("{") else part

    def _body(self, route: str) -> bytes:
        carrier = self._random.choice(self._carriers.get(route, [OWN[0]]))
        n = self._random.choice((1, 1, 1, 2, 5, 60, 0 if self._random.random() < 0.1 else 1))
        rows = [self._random.choice(self._instances) for _ in range(min(n, carrier.most))]
        body = self._written(carrier.body(rows or self._instances[:1] if carrier.most == 1 else rows, self._model))
        if self._random.random() < 0.05:
            body = self._random.choice(
                [b"\xef\xbb\xbf" + body, body[: len(body) // 2], b"[" + body + b"]", b"\xff\xfe", b""]
            )
        return body[:MAX_BODY_BYTES]

    def _written(self, value: Any) -> bytes:
        """Return a value as JSON, some of its objects bent: the innermost often, those around them seldom."""
        if isinstance(value, list | tuple):
            return b"[" + b", ".join(map(self._written, value)) + b"]"
        if not isinstance(value, Mapping):
            return json.dumps(value).encode()
        fields = {json.dumps(key).encode(): self._written(inner) for key, inner in value.items()}
        if "transaction_id" in value:
            fields[b'"transaction_id"'] = b'"f-%d"' % self._random.getrandbits(40)
        is_innermost = not any(b"{" in field for field in fields.values())
        for _ in range(self._random.choice((0, 0, 1, 1, 2)) if is_innermost else self._random.random() < 0.05):
            self._bend(fields)
        return b"{" + b", ".join(key.strip() + b": " + field for key, field in fields.items()) + b"}"

    def _bend(self, fields: dict[bytes, bytes]) -> None:
        keys = list(fields)
        key = self._random.choice(keys) if keys else b'"a"'
        match self._random.randrange(9):
            case 0 | 1 | 2:
                fields[key] = self._value()
            case 3:
                fields.pop(key, None)
            case 4:
                fields[self._key(key)] = fields.pop(key, b"1")
            case 5:
                fields[self._key(key)] = self._value()
            case 6:
                n = self._random.choice((20, 900, 1100, 60_000 if self._random.random() < 0.05 else 300))
                fields |= {b'%sx%d"' % (key[:-1], i): b"1" for i in range(n)}
            case 7:
                fields[key + b" "] = self._value()  # the same key again
            case 8:
                fields |= {self._key(key): self._value() for _ in range(5)}

    def _key(self, key: bytes) -> bytes:
        word = key[1:-1]
        ends = (
            word[::-1],
            word + b"_x",
            word.upper(),
            b"\xff" + word,
            word + b"\\ud800",
            b"k" * 30_000,
            b"",
            b"\\u0000",
        )
        return b'"%s"' % self._random.choice(ends)

    def _value(self) -> bytes:
        n = self._random.choice((3, 100, 900, 5000))
        return self._random.choice(
            (
                b"null",
                b"true",
                b"0",
                b"1",
                b"-0",
                b"-1",
                b"1e400",
                b"1e308",
                b"NaN",
                b"0.1e-400",
                b"7" * n,
                b"0." + b"3" * n,
                b'"' + b"x" * n * 10 + b'"',
                b'"' + "\u20ac".encode() * n + b'"',
                b'"caf\xe9"',
                b'"\xed\xa0\x80"',
                b'"\\ud800"',
                b'"\\u0000"',
                b'"\\q"',
                b'"2026-01-31T12:30Z"',
                b'"9999-12-31T23:59:59-23:59"',
                b'"0001-01-01T00:00:00+23:59"',
                b'"4.5E+15"',
                b"[" * n + b"]" * n,
                b'{"a":' * n + b"1" + b"}" * n,
                b"[" + b"1," * n + b"1]",
                b"[" * n,
            )
        )
