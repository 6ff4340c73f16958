"""Calls W&B through its SDK in a child process that can be killed.

The SDK retries for minutes and can hang on a silent server, so every call runs in a child process with a time limit,
after which its process group is killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fraud.errors import FraudError
from wandb_sync.scratch import scratch
from wandb_sync.settings import WandbSettings


class WandbError(FraudError):
    """W&B did not do what was asked; the change `what` stays queued and can be sent later."""

    http_status = 503
    code = "wandb"


class WandbOffline(WandbError):
    """No key, WANDB_MODE=offline, or no SDK installed: no call was made."""


class WandbUnreachable(WandbError):
    """No answer, a late answer, or a server error."""


class WandbRefused(WandbError):
    """The key, its permissions or the request were refused: a retry will not help."""


class WandbMissing(WandbError):
    """There is no such project, artifact or alias."""


_KINDS = {"unreachable": WandbUnreachable, "refused": WandbRefused, "missing": WandbMissing}


class WandbClient:
    """The SDK's operations that this project needs, each bounded in time.

    Parameters
    ----------
    settings : WandbSettings
    """

    def __init__(self, settings: WandbSettings) -> None:
        self.settings = settings

    def look_up(self, operation: str, **arguments: Any) -> Any:
        """Run `operation` of wandb_sync.sdk within the limit for look-ups."""
        return self._online(operation, self.settings.look_up_timeout_s, arguments)

    def transfer(self, operation: str, **arguments: Any) -> Any:
        """Run `operation` of wandb_sync.sdk within the limit for uploads and downloads."""
        return self._online(operation, self.settings.transfer_timeout_s, arguments)

    def offline(self, operation: str, root: Path, **arguments: Any) -> Any:
        """Run an `operation` that writes under `root` and asks no server."""
        return self._call(operation, self.settings.transfer_timeout_s, arguments, root, "offline")

    def request(self, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """The request that the SDK's process reads."""
        return {
            "operation": operation,
            "arguments": arguments,
            "max_file_bytes": self.settings.max_file_bytes,
            "api_timeout_s": int(self.settings.look_up_timeout_s),
        }

    def _online(self, operation: str, timeout_s: float, arguments: dict[str, Any]) -> Any:
        if not self.settings.online:
            raise WandbOffline(f"W&B is off ({self.settings.offline_because}): {operation} was not asked")
        with scratch(self.settings.home) as root:
            return self._call(operation, timeout_s, arguments, root, "online")

    def _call(self, operation: str, timeout_s: float, arguments: dict[str, Any], root: Path, mode: str) -> Any:
        code, output, errors = run_bounded(
            self.settings.environment(root) | {"WANDB_MODE": mode},
            json.dumps(self.request(operation, arguments)) + "\n",
            timeout_s,
        )
        if code is None:
            raise WandbUnreachable(f"W&B at {self.settings.base_url}: {operation} took more than {timeout_s:g} s")
        answer = json.loads(output) if output.strip() else {}
        if "error" in answer:
            kind = _KINDS.get(answer["error"]["kind"], WandbError)
            raise kind(f"W&B at {self.settings.base_url}: {operation}: {answer['error']['message']}")
        if code != 0 or "result" not in answer:
            last = errors.strip().splitlines()[-1:] or ["no message"]
            raise WandbError(f"W&B: {operation} ended with exit code {code}: {last[0]}")
        return answer["result"]


def run_bounded(environment: dict[str, str], text: str, timeout_s: float) -> tuple[int | None, str, str]:
    """Run the SDK's process; return (exit code, stdout, stderr), exit code None if it was killed at its limit."""
    with sdk_process(environment) as process:
        try:
            output, errors = process.communicate(text, timeout=timeout_s)
            return process.returncode, output, errors
        except subprocess.TimeoutExpired:
            return None, "", ""


@contextmanager
def sdk_process(environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """The SDK's process in its own process group, which is ended with this block or this process."""
    child_end, own_end = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "wandb_sync.sdk", str(child_end)],
        env=environment,
        pass_fds=(child_end,),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    os.close(child_end)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # the whole group may have ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(own_end)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
