"""What the server remembers: projects, runs, artifact collections with versions and aliases, and stored bytes."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

ENTITY = "fraud-team"


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class Run:
    project: Project
    name: str
    number: int
    display_name: str = ""
    state: str = "running"
    config: str = "{}"
    job_type: str = ""
    group: str = ""
    notes: str = ""
    tags: list[str] = field(default_factory=list)
    commit: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    streams: dict[str, dict[int, str]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    used: list[Artifact] = field(default_factory=list)
    created: str = field(default_factory=now)

    def lines(self, stream: str) -> list[str]:
        return [line for _, line in sorted(self.streams.get(stream, {}).items())]

    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines("wandb-history.jsonl")]


@dataclass
class Artifact:
    collection: Collection
    number: int
    digest: str
    run: Run | None
    metadata: str | None
    description: str | None
    wanted_aliases: list[str]
    state: str = "PENDING"
    version: int | None = None
    manifest_key: str | None = None
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    created: str = field(default_factory=now)
    updated: str | None = None
    client_id: str | None = None

    @property
    def id(self) -> str:
        return f"artifact-{self.number}"


@dataclass
class Collection:
    project: Project
    name: str
    type: str
    number: int
    versions: list[Artifact] = field(default_factory=list)
    aliases: dict[str, Artifact] = field(default_factory=dict)
    created: str = field(default_factory=now)

    @property
    def id(self) -> str:
        return f"collection-{self.number}"

    def committed(self) -> list[Artifact]:
        return [a for a in self.versions if a.state == "COMMITTED"]

    def find(self, alias: str) -> Artifact | None:
        if alias in self.aliases:
            return self.aliases[alias]
        return next((a for a in self.committed() if f"v{a.version}" == alias), None)


@dataclass
class Project:
    name: str
    entity: str
    number: int
    runs: dict[str, Run] = field(default_factory=dict)
    collections: dict[str, Collection] = field(default_factory=dict)
    created: str = field(default_factory=now)

    @property
    def id(self) -> str:
        return f"project-{self.number}"


class State:
    """All of it, behind one lock that a request holds."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.projects: dict[tuple[str, str], Project] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.manifests: dict[str, Artifact] = {}
        self.blobs: dict[str, bytes] = {}
        self.expected_md5: dict[str, str] = {}
        self._next = 0

    def number(self) -> int:
        self._next += 1
        return self._next

    def project(self, name: str, entity: str | None, create: bool = False) -> Project | None:
        key = (entity or ENTITY, name)
        if key not in self.projects and create:
            self.projects[key] = Project(name, key[0], self.number())
        return self.projects.get(key)

    def run_by_id(self, run_id: str) -> Run | None:
        runs = (run for project in self.projects.values() for run in project.runs.values())
        return next((run for run in runs if f"run-{run.number}" == run_id), None)

    def collection_by_id(self, collection_id: str) -> Collection | None:
        found = (c for project in self.projects.values() for c in project.collections.values())
        return next((c for c in found if c.id == collection_id), None)

    def apply_stream(self, run: Run, body: dict[str, Any]) -> None:
        """Apply lines by their offset, so that a retried request changes nothing."""
        for name, chunk in (body.get("files") or {}).items():
            if name == "wandb-summary.json":
                for line in chunk["content"]:
                    run.summary = json.loads(line)
                continue
            lines = run.streams.setdefault(name, {})
            for i, line in enumerate(chunk["content"]):
                lines[chunk["offset"] + i] = line
        if body.get("complete"):
            run.state = "finished" if body.get("exitcode", 0) == 0 else "failed"

    def commit(self, artifact: Artifact) -> None:
        """Make a version of an uploaded artifact; again does nothing. A file that never came is refused."""
        if artifact.state == "COMMITTED":
            return
        if artifact.manifest_key is None or artifact.manifest_key not in self.blobs:
            raise ValueError("the artifact's manifest was never uploaded")
        contents = json.loads(self.blobs[artifact.manifest_key])["contents"]
        for path, entry in contents.items():
            if "ref" not in entry and f"md5/{entry['digest']}" not in self.blobs:
                raise ValueError(f"file {path!r} was never uploaded")
        artifact.entries = contents
        artifact.state = "COMMITTED"
        artifact.version = max((a.version for a in artifact.collection.versions if a.version is not None), default=-1)
        artifact.version += 1
        self.set_aliases(artifact, artifact.wanted_aliases)

    def set_aliases(self, artifact: Artifact, aliases: list[str]) -> None:
        for alias in aliases:
            artifact.collection.aliases[alias] = artifact

    def delete(self, artifact: Artifact) -> None:
        artifact.state = "DELETED"
        aliases = artifact.collection.aliases
        for alias in [a for a, target in aliases.items() if target is artifact]:
            del aliases[alias]
