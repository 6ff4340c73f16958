"""The HTTP side: GraphQL, the runs' file stream, uploads and downloads, each subject to the active faults."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from graphql import GraphQLError, OperationDefinitionNode, parse

from tests.wandb_server.faults import Fault, Faults
from tests.wandb_server.graphql import QueryError, execute
from tests.wandb_server.schema import Schema
from tests.wandb_server.state import State

STREAM = re.compile(r"^/files/([^/]+)/([^/]+)/([^/]+)/file_stream$")
DOWNLOAD = re.compile(r"^/artifactsV2/.+/([0-9a-f]{32})/[^/]+$")


class WandbServer:
    """A server on a free port of 127.0.0.1, in threads of this process.

    Attributes
    ----------
    state : State
        What clients stored, for a test to look at.
    faults : Faults
        What goes wrong on the way.
    requests : list of str
        The label of each request, in order of arrival.
    errors : list of str
        GraphQL errors answered: empty when the SDK asked only for what is known here.
    """

    API_KEY = "k" * 40

    def __init__(self) -> None:
        self.state = State()
        self.faults = Faults()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"server_": self}))
        self._http.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self.schema = Schema(self.state, self.base_url)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> WandbServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_: WandbServer

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        self._handle("GET")

    def do_PUT(self) -> None:
        self._handle("PUT")

    def do_POST(self) -> None:
        self._handle("POST")

    def _handle(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        path = unquote(self.path.split("?")[0])
        label = f"{method} {path}"
        if path == "/graphql":
            label += " " + ",".join(root_fields(json.loads(body)["query"]))
        self.server_.requests.append(label)
        fault = self.server_.faults.take(label)
        if fault and self._disturb(fault):
            return
        with self.server_.state.lock:
            status, answer, content_type = self._answer(method, path, body)
        if fault and fault.action == "kill_after":
            os.killpg(fault.pid, signal.SIGKILL)
        if fault and fault.action in ("kill_after", "cut_after"):
            self._cut()
            return
        if fault and fault.action == "corrupt":
            answer = bytes([answer[0] ^ 1]) + answer[1:]
        length = len(answer)
        if fault and fault.action == "truncate":
            answer = answer[: length // 2]
            length = len(answer)
        self._send(status, answer, content_type, length)

    def _disturb(self, fault: Fault) -> bool:
        """Apply what comes before the request is handled; True when it is not to be handled at all."""
        if fault.action == "kill_before":
            os.killpg(fault.pid, signal.SIGKILL)
            self._cut()
            return True
        if fault.action == "status":
            self._send(fault.status, b'{"errors":[{"message":"injected"}]}', "application/json")
            return True
        if fault.action == "cut":
            self._cut()
            return True
        if fault.action == "slow":
            time.sleep(fault.delay_s)
        return False

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _send(self, status: int, body: bytes, content_type: str, length: int | None = None) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            if status >= 429:
                self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client was killed or gave up: nobody is left to answer

    def _answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes, str]:
        state = self.server_.state
        if path == "/graphql":
            return self._graphql(json.loads(body))
        if method == "POST" and (match := STREAM.match(path)):
            project = state.project(match[2], match[1])
            if project is None or match[3] not in project.runs:
                return 404, b"{}", "application/json"
            state.apply_stream(project.runs[match[3]], json.loads(body))
            return 200, b"{}", "application/json"
        if path.startswith("/storage/"):
            return self._storage(method, path.removeprefix("/storage/"), body)
        if match := DOWNLOAD.match(path):
            return self._storage("GET", "md5/" + base64.b64encode(bytes.fromhex(match[1])).decode(), b"")
        return 404, f"no such address: {method} {path}".encode(), "text/plain"

    def _graphql(self, request: dict[str, Any]) -> tuple[int, bytes, str]:
        credentials = self.headers.get("Authorization", "").removeprefix("Basic ")
        if base64.b64decode(credentials).decode().partition(":")[2] != WandbServer.API_KEY:
            return 401, b'{"errors":[{"message":"user is not logged in"}]}', "application/json"
        try:
            data = execute(
                request["query"],
                request.get("operationName") or None,
                request.get("variables") or {},
                self.server_.schema.root(),
            )
        except (QueryError, GraphQLError, ValueError, KeyError) as error:
            self.server_.errors.append(f"{type(error).__name__}: {error}")
            answer = {"data": None, "errors": [{"message": str(error), "path": getattr(error, "path", None)}]}
            return 200, json.dumps(answer).encode(), "application/json"
        return 200, json.dumps({"data": data}).encode(), "application/json"

    def _storage(self, method: str, key: str, body: bytes) -> tuple[int, bytes, str]:
        state = self.server_.state
        if method == "GET":
            if key not in state.blobs:
                return 404, b"no such file", "text/plain"
            return 200, state.blobs[key], "application/octet-stream"
        digest = base64.b64encode(hashlib.md5(body).digest()).decode()
        if state.expected_md5.get(key, digest) != digest:
            return 400, b"the content does not have its MD5", "text/plain"
        state.blobs[key] = body
        return 200, b"", "text/plain"


def root_fields(query: str) -> list[str]:
    """Names of the fields that a document asks of the root, whatever its aliases."""
    document = parse(query, no_location=True)
    operation = next(node for node in document.definitions if isinstance(node, OperationDefinitionNode))
    names = [getattr(node, "name", None) for node in operation.selection_set.selections]
    return [name.value for name in names if name is not None]
