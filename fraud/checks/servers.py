"""Real servers for the checks that kill them: Apache Kafka, Redis, PostgreSQL, and processes of `fraud stream`."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import msgspec
import psutil
import psycopg
import redis
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

import fraud
from fraud.environment import child_environment
from fraud.errors import NotReady

ROOT = Path(fraud.__file__).parent.parent
START_S = 60.0
SERVER_PORTS = range(10_000, 32_000)
PORTS = itertools.islice(itertools.cycle(SERVER_PORTS), os.getpid() * 500 % len(SERVER_PORTS), None)
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port() -> int:
    """Return a port that nobody has, below those that the system gives to clients, which may take one before a server.

    Each process goes through them from a place of its own.

    Raises
    ------
    NotReady
        No port is free.
    """
    for port in itertools.islice(PORTS, len(SERVER_PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise NotReady("no port is free")


def program(name: str) -> str:
    """Return the path of a server's program; raises `NotReady` if it is not installed."""
    found = shutil.which(name)
    packaged = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)
    if found is None and not packaged:
        raise NotReady(f"{name} is not installed; on Debian: apt-get install redis-server postgresql default-jre maven")
    return found or str(packaged[0])


class Killable:
    """One server in a folder that survives its death.

    Parameters
    ----------
    name : str
        For messages, and of its log.
    command : sequence of str
    answers : callable
        Whether it answers.
    folder : Path
    environment : mapping, optional
        Changes of this process's.
    user : str, optional
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        answers: Callable[[], bool],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        user: str | None = None,
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._command = command
        self._answers = answers
        self._environment = child_environment(environment or {})
        self._user = user

    def begin(self) -> Self:
        """Start it, without waiting."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, env=self._environment, cwd=ROOT, stdout=log, stderr=log, user=self._user
            )
        return self

    def start(self) -> Self:
        self.begin()
        self.wait()
        return self

    def wait(self) -> None:
        """Wait until it answers; raises `NotReady` if it does not."""
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self.process is None or self.process.poll() is not None or time.monotonic() > deadline:
                raise NotReady(f"{self.name} did not start:\n{self.log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """`kill -9` of it and its children."""
        if self.process is None or self.process.poll() is not None:
            return
        server = psutil.Process(self.process.pid)
        for doomed in (server, *server.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                doomed.kill()
        self.process.wait()


def kafka_server(folder: Path, jars: Path) -> tuple[Killable, str]:
    """Return a Kafka of one node from its published jars, and its address."""
    if not jars.is_dir():
        raise NotReady(f"{jars}: no jars of Apache Kafka; with Java 17 and Maven: make .venv/kafka.done")
    program("java")
    port, controller = free_port(), free_port()
    address = f"127.0.0.1:{port}"

    def answers() -> bool:
        with suppress(KafkaException):
            return bool(AdminClient({"bootstrap.servers": address, "log_level": 0}).list_topics(timeout=1).brokers)
        return False

    script = ROOT / "scripts" / "kafka" / "start.sh"
    command = ["sh", str(script), str(jars), str(folder / "kafka"), str(port), str(controller)]
    return Killable("kafka", command, answers, folder), address


def redis_server(folder: Path) -> tuple[Killable, str]:
    """Return a Redis that keeps what it answered, and its URL."""
    port = free_port()

    def answers() -> bool:
        client = redis.Redis(port=port, socket_timeout=1)
        try:
            return bool(client.ping())
        except redis.exceptions.RedisError:
            return False
        finally:
            client.close()

    options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "yes"]
    command = [program("redis-server"), *options, "--appendfsync", "no"]
    return Killable("redis", command, answers, folder), f"redis://127.0.0.1:{port}/0"


def postgres_server(folder: Path) -> tuple[Killable, str]:
    """Return a PostgreSQL, and its URL."""
    port, data = free_port(), folder / "postgres"
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = None if os.getuid() else "postgres" if "postgres" in names else "nobody"
    data.mkdir()
    folder.chmod(0o755)
    if user is not None:
        shutil.chown(data, user)
    init = [program("initdb"), "-D", str(data), "-U", "fraud", "-A", "trust", "-N", "--no-locale", "-E", "UTF8"]
    subprocess.run(init, check=True, capture_output=True, user=user, cwd="/")
    url = f"postgresql://fraud@127.0.0.1:{port}/postgres"

    def answers() -> bool:
        with suppress(psycopg.OperationalError):
            psycopg.connect(url, connect_timeout=1).close()
            return True
        return False

    options = ["-k", str(data), "-h", "127.0.0.1", "-p", str(port), "-c", "shared_buffers=32MB"]
    return Killable("postgres", [program("postgres"), "-D", str(data), *options], answers, folder, user=user), url


class StreamWorker(Killable):
    """One process of `fraud stream`."""

    def __init__(self, name: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.port = free_port()
        command = [sys.executable, "-c", "from fraud.cli.main import main; main()", "stream"]
        own = {"FRAUD_STREAM_PORT": str(self.port), "FRAUD_STREAM_INSTANCE": name}
        super().__init__(name, command, self._reads, folder, {**environment, **own})

    def health(self) -> dict[str, Any]:
        """Return what `/readyz` says; nothing if nobody answers."""
        try:
            with DIRECT.open(f"http://127.0.0.1:{self.port}/readyz", timeout=2) as answer:
                found: dict[str, Any] = msgspec.json.decode(answer.read())
                return found
        except OSError:
            return {}

    def _reads(self) -> bool:
        return bool(self.health().get("partitions"))
