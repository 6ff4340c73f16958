"""The objects that GraphQL sees, built from the state, and the mutations that change it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from tests.wandb_server.state import ENTITY, Artifact, Collection, Project, Run, State, now

Object = dict[str, Any]

FEATURES = (
    "ARTIFACT_TAGS",
    "CLIENT_IDS",
    "LARGE_FILENAMES",
    "USE_ARTIFACT_WITH_ENTITY_AND_PROJECT_INFORMATION",
    "PROJECT_ARTIFACT_COLLECTION_MEMBERSHIP",
    "ARTIFACT_COLLECTION_MEMBERSHIP_FILES",
    "ARTIFACT_V2_DOWNLOAD_HANDLER_SUPPORTS_ARTIFACT_ID",
    "ARTIFACT_COLLECTIONS_FILTERING_SORTING",
    "TOTAL_COUNT_IN_FILE_CONNECTION",
)


class Schema:
    """Resolvers over one state; `base_url` is where uploads and downloads go."""

    def __init__(self, state: State, base_url: str) -> None:
        self.state = state
        self.base_url = base_url

    def root(self) -> Object:
        mutations: dict[str, Callable[..., Object]] = {
            "upsertBucket": self.upsert_bucket,
            "createArtifact": self.create_artifact,
            "createArtifactManifest": self.create_manifest,
            "updateArtifactManifest": self.update_manifest,
            "createArtifactFiles": self.create_files,
            "commitArtifact": self.commit_artifact,
            "useArtifact": self.use_artifact,
            "addAliases": self.add_aliases,
            "deleteAliases": self.delete_aliases,
            "updateArtifact": self.update_artifact,
            "deleteArtifact": self.delete_artifact,
            "createRunFiles": self.create_run_files,
        }
        return {
            "__typename": "Query",
            "serverInfo": {
                "__typename": "ServerInfo",
                "features": [{"__typename": "ServerFeature", "name": f, "isEnabled": True} for f in FEATURES],
                "cliVersionInfo": "{}",
            },
            "viewer": self.viewer(),
            "entity": lambda name: self.entity(name),
            "project": lambda name, entityName=None: self.project(self.state.project(name, entityName)),
            "model": lambda name, entityName=None: self.project(self.state.project(name, entityName)),
            "artifact": lambda id: self.artifact(self.state.artifacts.get(id)),  # noqa: A006
            "artifactCollection": lambda id: self.collection(self.state.collection_by_id(id)),  # noqa: A006
            "clientIDMapping": self.client_id_mapping,
            **{name: (lambda input, do=do: do(**input)) for name, do in mutations.items()},  # noqa: A006
        }

    # Reading

    def viewer(self) -> Object:
        return {
            "__typename": "User",
            "id": "user-1",
            "name": ENTITY,
            "username": ENTITY,
            "email": "",
            "admin": False,
            "flags": "{}",
            "entity": ENTITY,
            "deletedAt": None,
            "defaultEntity": self.entity(ENTITY),
            "apiKeys": connection("ApiKey", []),
            "teams": connection("Entity", []),
        }

    def entity(self, name: str) -> Object:
        return {
            "__typename": "Entity",
            "id": f"entity-{name}",
            "name": name,
            "isTeam": False,
            "organization": None,
            "xxhashDigestsEnabled": False,
        }

    def client_id_mapping(self, clientID: str) -> Object | None:
        found = next((a for a in self.state.artifacts.values() if a.client_id == clientID), None)
        return {"__typename": "ClientIDMapping", "serverID": found.id} if found else None

    def project(self, project: Project | None) -> Object | None:
        if project is None:
            return None

        def run(name: str, missingOk: bool = False) -> Object | None:
            return self.run(project.runs.get(name))

        def membership(name: str) -> Object | None:
            collection_name, _, alias = name.partition(":")
            collection = project.collections.get(collection_name)
            return self.membership(collection, alias or "latest") if collection else None

        def artifact(name: str) -> Object | None:
            found = membership(name)
            return found["artifact"] if found else None

        def runs(filters: str | None = None, **page: Any) -> Object:
            return connection("Run", [self.run(run) for run in project.runs.values()], **page)

        def artifact_type(name: str) -> Object | None:
            return self.artifact_type(project, name) if name in types else None

        types = sorted({c.type for c in project.collections.values()})
        return {
            "__typename": "Project",
            "id": project.id,
            "internalId": str(project.number),
            "name": project.name,
            "entity": self.entity(project.entity),
            "createdAt": project.created,
            "readOnly": False,
            "run": run,
            "bucket": run,
            "runs": runs,
            "runCount": lambda filters=None: len(project.runs),
            "artifact": artifact,
            "artifactCollectionMembership": membership,
            "artifactCollection": lambda name: self.collection(project.collections.get(name)),
            "artifactCollections": lambda filters=None, **page: connection(
                "ArtifactCollection", [self.collection(c) for c in project.collections.values()], **page
            ),
            "artifactType": artifact_type,
            "artifactTypes": lambda **page: connection(
                "ArtifactType", [self.artifact_type(project, name) for name in types], **page
            ),
        }

    def artifact_type(self, project: Project, name: str) -> Object:
        def collections(filters: str | None = None, **page: Any) -> Object:
            found = [self.collection(c) for c in project.collections.values() if c.type == name]
            return connection("ArtifactCollection", found, **page)

        def collection(name: str) -> Object | None:
            return self.collection(project.collections.get(name))

        return {
            "__typename": "ArtifactType",
            "id": f"type-{name}",
            "name": name,
            "description": "",
            "createdAt": project.created,
            "artifactCollection": collection,
            "artifactCollections": collections,
        }

    def run(self, run: Run | None) -> Object | None:
        if run is None:
            return None
        history = run.history()
        keys = {key: {"typeCounts": [{"type": "number", "count": 1}]} for row in history for key in row}

        def rows(minStep: int = 0, maxStep: int = 1 << 40, samples: int = 0) -> list[str]:
            return [json.dumps(row) for row in history if minStep <= row["_step"] < maxStep]

        def wandb_config(keys: list[str]) -> str:
            internal = json.loads(run.config).get("_wandb", {}).get("value", {})
            return json.dumps({key: internal[key] for key in keys if key in internal})

        def files(names: Sequence[str] = (), pattern: str | None = None, **page: Any) -> Object:
            found = [self.run_file(run, name) for name in run.files if not names or name in names]
            return connection("File", found, **page)

        logged = [a for a in self.state.artifacts.values() if a.run is run and a.state == "COMMITTED"]
        return {
            "__typename": "Run",
            "id": f"run-{run.number}",
            "projectId": run.project.number,
            "project": self.project_info(run.project),
            "name": run.name,
            "displayName": run.display_name or run.name,
            "state": run.state,
            "config": run.config,
            "wandbConfig": wandb_config,
            "group": run.group,
            "jobType": run.job_type,
            "commit": run.commit,
            "tags": run.tags,
            "notes": run.notes,
            "description": "",
            "readOnly": False,
            "stopped": False,
            "sweepName": None,
            "createdAt": run.created,
            "heartbeatAt": run.created,
            "user": {"__typename": "User", "name": ENTITY, "username": ENTITY},
            "summaryMetrics": json.dumps(run.summary),
            "systemMetrics": (run.lines("wandb-events.jsonl") or ["{}"])[-1],
            "historyLineCount": len(history),
            "eventsLineCount": len(run.lines("wandb-events.jsonl")),
            "logLineCount": len(run.lines("output.log")),
            "historyTail": json.dumps(run.lines("wandb-history.jsonl")[-1:]),
            "eventsTail": json.dumps(run.lines("wandb-events.jsonl")[-1:]),
            "historyKeys": {"keys": keys, "lastStep": max((r["_step"] for r in history), default=-1)},
            "history": rows,
            "sampledHistory": lambda specs: [history for _ in specs],
            "parquetHistory": lambda liveKeys: {
                "__typename": "ParquetHistory",
                "parquetUrls": [],
                "liveData": history,
            },
            "events": lambda samples=0: run.lines("wandb-events.jsonl"),
            "fileCount": len(run.files),
            "files": files,
            "inputArtifacts": lambda **page: connection("Artifact", [self.artifact(a) for a in run.used], **page),
            "outputArtifacts": lambda **page: connection("Artifact", [self.artifact(a) for a in logged], **page),
        }

    def run_file(self, run: Run, name: str) -> Object:
        url = f"{self.base_url}/storage/{run.files[name]}"
        body = self.state.blobs.get(run.files[name], b"")
        return {
            "__typename": "File",
            "id": f"file-{name}",
            "name": name,
            "displayName": name,
            "url": lambda upload=False: url,
            "directUrl": url,
            "uploadUrl": url,
            "sizeBytes": len(body),
            "mimetype": None,
            "updatedAt": run.created,
            "md5": None,
        }

    def project_info(self, project: Project) -> Object:
        return {
            "__typename": "Project",
            "id": project.id,
            "internalId": str(project.number),
            "name": project.name,
            "entity": self.entity(project.entity),
        }

    def collection(self, collection: Collection | None) -> Object | None:
        if collection is None:
            return None

        def artifacts(order: str | None = None, filters: str | None = None, **page: Any) -> Object:
            newest_first = sorted(collection.committed(), key=lambda a: -(a.version or 0))
            found = connection("VersionedArtifact", [self.artifact(a) for a in newest_first], **page)
            for edge in found["edges"]:
                edge["version"] = f"v{edge['node']['versionIndex']}"
            return found

        def latest() -> Object | None:
            target = collection.aliases.get("latest")
            return self.artifact(target)

        return {
            "__typename": "ArtifactSequence",
            "id": collection.id,
            "name": collection.name,
            "description": None,
            "createdAt": collection.created,
            "updatedAt": None,
            "project": self.project_info(collection.project),
            "defaultArtifactType": {"__typename": "ArtifactType", "name": collection.type},
            "tags": connection("Tag", []),
            "digestAlgorithm": "MANIFEST_MD5",
            "latestArtifact": latest,
            "artifacts": artifacts,
            "artifactMembership": lambda aliasName: self.membership(collection, aliasName),
            "aliases": lambda **page: connection(
                "ArtifactAlias", [self.alias(collection, name) for name in collection.aliases], **page
            ),
        }

    def alias(self, collection: Collection, name: str) -> Object:
        return {
            "__typename": "ArtifactAlias",
            "id": f"alias-{collection.number}-{name}",
            "alias": name,
            "artifactCollection": lambda: self.collection(collection),
        }

    def membership(self, collection: Collection, alias: str) -> Object | None:
        artifact = collection.find(alias)
        if artifact is None:
            return None

        def files(names: Sequence[str] | None = None, **page: Any) -> Object:
            found = [
                self.artifact_file(path, entry)
                for path, entry in artifact.entries.items()
                if "ref" not in entry and (not names or path in names)
            ]
            return connection("File", found, **page)

        return {
            "__typename": "ArtifactCollectionMembership",
            "id": f"membership-{artifact.number}",
            "versionIndex": artifact.version,
            "createdAt": artifact.created,
            "aliases": [self.alias(collection, n) for n, a in collection.aliases.items() if a is artifact],
            "artifactCollection": lambda: self.collection(collection),
            "artifact": self.artifact(artifact),
            "files": files,
        }

    def artifact_file(self, path: str, entry: dict[str, Any]) -> Object:
        url = f"{self.base_url}/storage/md5/{entry['digest']}"
        return {
            "__typename": "File",
            "id": f"file-{path}",
            "name": path,
            "displayName": path,
            "url": url,
            "directUrl": url,
            "sizeBytes": entry["size"],
            "storagePath": f"md5/{entry['digest']}",
            "mimetype": None,
            "updatedAt": None,
            "digest": entry["digest"],
            "md5": entry["digest"],
        }

    def artifact(self, artifact: Artifact | None) -> Object | None:
        if artifact is None:
            return None
        collection = artifact.collection
        users = [
            self.run(run)
            for project in self.state.projects.values()
            for run in project.runs.values()
            if artifact in run.used
        ]
        manifest_url = f"{self.base_url}/storage/{artifact.manifest_key}"
        return {
            "__typename": "Artifact",
            "id": artifact.id,
            "artifactSequence": lambda: self.collection(collection),
            "versionIndex": artifact.version,
            "artifactType": {"__typename": "ArtifactType", "name": collection.type},
            "description": artifact.description,
            "metadata": artifact.metadata,
            "ttlDurationSeconds": -1,
            "ttlIsInherited": True,
            "tags": [],
            "historyStep": None,
            "state": artifact.state,
            "size": sum(entry.get("size", 0) for entry in artifact.entries.values()),
            "digest": artifact.digest,
            "digestAlgorithm": "MANIFEST_MD5",
            "commitHash": str(artifact.number),
            "fileCount": len(artifact.entries),
            "createdAt": artifact.created,
            "updatedAt": artifact.updated,
            "aliases": [self.alias(collection, n) for n, a in collection.aliases.items() if a is artifact],
            "createdBy": lambda: self.run(artifact.run),
            "usedBy": lambda: connection("Run", users),
            "currentManifest": {
                "__typename": "ArtifactManifest",
                "id": f"manifest-{artifact.number}",
                "file": {"__typename": "File", "directUrl": manifest_url},
            },
        }

    # Writing

    def upsert_bucket(
        self,
        id: str | None = None,  # noqa: A002
        name: str | None = None,
        modelName: str | None = None,
        entityName: str | None = None,
        config: str | None = None,
        summaryMetrics: str | None = None,
        **changes: Any,
    ) -> Object:
        run = self.state.run_by_id(id) if id else None
        inserted = False
        if run is None:
            project = self.state.project(modelName or "uncategorized", entityName, create=True)
            assert project is not None
            key = name or f"run{self.state.number()}"
            inserted = key not in project.runs
            run = project.runs.setdefault(key, Run(project, key, self.state.number()))
        if config is not None:
            run.config = config
        if summaryMetrics is not None:
            run.summary = json.loads(summaryMetrics)
        names = {"displayName": "display_name", "groupName": "group", "jobType": "job_type"}
        for field in ("displayName", "groupName", "jobType", "notes", "tags", "commit", "state"):
            if changes.get(field):
                setattr(run, names.get(field, field), changes[field])
        return {"__typename": "UpsertBucketPayload", "bucket": self.run(run), "inserted": inserted}

    def create_artifact(
        self,
        artifactTypeName: str,
        projectName: str,
        digest: str,
        artifactCollectionName: str | None = None,
        artifactCollectionNames: list[str] | None = None,
        entityName: str | None = None,
        runName: str | None = None,
        aliases: list[dict[str, str]] | None = None,
        metadata: str | None = None,
        description: str | None = None,
        clientID: str | None = None,
        enableDigestDeduplication: bool = True,
        **_: Any,
    ) -> Object:
        project = self.state.project(projectName, entityName, create=True)
        assert project is not None
        name = artifactCollectionName or (artifactCollectionNames or [""])[0]
        collection = project.collections.get(name)
        if collection is None:
            collection = Collection(project, name, artifactTypeName, self.state.number())
            project.collections[name] = collection
        if collection.type != artifactTypeName:
            raise ValueError(f"artifact {name!r} is of type {collection.type!r}, not {artifactTypeName!r}")
        names = [alias["alias"] for alias in aliases or []]
        known = next((a for a in collection.versions if a.digest == digest and a.state != "DELETED"), None)
        if known is not None and enableDigestDeduplication:
            if known.state == "COMMITTED":
                self.state.set_aliases(known, names)
            else:
                known.wanted_aliases = names
                known.client_id = clientID
            return {"__typename": "CreateArtifactPayload", "artifact": self.artifact(known)}
        run = project.runs.get(runName) if runName else None
        artifact = Artifact(collection, self.state.number(), digest, run, metadata, description, names)
        artifact.client_id = clientID
        collection.versions.append(artifact)
        self.state.artifacts[artifact.id] = artifact
        return {"__typename": "CreateArtifactPayload", "artifact": self.artifact(artifact)}

    def create_manifest(self, artifactID: str, digest: str, **_: Any) -> Object:
        artifact = self.state.artifacts[artifactID]
        self.state.manifests[f"manifest-{artifact.number}"] = artifact
        return self._manifest("CreateArtifactManifestPayload", artifact, digest)

    def update_manifest(self, artifactManifestID: str, digest: str | None = None, **_: Any) -> Object:
        artifact = self.state.manifests[artifactManifestID]
        return self._manifest("UpdateArtifactManifestPayload", artifact, digest or "")

    def _manifest(self, typename: str, artifact: Artifact, digest: str) -> Object:
        key = f"manifest/{artifact.number}/{digest or 'draft'}"
        if digest:
            artifact.manifest_key = key
        return {
            "__typename": typename,
            "artifactManifest": {
                "__typename": "ArtifactManifest",
                "id": f"manifest-{artifact.number}",
                "file": {
                    "__typename": "File",
                    "id": f"file-{key}",
                    "uploadUrl": f"{self.base_url}/storage/{key}",
                    "uploadHeaders": [],
                },
            },
        }

    def create_files(self, artifactFiles: list[dict[str, Any]], **_: Any) -> Object:
        nodes = []
        for spec in artifactFiles:
            key = f"md5/{spec['md5']}"
            self.state.expected_md5[key] = spec["md5"]
            nodes.append(
                {
                    "__typename": "File",
                    "id": f"file-{key}",
                    "name": spec["name"],
                    "displayName": spec["name"],
                    "storagePath": key,
                    "uploadUrl": None if key in self.state.blobs else f"{self.base_url}/storage/{key}",
                    "uploadHeaders": [f"Content-MD5:{spec['md5']}"],
                    "uploadMultipartUrls": None,
                    "artifact": {"__typename": "Artifact", "id": spec["artifactID"]},
                }
            )
        edges = [{"__typename": "FileEdge", "node": node} for node in nodes]
        return {
            "__typename": "CreateArtifactFilesPayload",
            "files": {"__typename": "FileConnection", "edges": edges},
        }

    def commit_artifact(self, artifactID: str, **_: Any) -> Object:
        artifact = self.state.artifacts[artifactID]
        self.state.commit(artifact)
        return {"__typename": "CommitArtifactPayload", "artifact": self.artifact(artifact)}

    def use_artifact(
        self,
        artifactID: str,
        runName: str,
        projectName: str,
        entityName: str | None = None,
        **_: Any,
    ) -> Object:
        project = self.state.project(projectName, entityName)
        if project is None or runName not in project.runs:
            raise ValueError(f"run {runName!r} does not exist")
        artifact = self.state.artifacts[artifactID]
        if artifact not in project.runs[runName].used:
            project.runs[runName].used.append(artifact)
        return {"__typename": "UseArtifactPayload", "artifact": self.artifact(artifact)}

    def add_aliases(self, artifactID: str, aliases: list[dict[str, str]], **_: Any) -> Object:
        self.state.set_aliases(self.state.artifacts[artifactID], [alias["alias"] for alias in aliases])
        return {"__typename": "AddAliasesPayload", "success": True}

    def delete_aliases(self, artifactID: str, aliases: list[dict[str, str]], **_: Any) -> Object:
        artifact = self.state.artifacts[artifactID]
        for alias in aliases:
            if artifact.collection.aliases.get(alias["alias"]) is artifact:
                del artifact.collection.aliases[alias["alias"]]
        return {"__typename": "DeleteAliasesPayload", "success": True}

    def update_artifact(
        self,
        artifactID: str,
        metadata: str | None = None,
        description: str | None = None,
        **_: Any,
    ) -> Object:
        artifact = self.state.artifacts[artifactID]
        if metadata is not None:
            artifact.metadata = metadata
        if description is not None:
            artifact.description = description
        artifact.updated = now()
        return {"__typename": "UpdateArtifactPayload", "artifact": self.artifact(artifact)}

    def delete_artifact(self, artifactID: str, deleteAliases: bool = False, **_: Any) -> Object:
        artifact = self.state.artifacts[artifactID]
        if not deleteAliases and any(a is artifact for a in artifact.collection.aliases.values()):
            raise ValueError("the artifact still has aliases")
        self.state.delete(artifact)
        return {"__typename": "DeleteArtifactPayload", "artifact": self.artifact(artifact)}

    def create_run_files(
        self,
        projectName: str,
        runName: str,
        files: list[str],
        entityName: str | None = None,
    ) -> Object:
        project = self.state.project(projectName, entityName)
        if project is None or runName not in project.runs:
            raise ValueError(f"run {runName!r} does not exist")
        run = project.runs[runName]
        for name in files:
            run.files[name] = f"run/{run.number}/{name}"
        return {
            "__typename": "CreateRunFilesPayload",
            "runID": f"run-{run.number}",
            "uploadHeaders": [],
            "files": [self.run_file(run, name) for name in files],
        }


def connection(
    node_type: str,
    nodes: Sequence[Object | None],
    first: int | None = None,
    after: str | None = None,
    order: str | None = None,
) -> Object:
    """A page of `nodes`; a cursor is the index of the node it stands on."""
    start = int(after) + 1 if after else 0
    stop = min(len(nodes), start + (first or math.inf))
    page = list(enumerate(nodes))[start : int(stop)]
    return {
        "__typename": f"{node_type}Connection",
        "totalCount": len(nodes),
        "pageInfo": {
            "__typename": "PageInfo",
            "endCursor": str(page[-1][0]) if page else None,
            "hasNextPage": stop < len(nodes),
        },
        "edges": [{"__typename": f"{node_type}Edge", "node": node, "cursor": str(i)} for i, node in page],
    }
