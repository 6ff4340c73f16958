"""A server of the contract's shape for the load tests' own tests: it checks requests as the service does, scores by
amount, and can be slow, full or forgetful on purpose.

    python -m tests.load_server PORT [--delay-ms 20] [--most-rps 100] [--forget]
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import time
from pathlib import Path
from typing import Any

import msgspec
import uvicorn

from fraud.errors import FraudError, Overloaded
from fraud.schema import FeatureSpec, Role, RowDecoder
from fraud.serving.scoring import decode_envelope

SPEC = FeatureSpec("transaction", (), (Role("merchant_id"), Role("category"), Role("channel")))


class Server:
    def __init__(self, delay_s: float, most_rps: float, forget: bool, version: Path | None) -> None:
        self.delay_s, self.most_rps, self.forget, self.version = delay_s, most_rps, forget, version
        self.decoder = RowDecoder(SPEC)
        self.free_at = 0.0
        self.answers = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        status, answer = await self.answer(scope["path"], body)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    async def answer(self, path: str, body: bytes) -> tuple[int, bytes]:
        if path == "/metrics":
            size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return 200, f"# TYPE process_resident_memory_bytes gauge\nprocess_resident_memory_bytes {size}\n".encode()
        if path not in ("/predict", "/explain"):
            return 200, b"{}"
        try:
            self.admit()
            instances, _ = decode_envelope(body)
            rows = [self.decoder.decode(raw, f"$.instances[{i}]") for i, raw in enumerate(instances)]
        except FraudError as error:
            problem = {"code": error.code, "message": error.message, "path": error.path, "request_id": "r"}
            return error.http_status, msgspec.json.encode({"error": problem})
        await asyncio.sleep(self.delay_s)
        return 200, msgspec.json.encode({"predictions": [self.score(row) for row in rows]})

    def admit(self) -> None:
        now = time.perf_counter()
        if self.free_at > now + 0.1:
            raise Overloaded("full")
        self.free_at = max(now, self.free_at) + 1 / self.most_rps

    def score(self, row: Any) -> dict[str, Any]:
        self.answers += 1
        probability = min(row.amount / 1e4, 1.0) + (self.answers * 1e-9 if self.forget else 0.0)
        version = self.version.read_text() if self.version else "1"
        return {
            "transaction_id": row.transaction_id,
            "fraud_probability": probability,
            "prediction": False,
            "risk_level": "low",
            "decision": "approve",
            "model": {"name": "by-amount", "version": version, "digest": f"sha256:{version}"},
            "degraded": [],
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--most-rps", type=float, default=1e9)
    parser.add_argument("--forget", action="store_true")
    parser.add_argument("--version", type=Path)
    given = parser.parse_args()
    server = Server(given.delay_ms / 1e3, given.most_rps, given.forget, given.version)
    uvicorn.run(server, port=given.port, log_level="warning", lifespan="off", timeout_keep_alive=60)


if __name__ == "__main__":
    main()
