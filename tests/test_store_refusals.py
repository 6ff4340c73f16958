"""Servers that answer "no" are off like servers that are gone; a wrong URL or password is said, and not shown."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
import redis.asyncio

from fraud.checks.audit import verify_chain
from fraud.checks.servers import free_port
from fraud.errors import NotReady, SettingsError, StoreDown, StoreError
from fraud.models.scorer import Scorer
from fraud.pipeline.batching import MicroBatcher
from fraud.pipeline.decide import Pipeline
from fraud.serving.engine import Engine
from fraud.settings import Settings
from fraud.stores.opening import StoreOptions, check_store, open_log, open_store
from fraud.stores.postgres_connection import connect, is_pooled, translated
from fraud.stores.protocol import Store, described
from tests.servers import PgBouncer, Postgres, Redis, Server, running, wait_until
from tests.test_store_acknowledged import degraded, on_record, tiered
from tests.test_store_faults import until_back
from tests.test_stores import alone, assert_same_states, of_run, score
from tests.tiny import transactions

PATIENT_MS = 5_000.0


def redis_says(*commands: str) -> Callable[[Server], None]:
    def say(server: Server) -> None:
        client = redis.Redis(port=server.port, password="pa55")  # taken where none is asked for, too
        with client:
            for command in commands:
                client.execute_command(*command.split(" "))  # type: ignore[no-untyped-call]

    return say


def postgres_says(*statements: str) -> Callable[[Server], None]:
    def say(server: Server) -> None:
        with psycopg.connect(server.url, autocommit=True) as db:
            for statement in statements:
                db.execute(statement.encode())

    return say


def postgres_refuses(*statements: str) -> Callable[[Server], None]:
    """What a server refuses, it refuses in new connections: those that are there are ended."""
    return postgres_says(
        *statements, "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE usename = 'app'"
    )


async def until_said(store: Store, name: str, reason: str) -> None:
    """Wait for the reason of an outage: the first one may be that the connection was ended."""
    async with asyncio.timeout(20):
        while True:
            shown = described(store.health())
            assert shown["status"] == "degraded"
            (outage,) = shown["stores"]
            assert outage["store"] == name
            if reason in outage["reason"]:
                return
            await asyncio.sleep(0.02)


def fail_to_save(server: Server) -> None:
    """Let Redis save its data where it cannot: since then it takes no writes (MISCONF)."""
    (server.folder / "dump.rdb").mkdir()
    with redis.Redis(port=server.port) as client:
        client.config_set("save", "3600 1")
        client.bgsave()
        wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")


def save_no_more(server: Server) -> None:
    with redis.Redis(port=server.port) as client:
        client.config_set("save", "")
    (server.folder / "dump.rdb").rmdir()


def become_standby(server: Server) -> None:
    """Start PostgreSQL again as a hot standby, which answers reads alone."""
    assert isinstance(server, Postgres)
    server.kill()
    (server.data / "standby.signal").touch()
    server.start()


def become_primary(server: Server) -> None:
    with psycopg.connect(server.url, autocommit=True) as db:
        db.execute("SELECT pg_promote()")


REDIS_REFUSES = {
    "READONLY": (redis_says("REPLICAOF 127.0.0.1 1"), redis_says("REPLICAOF NO ONE"), "read only replica"),
    "OOM": (redis_says("CONFIG SET maxmemory 1"), redis_says("CONFIG SET maxmemory 0"), "maxmemory"),
    "NOREPLICAS": (
        redis_says("CONFIG SET min-replicas-to-write 1"),
        redis_says("CONFIG SET min-replicas-to-write 0"),
        "NOREPLICAS",
    ),
    "NOPERM": (redis_says("ACL SETUSER default -evalsha"), redis_says("ACL SETUSER default +@all"), "no permissions"),
    "NOAUTH": (
        redis_says("CONFIG SET requirepass pa55", "CLIENT KILL TYPE normal SKIPME yes"),
        redis_says("CONFIG SET requirepass "),
        "uthentication required",
    ),
    "MISCONF": (fail_to_save, save_no_more, "MISCONF"),
}
POSTGRES_REFUSES = {
    "25006 hot standby": (become_standby, become_primary, "read-only transaction"),
    "53100 disk full": (  # no disk is filled here: the server says so as it does then, to the first write
        postgres_refuses(
            "CREATE FUNCTION fraud.full() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE disk_full USING MESSAGE = 'could not extend file: No space left on device'; END $$",
            "CREATE TRIGGER disk BEFORE INSERT ON fraud.decisions EXECUTE FUNCTION fraud.full()",
        ),
        postgres_says("DROP FUNCTION fraud.full CASCADE"),
        "No space left on device",
    ),
    "25006 read-only": (
        postgres_refuses("ALTER ROLE app SET default_transaction_read_only = on"),
        postgres_says("ALTER ROLE app RESET default_transaction_read_only"),
        "read-only transaction",
    ),
    "42501 permission denied": (
        postgres_refuses("REVOKE INSERT ON fraud.decisions, fraud.customers FROM app"),
        postgres_says("GRANT INSERT ON fraud.decisions, fraud.customers TO app"),
        "permission denied",
    ),
    "53300 too many connections": (
        postgres_refuses("ALTER ROLE app CONNECTION LIMIT 0"),
        postgres_says("ALTER ROLE app CONNECTION LIMIT -1"),
        "too many connections",
    ),
    "28000 no such role": (
        postgres_refuses("ALTER ROLE app NOLOGIN"),
        postgres_says("ALTER ROLE app LOGIN"),
        "not permitted to log in",
    ),
}


@pytest.fixture(scope="module")
def app_url(postgres_server: Server) -> str:
    """A PostgreSQL whose user is no superuser, and not the owner of what a superuser made."""
    with psycopg.connect(postgres_server.url, autocommit=True) as db:
        db.execute("CREATE ROLE app LOGIN")
    asyncio.run(check_store(postgres_server.url, StoreOptions()))  # makes the schema
    with psycopg.connect(postgres_server.url, autocommit=True) as db:
        db.execute("GRANT USAGE ON SCHEMA fraud TO app")
        db.execute("GRANT ALL ON ALL TABLES IN SCHEMA fraud TO app")
        db.execute("GRANT ALL ON ALL SEQUENCES IN SCHEMA fraud TO app")
    return postgres_server.url.replace("//fraud@", "//app@")


@pytest.mark.parametrize("refusal", REDIS_REFUSES)
def test_a_redis_that_refuses_is_off(
    refusal: str, scorer: Scorer, redis_server: Server, postgres_server: Server
) -> None:
    """With PostgreSQL behind it nothing is missing; alone it is missed as one that is gone."""
    refuse, relent, reason = REDIS_REFUSES[refusal]

    async def run() -> None:
        both = open_store(redis_server.url, tiered(redis_server, postgres_server))
        alone_ = open_store(redis_server.url, StoreOptions(budget_ms=PATIENT_MS))
        for store, name in ((both, "both"), (alone_, "alone")):
            pipeline = Pipeline({"m": scorer}, store)
            instances = of_run(f"{refusal}-{name}", transactions(9, 71, customers=2, merchants=1))
            assert await degraded(pipeline, instances[:3]) == [[]] * 3
            await asyncio.to_thread(refuse, redis_server)
            try:
                missing: list[str] = [] if store is both else ["record"]
                (first,) = await degraded(pipeline, instances[3:4])  # whose history may still be read
                assert first[-1:] == missing
                missing = [] if store is both else ["history", "record"]
                assert await degraded(pipeline, instances[4:6]) == [missing] * 2
                if store is both:
                    assert await on_record(postgres_server.url, instances[3:6]) == [True] * 3
                await until_said(store, "redis", reason)
                assert store.stats().off["redis"] == 1
                await asyncio.sleep(0.3)  # several probes: it does not come back before it takes what is recorded
                assert store.stats().outages["redis"] == 1
            finally:
                await asyncio.to_thread(relent, redis_server)
            await until_back(store)
            assert described(pipeline.store.health())["status"] == "ready"
            assert await degraded(pipeline, instances[6:]) == [[]] * 3
            await assert_same_states(store, alone(scorer, instances)[1])
            await pipeline.close()

    asyncio.run(run())


@pytest.mark.parametrize("refusal", POSTGRES_REFUSES)
def test_a_postgresql_that_refuses_is_off(
    refusal: str, scorer: Scorer, redis_server: Server, postgres_server: Server, app_url: str
) -> None:
    refuse, relent, reason = POSTGRES_REFUSES[refusal]

    async def run() -> None:
        options = StoreOptions(cold_store=app_url, budget_ms=PATIENT_MS, cold_budget_ms=PATIENT_MS)
        behind = open_store(redis_server.url, options)
        alone_ = open_store(app_url, StoreOptions(cold_budget_ms=PATIENT_MS))
        for store, name in ((behind, "behind"), (alone_, "alone")):
            pipeline = Pipeline({"m": scorer}, store)
            instances = of_run(f"{refusal}-{name}", transactions(9, 72, customers=2, merchants=1))
            assert await degraded(pipeline, instances[:3]) == [[]] * 3
            await asyncio.to_thread(refuse, postgres_server)
            try:
                for answer in await degraded(pipeline, instances[3:6]):
                    assert answer[-1:] == ["record"]
                await until_said(store, "postgresql", reason)
            finally:
                await asyncio.to_thread(relent, postgres_server)
            await until_back(store)
            assert described(pipeline.store.health())["status"] == "ready"
            assert await degraded(pipeline, instances[6:]) == [[]] * 3
            await assert_same_states(store, alone(scorer, instances)[1])
            assert await on_record(postgres_server.url, instances) == [True] * 9
            await pipeline.close()

    asyncio.run(run())


def test_a_redis_that_reads_its_data_at_its_start_is_off(scorer: Scorer, redis_server: Server) -> None:
    assert isinstance(redis_server, Redis)
    redis_server.forget_all()  # it reads five keys a second

    async def run() -> None:
        store = open_store(redis_server.url, StoreOptions(budget_ms=PATIENT_MS))
        pipeline = Pipeline({"m": scorer}, store)
        instances = of_run("loading", transactions(20, 75, customers=2, merchants=1))
        assert await degraded(pipeline, instances[:8]) == [[]] * 8
        with redis.Redis(port=redis_server.port) as client:  # a file that is read key by key
            client.bgrewriteaof()
            wait_until(lambda: not client.info("persistence")["aof_rewrite_in_progress"])
        await asyncio.to_thread(redis_server.kill)
        redis_server.options = ("--key-load-delay", "200000", "--loading-process-events-interval-bytes", "1024")
        starting = asyncio.create_task(asyncio.to_thread(redis_server.start))
        assert await degraded(pipeline, instances[8:12]) == [["history", "record"]] * 4
        await until_said(store, "redis", "redis refuses: Redis is loading the dataset in memory")
        await starting
        redis_server.options = ()
        await until_back(store)
        assert await degraded(pipeline, instances[12:]) == [[]] * 8
        await assert_same_states(store, alone(scorer, instances)[1])
        await pipeline.close()

    asyncio.run(run())


def test_what_postgresql_says_is_an_outage_or_the_batch_alone() -> None:
    errors = psycopg.errors
    for error in map(translated, (errors.DiskFull("no"), errors.AdminShutdown("no"), errors.OutOfMemory("no"))):
        assert isinstance(error, StoreDown)
        assert not error.is_permanent
    for error in map(translated, (errors.InvalidPassword("no"), errors.InsufficientPrivilege("no"))):
        assert isinstance(error, StoreDown)
        assert error.is_permanent
    for error in map(translated, (errors.UntranslatableCharacter("no"), errors.NotNullViolation("no"))):
        assert not isinstance(error, StoreDown)


def test_a_full_queue_is_unready_and_says_why(scorer: Scorer) -> None:
    async def run() -> None:
        store = open_store(f"redis://127.0.0.1:{free_port()}/0", StoreOptions(queue=1))
        pipeline = Pipeline({"m": scorer}, store)
        engine = Engine()
        engine.start(pipeline, MicroBatcher(pipeline.decide_requests))
        assert engine.expect_ready()["status"] == "ready"  # nobody has asked it anything yet
        assert await degraded(pipeline, transactions(1, 73)) == [["history", "record"]]
        assert engine.readiness()["status"] == "refusing"
        with pytest.raises(NotReady, match=r"1 decisions wait for redis; redis is off since 20.*: redis cannot be rea"):
            engine.expect_ready()
        engine.stop()
        await pipeline.close()

    asyncio.run(run())


@pytest.fixture(scope="module")
def pool(postgres_server: Server) -> Iterator[Server]:
    with running(partial(PgBouncer, postgres_port=postgres_server.port)) as server:
        yield server


@pytest.mark.parametrize("durable", [True, False])
def test_behind_pgbouncer_everything_is_recorded(durable: bool, scorer: Scorer, pool: Server) -> None:
    """Four workers over two pooled connections, more statements each than psycopg runs before it prepares them."""

    async def run() -> None:
        options = StoreOptions(cold_budget_ms=PATIENT_MS, durable=durable)
        pipelines = [Pipeline({"m": scorer}, open_store(pool.url, options)) for _ in range(4)]
        instances = of_run(f"pool{durable}", transactions(120, 74, customers=30, merchants=8))

        async def send(number: int) -> None:
            for instance in instances[number::4]:
                assert await degraded(pipelines[number], [instance]) == [[]]

        await asyncio.gather(*(send(number) for number in range(4)))
        for pipeline in pipelines:
            assert described(pipeline.store.health())["status"] == "ready"
            assert pipeline.store.stats().outages == {"postgresql": 0}
        await assert_same_states(pipelines[0].store, alone(scorer, instances)[1])
        assert await on_record(pool.url, instances) == [True] * 120
        for pipeline in pipelines:
            await pipeline.close()

    asyncio.run(run())
    log = open_log(pool.url, Path())
    assert verify_chain(log, b"").rows >= 120


def test_a_pool_is_noticed_by_what_psycopg_tells_of_a_connection(postgres_server: Server, pool: Server) -> None:
    async def prepares(server: Server) -> bool:
        db = await connect(server.url)
        async with db:
            return not is_pooled(db)

    assert asyncio.run(prepares(postgres_server))
    assert not asyncio.run(prepares(pool))


def test_a_connection_that_is_refused_comes_without_sqlstate(postgres_server: Server) -> None:
    """Why PERMANENT_WORDS reads what servers say: should psycopg begin to tell the state, it is to be used instead."""
    for url in (postgres_server.url.replace("//fraud@", "//nobody@"), Postgres.url_at(free_port())):
        with pytest.raises(psycopg.OperationalError) as caught:
            psycopg.connect(url)
        assert caught.value.sqlstate is None


def test_redis_reads_the_options_of_a_url_when_it_makes_a_connection() -> None:
    """Not before, and by `make_connection`, which connects to nothing: what `RedisStore` relies on."""
    client = redis.asyncio.Redis.from_url("redis://127.0.0.1:1/0?no_such_option=1")
    with pytest.raises(TypeError, match="no_such_option"):
        client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    redis.asyncio.Redis.from_url("redis://127.0.0.1:1/0").connection_pool.make_connection()  # type: ignore[no-untyped-call]


SECRETS = ("sw0rd", "s3cret", "hunter")
AMBIGUOUS = (
    "://u:s3cret@sw0rd@host/0",
    "://u:s3cret/sw0rd@host/0",
    "://u:s3cret%sw0rd@host/0",
    "://u:s3cret?sw0rd@host/0",
    "://u:s3cret#sw0rd@host/0",
    "://u:hunter2@host:port/0",
    "://u:12/sw0rd@host/0",
    "://u:hunter2@host/0?sw0rd=1",
    ":u:hunter2@host/0",
)


@pytest.mark.parametrize("rest", AMBIGUOUS)
@pytest.mark.parametrize("scheme", ["redis", "postgresql"])
def test_an_ambiguous_url_is_refused_and_not_shown(scheme: str, rest: str) -> None:
    url = scheme + rest
    asked: list[Callable[[], Any]] = [lambda: open_store(url)]
    if scheme == "postgresql":
        asked += [lambda: open_store("redis://h/0", StoreOptions(cold_store=url)), lambda: open_log(url, Path())]
    for ask in asked:
        with pytest.raises(SettingsError) as caught:
            ask()
        assert not [secret for secret in SECRETS if secret in str(caught.value)], caught.value


@pytest.mark.parametrize(
    "url",
    [
        "redis://h/0",
        "rediss://:p%40%2F%25%3A@[::1]:6379/15",
        "redis://h:6379",
        "unix:///run/redis.sock?db=2",
        "postgresql://u:p%40%2F%25%3A%23@h:5432/d",
        "postgresql://u:p@h1:5432,h2/d?target_session_attrs=read-write&sslmode=require",
        "postgresql:///d?host=/run/postgresql",
        "postgres://u:a:b@h/d",
    ],
)
def test_a_url_that_is_clear_is_taken(url: str) -> None:
    open_store(url)


def test_a_cold_store_is_a_postgresql() -> None:
    with pytest.raises(SettingsError, match=r"^cold store mysql:…; allowed: postgresql://user@host/db$"):
        open_store("redis://h/0", StoreOptions(cold_store="mysql://u:s3cret@h/d"))


def test_no_part_of_a_store_is_shown_with_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAUD_STORE", "redis://:s3cret@h/0")
    monkeypatch.setenv("FRAUD_COLD_STORE", "postgresql://u:hunter2@h/d")
    settings = Settings.read()
    shown = repr(settings) + repr(StoreOptions.of(settings))
    assert not [secret for secret in SECRETS if secret in shown]


@contextmanager
def password(server: Server) -> Iterator[None]:
    redis_says("CONFIG SET requirepass pa55")(server)
    try:
        yield
    finally:
        redis_says("CONFIG SET requirepass ")(server)


def test_what_waiting_cannot_mend_is_said_at_start(
    redis_server: Server, postgres_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    here = f"127.0.0.1:{postgres_server.port}"
    refused = {
        f"postgresql://nobody:hunter2@{here}/postgres": "does not exist",
        f"postgresql://fraud:hunter2@{here}/nowhere": "does not exist",
        redis_server.url.replace("//", "//:hunter2@"): "invalid username-password pair",
        redis_server.url: "uthentication required",
        redis_server.url.replace("//", "//:pa55@").replace("/0", "/99"): "DB index is out of range",
    }
    with password(redis_server):
        for url, reason in refused.items():
            with pytest.raises(SettingsError, match=reason) as caught:
                asyncio.run(check_store(url, StoreOptions()))
            assert not [secret for secret in (*SECRETS, "pa55") if secret in str(caught.value) + caplog.text]
        asyncio.run(check_store(redis_server.url.replace("//", "//:pa55@"), StoreOptions()))


def test_a_server_that_is_only_away_is_waited_for() -> None:
    started = time.monotonic()
    for url in (f"redis://127.0.0.1:{free_port()}/0", Postgres.url_at(free_port())):
        asyncio.run(check_store(url, StoreOptions()))
    assert time.monotonic() - started < 5


def test_a_table_that_is_damaged_refuses_the_batch_and_no_more(scorer: Scorer, redis_server: Server) -> None:
    """A key of another kind, put there by somebody else, is no outage: the others are scored."""

    async def run() -> None:
        store = open_store(redis_server.url, StoreOptions(budget_ms=PATIENT_MS))
        pipeline = Pipeline({"m": scorer}, store)
        bad, good = of_run("kind", transactions(2, 75, customers=2, merchants=2))
        redis_says(f"LPUSH fraud:1:c:{bad['customer_id']} x")(redis_server)
        with pytest.raises(StoreError, match="redis refused: WRONGTYPE"):
            await score(pipeline, [bad])
        if good["customer_id"] != bad["customer_id"]:
            assert await degraded(pipeline, [good]) == [[]]
        assert described(pipeline.store.health())["status"] == "ready"
        await pipeline.close()

    asyncio.run(run())
