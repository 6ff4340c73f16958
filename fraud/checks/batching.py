"""`fraud verify batching`: concurrent callers, some bad, slow or huge; each must get its own answer."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from rich.console import Console

from fraud.checks.sandbox import Client, Sandbox, connected, fresh, quantile, sandbox
from fraud.models.find import IN_PRODUCTION

VARIANTS = 64
BAD_AMOUNTS: tuple[Any, ...] = (None, -1.0, 0, "12", True, [1.0])

app = typer.Typer(no_args_is_help=True)
out = Console(soft_wrap=True, highlight=False)


@dataclass
class Batched:
    """The figures of one run."""

    users: int = 0
    requests: int = 0
    rows: int = 0
    bad_rows: int = 0
    slow: int = 0
    huge: int = 0
    shed: int = 0
    different: list[str] = field(default_factory=list)
    wrongly_refused: list[str] = field(default_factory=list)
    wrongly_taken: list[str] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return not (self.different or self.wrongly_refused or self.wrongly_taken)


def _percent(text: str) -> float:
    share = float(text.removesuffix("%")) / (100.0 if text.endswith("%") else 1.0)
    if not 0 <= share < 1:
        raise typer.BadParameter("give a share such as 5% or 0.05")
    return share


@app.command()
def batching(
    users: Annotated[int, typer.Option(min=2, help="Callers at the same time, each on a connection of his own.")] = 200,
    bad: Annotated[Any, typer.Option(parser=_percent, metavar="SHARE", help="Share of the rows that are bad.")] = "5%",
    requests: Annotated[int, typer.Option(min=1, help="Requests of each caller, one after another.")] = 10,
    model: Annotated[
        str, typer.Option(help="A bundle folder, or NAME[:REF]; what is in production if none.")
    ] = IN_PRODUCTION,
    workers: Annotated[int, typer.Option(min=1)] = 1,
    seed: Annotated[int, typer.Option()] = 1,
) -> None:
    """Compare every answer given under load with the answer that the same row gets alone.

    No two rows share a customer, so a row's score depends on the row alone. Some callers send their bodies byte by
    byte, and some send 1,000 rows. Only bad rows may be refused, each with its own path.
    """
    with sandbox(model, workers) as box:
        result = asyncio.run(measure_batching(box, users, bad, requests, seed))
    out.print(
        f"{result.users} users, {result.requests} requests, {result.rows} rows, {result.bad_rows} of them bad; "
        f"{result.slow} requests sent slowly, {result.huge} of 1,000 rows; "
        f"answered 503 and sent again {result.shed}\n"
        f"answers other than alone {len(result.different)}, good rows refused {len(result.wrongly_refused)}, "
        f"bad rows taken or refused elsewhere {len(result.wrongly_taken)}\n"
        f"p50 {1000 * quantile(result.latencies_s, 0.5):.1f} ms, p99 {1000 * quantile(result.latencies_s, 0.99):.1f} ms"
    )
    for what in (result.different + result.wrongly_refused + result.wrongly_taken)[:5]:
        out.print(what, style="red", markup=False)
    if not result.holds:
        raise typer.Exit(1)


async def measure_batching(box: Sandbox, users: int, bad: float, requests: int, seed: int) -> Batched:
    """Ask for each row alone, then for all of them at once."""
    await box.start()
    rng = random.Random(seed)
    amount = "amount" if "amount" in box.instances[0] else _numeric(box.instances[0])
    variants = []
    for n in range(VARIANTS):
        instance = dict(rng.choice(box.instances))
        instance[amount] = round(abs(float(instance[amount] or 1.0)) * rng.uniform(0.2, 5.0) + 0.01 * n, 2)
        variants.append(instance)
    async with connected(box.port) as client:
        alone = [_said((await _ask(client, [fresh(variant)]))[1]["predictions"][0]) for variant in variants]
    result = Batched(users)

    async def user(number: int) -> None:
        draw = random.Random(f"{seed}/{number}")
        async with connected(box.port) as client:
            for _ in range(requests):
                kind = draw.choices(("small", "slow", "huge"), (96, 3, 1))[0]
                picked = [
                    draw.randrange(VARIANTS) for _ in range(1000 if kind == "huge" else draw.choice((1, 1, 1, 3, 8)))
                ]
                rows, is_bad = [], []
                for pick in picked:
                    is_bad.append(draw.random() < bad)
                    wrong = {amount: draw.choice(BAD_AMOUNTS)} if is_bad[-1] else {}
                    rows.append(fresh(variants[pick], **wrong))
                started = time.perf_counter()
                status, answer = await _ask(client, rows, slowly=kind == "slow")
                while status == 503:  # full: refused at once, so it retries after Retry-After
                    result.shed += 1
                    await asyncio.sleep(draw.uniform(0.1, 1.0))
                    started = time.perf_counter()
                    status, answer = await _ask(client, rows, slowly=kind == "slow")
                if kind == "small":
                    result.latencies_s.append(time.perf_counter() - started)
                result.requests += 1
                result.slow += kind == "slow"
                result.huge += kind == "huge"
                result.rows += len(rows)
                result.bad_rows += sum(is_bad)
                _compare(result, status, answer, rows, is_bad, [alone[pick] for pick in picked], amount)

    await asyncio.gather(*(user(number) for number in range(users)))
    return result


def _compare(
    result: Batched,
    status: int,
    answer: Any,
    rows: list[dict[str, Any]],
    is_bad: list[bool],
    expected: list[Any],
    amount: str,
) -> None:
    if all(is_bad):
        found = answer.get("errors", []) if status == 422 else []
    elif status == 200:
        found = answer["predictions"]
    else:
        result.wrongly_refused.append(f"{status} {json.dumps(answer)[:300]}")
        return
    if len(found) != len(rows):
        result.wrongly_taken.append(
            f"{len(rows)} rows sent, {len(found)} answered: {status} {json.dumps(answer)[:300]}"
        )
        return
    for i, (row, answered, bad, alone) in enumerate(zip(rows, found, is_bad, expected, strict=True)):
        if bad:
            error = answered.get("error", answered)
            if not str(error.get("path", "")).startswith(f"$.instances[{i}]"):
                result.wrongly_taken.append(f"{row[amount]!r}: {json.dumps(answered)[:300]}")
        elif "error" in answered:
            result.wrongly_refused.append(json.dumps(answered)[:300])
        elif answered["transaction_id"] != row["transaction_id"] or _said(answered) != alone:
            result.different.append(f"alone {alone}, together {json.dumps(answered)[:300]}")


def _said(prediction: dict[str, Any]) -> Any:
    return {name: value for name, value in prediction.items() if name != "transaction_id"}


async def _ask(client: Client, rows: list[dict[str, Any]], *, slowly: bool = False) -> tuple[int, Any]:
    body = json.dumps({"instances": rows}).encode()
    if not slowly:
        status, answer = await client.ask("POST", "/predict", body)
        return status, json.loads(answer)
    head = "POST /predict HTTP/1.1\r\nhost: s\r\ncontent-type: application/json\r\n"
    client.writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode())
    step = max(1, len(body) // 20)
    for begin in range(0, len(body), step):
        client.writer.write(body[begin : begin + step])
        await asyncio.sleep(0.02)
    status, answer = await client.answer()
    return status, json.loads(answer)


def _numeric(instance: dict[str, Any]) -> str:
    """Return the name of a feature that is a number, for a model without amounts."""
    return next(name for name, value in instance.items() if type(value) in (int, float))
