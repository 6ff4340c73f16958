"""A private server for the checks that swap, break and kill: a real `bentoml serve` on copies of the model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httptools
import msgspec
import numpy as np
import psutil

from fraud.checks.servers import ROOT, free_port
from fraud.decisions.policy import Policy
from fraud.environment import child_environment
from fraud.errors import NotReady
from fraud.models.bento_store import BentoStore
from fraud.models.bundle import Bundle, canonical_json, read_manifest, write_bundle
from fraud.models.find import load_bundle
from fraud.models.registry import PRODUCTION, Registry
from fraud.models.scorer import scores_of
from fraud.settings import ModelSettings, ProcessSettings, Settings

START_S = 120.0
PORT_TAKEN = "Address already in use"
PORT_TRIES = 3
"""BentoML picks free ports and binds them later; under load another process may have taken one by then."""


@dataclass
class Sandbox:
    """A server on a free port, with its own Bento store, registry and state folder, all removed at the end.

    The store holds two versions of one model, which differ in calibrator and policy; the first is in production.
    """

    folder: Path
    name: str
    digests: list[str]
    instances: list[dict[str, Any]]
    workers: int
    environment: Mapping[str, str] = field(default_factory=dict)
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def registry(self) -> Registry:
        return Registry(self.folder / "fraud" / "registry.db")

    @property
    def store(self) -> BentoStore:
        return BentoStore(self.folder)

    @property
    def log(self) -> Path:
        return self.folder / "state" / "history.db"

    def promote(self, digest: str) -> None:
        self.registry.move(self.name, digest, PRODUCTION[0], who="fraud verify", why="")

    def settings(self) -> Settings:
        return Settings(
            process=ProcessSettings(state_dir=self.folder / "state"),
            models=ModelSettings(FRAUD_MODEL=self.name, BENTOML_HOME=self.folder),
        )

    async def start(self) -> None:
        """Start the server and wait until it is ready.

        Raises
        ------
        NotReady
            It ended or did not become ready in `START_S`; its last lines are in the message.
        """
        for _ in range(PORT_TRIES):
            written = self._launch()
            if await self._ready():
                return
            said = (self.folder / "server.log").read_bytes()[written:].decode(errors="replace")
            if PORT_TAKEN not in said:
                break
        raise NotReady(f"the server did not start:\n{said[-3000:]}")

    def _launch(self) -> int:
        """Start the process of the server on a free port; return how long its log was before."""
        self.port = free_port()
        changes = {
            "BENTOML_HOME": str(self.folder),
            "BENTOML_DO_NOT_TRACK": "True",
            "FRAUD_MODEL": self.name,
            "FRAUD_MODEL_ALIASES": ",".join(PRODUCTION),
            "FRAUD_MODEL_VERSION": "",
            "FRAUD_STATE_DIR": str(self.folder / "state"),
            "FRAUD_WORKERS": str(self.workers),
            "FRAUD_MODEL_POLL_S": "0.2",
            **self.environment,
        }
        command = [sys.executable, "-m", "bentoml", "serve", "service:FraudBento", "--host", "127.0.0.1"]
        with (self.folder / "server.log").open("ab") as log:
            written = log.tell()
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)],
                cwd=ROOT,
                env=child_environment(changes),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return written

    async def _ready(self) -> bool:
        """Wait until the server is ready; false if it ended, or is not ready in time."""
        assert self.process is not None
        deadline = time.monotonic() + START_S
        while self.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                async with connected(self.port) as client:
                    if (await client.ask("GET", "/readyz"))[0] == 200:
                        return True
            await asyncio.sleep(0.1)
        return False

    def worker_pids(self) -> list[int]:
        """Return the processes that answer requests."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child.pid for child in children if any("worker" in part for part in child.cmdline())]

    def kill(self) -> None:
        """Kill all processes of the server at once, as a power cut would; workers survive the kill of their parent."""
        if self.process is None or self.process.poll() is not None:
            return
        server = psutil.Process(self.process.pid)
        server.suspend()  # it would start the workers again that are killed before it
        doomed = [*server.children(recursive=True), server]
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(doomed, timeout=10)
        self.process = None


