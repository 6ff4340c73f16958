"""The folder of a finished training; read as untrusted, like the bundle in it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from fraud.errors import DataError
from fraud.models.bundle import Bundle, read_bundle
from fraud.models.plain_files import MIB, expect_plain_tree, read_plain

MAX_RUN_BYTES, MAX_RUN_JSON_BYTES = 512 * MIB, 4 * MIB
RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Measured(msgspec.Struct):
    """A measure with its 95% interval."""

    value: float
    low: float
    high: float


class RunFacts(msgspec.Struct):
    """The required fields of `run.json`; further fields are shown on the dashboard."""

    bundle_digest: str
    name: str
    kind: str
    created: str
    config: dict[str, Any]
    dataset: RunData
    metrics: dict[str, Measured]
    baseline: dict[str, Measured]
    timings_s: dict[str, float]


class RunData(msgspec.Struct):
    """The file that a model was trained on."""

    name: str
    digest: str


@dataclass(frozen=True)
class RunFolder:
    """A finished run on disk with its checked bundle.

    Attributes
    ----------
    run_id : str
        Its W&B run id: that of the watched training, or else derived from its contents.
    """

    path: Path
    facts: dict[str, Any]
    bundle: Bundle
    run_id: str

    @property
    def bundle_path(self) -> Path:
        return self.path / "bundle"


def read_run(path: Path) -> RunFolder:
    """Read a run folder; a DataError or BundleError says what is wrong with it."""
    if not (path / "run.json").is_file():
        raise DataError(f"{path} is no run folder: it has no run.json")
    expect_plain_tree(path, MAX_RUN_BYTES)  # all of it is copied, and sent to W&B: nothing that a link leads to
    content = read_plain(path / "run.json", MAX_RUN_JSON_BYTES)
    try:
        facts = json.loads(content)  # Python's JSON: a measure of no sample is NaN
        said = msgspec.convert(facts, RunFacts)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise DataError(f"{path}/run.json cannot be read: {error}") from None
    bundle = read_bundle(path / "bundle")
    if said.bundle_digest != bundle.digest:
        raise DataError(f"{path}/run.json names bundle {said.bundle_digest}, its bundle folder is {bundle.digest}")
    watched = path / "wandb-run-id"
    run_id = hashlib.sha256(content).hexdigest()[:12]
    if watched.is_file():
        run_id = read_plain(watched, 100).decode(errors="replace").strip()
        if not RUN_ID.fullmatch(run_id):
            raise DataError(f"{watched} holds {run_id!r}; a run id has 1 to 64 letters, digits, - and _")
    return RunFolder(path, facts, bundle, run_id)
