"""Run once while the image is built: serve the packed models, compile every kernel, ask every golden request.

An image that answers one of them otherwise than the training did is never made. With `--answers` it only asks, in a
container that runs.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

PORT = int(os.environ.get("BENTOML_PORT") or os.environ.get("PORT") or 3000)
START_LIMIT_S = 600.0


def ask(method: str, path: str, body: object = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def until_ready(server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        if server.poll() is not None:
            sys.exit(f"the service ended with {server.returncode} before it was ready")
        try:
            if ask("GET", "/readyz")[0] == 200:
                return
        except OSError:
            pass  # it does not listen yet
        if time.monotonic() > deadline:
            sys.exit(f"the service was not ready within {START_LIMIT_S:.0f} s")
        time.sleep(0.2)


def answers_as_trained(name: str, golden: Path) -> None:
    """Ask for every golden request of a model, in order, and compare the probabilities bit for bit."""
    rows = [json.loads(line) for line in golden.read_text().splitlines()]
    for path in ("/predict", "/explain"):
        for i, row in enumerate(rows):
            status, answer = ask("POST", path, {"model": name, "instances": [row["instance"]]})
            if status != 200:
                sys.exit(f"{name}: golden request {i} to {path} was answered with {status}: {answer.decode()[:500]}")
            probability = json.loads(answer)["predictions"][0]["fraud_probability"]
            if probability != row["fraud_probability"]:
                sys.exit(f"{name}: golden request {i} scores {probability}, in training {row['fraud_probability']}")
    print(f"{name}: {len(rows)} golden requests score as in training")


def answers(bento: Path) -> None:
    for golden in sorted(bento.glob("models/*/*/golden.jsonl")):
        answers_as_trained(golden.parent.parent.name, golden)


def pages() -> None:
    """Ask for the pages of the API's document and for what they load."""
    for page in ("/docs", "/redoc"):
        status, shown = ask("GET", page)
        parts = re.findall(r'(?:src|href|spec-url)="([^":]+)"', shown.decode())
        missing = [part for part in parts if ask("GET", f"/{part}")[0] != 200]
        if status != 200 or missing or not parts:
            sys.exit(f"{page} was answered with {status}; missing of what it loads: {', '.join(missing) or 'all'}")
    print("the pages of the API's document are whole")


def main() -> None:
    bento, kernels = Path(os.environ["BENTO_PATH"]), Path(os.environ["NUMBA_CACHE_DIR"])
    if "--answers" in sys.argv:
        answers(bento)
        pages()
        return
    server = subprocess.Popen(["bentoml", "serve", str(bento), "--port", str(PORT)])
    try:
        until_ready(server)
        answers(bento)
        pages()
    finally:
        server.terminate()
        server.wait(60)
    compiled = sorted(path for path in kernels.rglob("*") if path.is_file())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in compiled)).hexdigest()
    (kernels / "digest").write_text(digest + "\n")
    print(f"{len(compiled)} files of compiled kernels, {digest}")


if __name__ == "__main__":
    main()
