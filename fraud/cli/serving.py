"""`fraud try`: a first request to a running service."""

from __future__ import annotations

import ipaddress
import shlex
import time
import uuid
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Console

from fraud.errors import NotReady, SettingsError
from fraud.models.find import IN_PRODUCTION, load_bundle

if TYPE_CHECKING:
    import httpx

app = typer.Typer()
out = Console(soft_wrap=True)


@app.command("try")
def try_(
    url: Annotated[str, typer.Option(help="Where the service listens.")] = "http://localhost:3000",
    model: Annotated[
        str,
        typer.Option(help="Whose golden request is sent: a bundle folder, or NAME[:REF]; what is served if none."),
    ] = IN_PRODUCTION,
    wait: Annotated[float, typer.Option(min=0, help="How long to wait for the service to be ready, seconds.")] = 60.0,
    key: Annotated[str | None, typer.Option(envvar="FRAUD_API_KEY", help="An API key, where one is needed.")] = None,
) -> None:
    """Send a first request, and print it as a curl line with its answer.

    The request is one of the model's golden requests under a new transaction id.
    """
    import httpx

    golden: dict[str, Any] = msgspec.json.decode(load_bundle(model).golden[0].instance)
    body = msgspec.json.encode({"instances": [golden | {"transaction_id": f"try-{uuid.uuid4().hex[:8]}"}]}).decode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    with httpx.Client(base_url=url, timeout=10.0, trust_env=not _is_this_machine(url)) as client:
        _wait(client, wait)
        answer = client.post("/predict", content=body, headers=headers)
    shown = " ".join(f"-H {shlex.quote(f'{name}: {value}')}" for name, value in headers.items())
    typer.echo(f"curl -s {url}/predict {shown} -d {shlex.quote(body)}")
    typer.echo(answer.text)
    if answer.is_error:
        raise typer.Exit(1)


def _is_this_machine(url: str) -> bool:
    """Whether a URL names this machine, so that a proxy from the environment (HTTP_PROXY) must be bypassed."""
    import httpx

    host = httpx.URL(url).host
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _wait(client: httpx.Client, seconds: float) -> None:
    import httpx

    deadline = time.monotonic() + seconds
    while True:
        try:
            answer = client.get("/readyz")
            if answer.is_success:
                return
            reason = answer.text
        except httpx.UnsupportedProtocol:
            raise SettingsError(f"--url {str(client.base_url)!r}: give one such as http://localhost:3000") from None
        except httpx.TransportError as error:
            reason = str(error)
        if time.monotonic() > deadline:
            raise NotReady(f"{client.base_url} is not ready after {seconds:g} s: {reason}")
        time.sleep(0.2)