@contextmanager
def sandbox(model: str, workers: int = 2, environment: Mapping[str, str] | None = None) -> Iterator[Sandbox]:
    """Make a sandbox from a bundle folder or NAME[:REF]; its server is not started yet, and is ended at the end."""
    first = load_bundle(model)
    with tempfile.TemporaryDirectory(prefix="fraud-verify-") as folder:
        home = Path(folder)
        digests = []
        for i, bundle in enumerate((first, harsher(first))):
            written = home / f"bundle{i}"
            write_again(bundle, written)
            digest, manifest = read_manifest(written)
            BentoStore(home).import_bundle(written, {})
            registry = Registry(home / "fraud" / "registry.db")
            registry.register(manifest.name, digest, manifest.preprocessor_digest, who="fraud verify")
            digests.append(digest)
        instances = [json.loads(bytes(golden.instance)) for golden in first.golden]
        box = Sandbox(home, first.manifest.name, digests, instances, workers, environment or {})
        box.promote(digests[0])
        try:
            yield box
        finally:
            box.kill()


def harsher(bundle: Bundle) -> Bundle:
    """Return a bundle whose answers differ from this one's: lower decision scores, lower thresholds."""
    files = bundle.algorithm.vary(bundle.detector_files)
    detector = bundle.algorithm.load(files, len(bundle.spec.features))
    scores = scores_of(detector, np.array([g.raw_margin for g in bundle.golden]))
    golden = tuple(
        msgspec.structs.replace(g, fraud_probability=score.fraud_probability)
        for g, score in zip(bundle.golden, scores.rows(), strict=True)
    )
    old = bundle.policy
    policy: Policy = msgspec.structs.replace(
        old, review_threshold=0.5 * old.review_threshold, decline_threshold=0.5 * old.decline_threshold
    )
    return replace(bundle, detector_files=files, golden=golden, policy=policy)


def write_again(bundle: Bundle, folder: Path) -> None:
    """Write a parsed bundle as a folder."""
    parts: dict[str, bytes] = {
        "features.json": canonical_json(bundle.spec),
        "preprocessor.json": canonical_json(bundle.preprocessor),
        **bundle.detector_files,
        "policy.json": canonical_json(bundle.policy),
        "model_card.md": b"# A copy for `fraud verify`\n",
        "metrics.json": canonical_json(bundle.metrics),
        "reference.json": canonical_json(bundle.reference),
        "golden.jsonl": b"".join(msgspec.json.encode(g) + b"\n" for g in bundle.golden),
    }
    manifest = bundle.manifest
    write_bundle(
        folder,
        parts,
        algorithm=bundle.algorithm,
        name=manifest.name,
        kind=manifest.kind,
        libraries=manifest.libraries,
        data=manifest.data,
        seed=manifest.seed,
        git_commit=manifest.git_commit,
    )


def answered_score(row: Mapping[str, Any]) -> float:
    """Return the score of an answered row that its verdict was made on."""
    probability: float | None = row["fraud_probability"]
    return float(row["anomaly"]["score"]) if probability is None else probability


def fresh(instance: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """Return an instance as a new transaction: another id, and a customer and merchant without history."""
    identity = uuid.uuid4().hex
    changed = {**instance, "transaction_id": f"t-{identity}"}
    for name in ("customer_id", "merchant_id"):
        if name in instance:
            changed[name] = f"{name[0]}-{identity}"
    return {**changed, **fields}


class Client:
    """One connection to a server, kept open; asks one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer
        self._body = bytearray()
        self._complete = False
        self._headers_only = False

    async def ask(self, method: str, path: str, body: bytes = b"", headers: str = "") -> tuple[int, bytes]:
        """Send a request and return the answer's status and body.

        Raises
        ------
        OSError
            The server is not there, or went away.
        """
        self._headers_only = method == "HEAD"
        head = f"{method} {path} HTTP/1.1\r\nhost: s\r\ncontent-type: application/json\r\n{headers}"
        self.writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        return await self.answer()

    async def answer(self) -> tuple[int, bytes]:
        self._body.clear()
        self._complete = False
        parser = httptools.HttpResponseParser(self)
        while not self._complete:
            data = await self._reader.read(65536)
            if not data:
                raise ConnectionResetError("the server closed the connection")
            parser.feed_data(data)
        return parser.get_status_code(), bytes(self._body)

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_headers_complete(self) -> None:
        self._complete = self._headers_only

    def on_message_complete(self) -> None:
        self._complete = True


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


def quantile(values: list[float], q: float) -> float:
    """Return the q-quantile, the nearest value above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0
