"""W&B slow, broken, refusing, gone, or lying: nothing here stops, nothing there is believed unchecked."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fraud.errors import BundleError, FraudError
from fraud.models.bundle import short
from fraud.models.gate import GateFailed
from tests.wandb_machine import Machine, collection
from tests.wandb_runs import NAME, digest_of, make_run
from tests.wandb_server import Fault, WandbServer
from tests.wandb_server.state import Artifact
from wandb_sync.client import WandbError, WandbMissing, WandbOffline, WandbRefused, WandbUnreachable


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


@pytest.fixture(scope="module")
def pushed(server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Machine, Path]:
    """A machine whose first version is on W&B and in production."""
    root = tmp_path_factory.mktemp("pushed")
    machine, run = Machine(root, server), make_run(root / "runs", 1)
    models = machine.models
    models.publish(run)
    models.promote(NAME, "v0", why="the first")
    assert models.send_pending().waiting == []
    return machine, run


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault("graphql", "status", status=500), "500"),
        (Fault("graphql", "status", status=429), "429"),
        (Fault("graphql", "cut"), "W&B at"),
        (Fault("createArtifact", "status", status=500), "500"),
        (Fault("PUT", "status", status=500), "W&B at"),
        (Fault("graphql", "slow", delay_s=10.0), "push_run took more than 6 s"),
    ],
    ids=["500", "429", "cut", "500 at the artifact", "500 at every upload", "10 s an answer"],
)
def test_what_cannot_be_sent_waits_and_is_sent_later(
    server: WandbServer, tmp_path_factory: pytest.TempPathFactory, fault: Fault, error: str
) -> None:
    slow = fault.action == "slow"
    machine = waiting_machine(server, tmp_path_factory, "6" if slow else "60")
    server.faults.set(fault)
    started = time.monotonic()
    sent = machine.models.send_pending()
    server.faults.clear()
    assert time.monotonic() - started < 60
    assert [item.name for item in sent.waiting] == ["late"]
    assert error in sent.reason
    assert machine.models.registry.pending()[0].last_error == sent.reason


_waiting: dict[int, Machine] = {}


def waiting_machine(server: WandbServer, tmp_path_factory: pytest.TempPathFactory, limit_s: str) -> Machine:
    """One machine for all the faults, with one push that none of them lets through."""
    if id(server) not in _waiting:
        root = tmp_path_factory.mktemp("late")
        machine = _waiting[id(server)] = Machine(root, server)
        models = machine.models
        models.publish(make_run(root / "runs", 1, name="late"))
    machine = _waiting[id(server)]
    machine.environment["FRAUD_WANDB_TRANSFER_TIMEOUT_S"] = limit_s
    return machine


def test_after_all_these_faults_one_push_brings_it_up_once(
    server: WandbServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    machine = waiting_machine(server, tmp_path_factory, "60")
    done = machine.run("push", "--pending")
    assert done.returncode == 0, done.stdout
    (version,) = collection(server, "late").committed()
    assert version.run is not None
    assert len(version.run.history()) == 1
    assert machine.models.registry.pending() == []


def test_a_wrong_key_is_refused_and_says_so(server: WandbServer, tmp_path: Path) -> None:
    machine = Machine(tmp_path, server)
    machine.environment["WANDB_API_KEY"] = "x" * 40
    with pytest.raises(WandbRefused, match=r"W&B at http://127.0.0.1:\d+: fetch: .*(401|not logged in|API key)"):
        machine.models.pull(NAME, "production")


def test_what_wandb_does_not_have_is_missing(pushed: tuple[Machine, Path]) -> None:
    machine, _ = pushed
    with pytest.raises(WandbMissing, match=f"W&B has no {NAME}:challenger in project fraud-bento"):
        machine.models.pull(NAME, "challenger")


def test_with_the_network_cut_all_but_the_sending_works(pushed: tuple[Machine, Path], tmp_path: Path) -> None:
    """The table of docs/wandb.md."""
    gone = Machine(tmp_path, None, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="k" * 40)
    models = gone.models
    runs = [make_run(tmp_path / "runs", seed, 0.8 + seed / 100) for seed in (1, 2)]
    for run in runs:
        models.publish(run)
    models.promote(NAME, "v0", why="the first")
    models.promote(NAME, "candidate", why="better")
    assert models.follow(NAME) == f"{NAME}:{short(digest_of(runs[1]))}"
    models.rollback(NAME, why="alerts doubled")
    assert models.follow(NAME) == f"{NAME}:{short(digest_of(runs[0]))}"
    assert models.pull(NAME, "v1") == f"{NAME}:{short(digest_of(runs[1]))}"
    assert [record["kind"] for record in models.history(NAME)] == ["rollback", "promote", "promote"]
    with pytest.raises(WandbUnreachable):
        models.lineage(NAME)
    sent = models.send_pending()
    assert [item.kind for item in sent.waiting] == ["run", "run", "alias", "alias", "alias"]
    done = gone.run("push", "--pending")
    assert done.returncode == 75
    assert "5 change(s) wait for W&B" in done.stdout


def test_without_a_key_the_same_works_and_a_key_brings_it_all_up_in_order(tmp_path: Path) -> None:
    with WandbServer() as server:
        machine = Machine(tmp_path, server)
        key = machine.environment.pop("WANDB_API_KEY")
        models = machine.models
        runs = [make_run(tmp_path / "runs", seed, 0.8 + seed / 100) for seed in (1, 2)]
        for run in runs:
            models.publish(run)
        models.promote(NAME, "v0", why="the first")
        models.promote(NAME, "v1", why="better")
        models.rollback(NAME, why="alerts doubled")
        with pytest.raises(WandbOffline, match="no WANDB_API_KEY"):
            models.lineage(NAME)
        assert len(models.send_pending().waiting) == 5
        assert server.requests == []

        machine.environment["WANDB_API_KEY"] = key
        assert machine.models.send_pending().waiting == []
        versions = collection(server, NAME).committed()
        assert [json.loads(v.metadata or "")["bundle_digest"] for v in versions] == [digest_of(run) for run in runs]
        aliases = {alias: artifact.version for alias, artifact in collection(server, NAME).aliases.items()}
        assert aliases == {"latest": 1, "candidate": 1, "production": 0}
        assert [v.wandb_version for v in machine.models.registry.versions(NAME)] == ["v1", "v0"]


# What arrives is not believed


def with_entry(artifact: Artifact, server: WandbServer, path: str, **changes: Any) -> None:
    entry = {**artifact.entries["booster.txt"], **changes}
    artifact.entries[path] = entry
    write_manifest(artifact, server)


def write_manifest(artifact: Artifact, server: WandbServer) -> None:
    manifest = json.loads(server.state.blobs[artifact.manifest_key or ""])
    manifest["contents"] = artifact.entries
    server.state.blobs[artifact.manifest_key or ""] = json.dumps(manifest).encode()


def forge(artifact: Artifact, server: WandbServer) -> None:
    """Another model card, with a right MD5: only the bundle's own digests can tell."""
    entry = artifact.entries["model_card.md"]
    content = b"# A forged model\n"
    import base64
    import hashlib

    digest = base64.b64encode(hashlib.md5(content).digest()).decode()
    server.state.blobs[f"md5/{digest}"] = content
    artifact.entries["model_card.md"] = {**entry, "digest": digest, "size": len(content)}
    write_manifest(artifact, server)


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (Fault("GET /storage/md5", "corrupt"), "digest mismatch|Digest mismatch|Cannot verify|differ"),
        (Fault("GET /storage/md5", "truncate"), "mismatch|Cannot verify|differ|Incomplete"),
        (forge, r"model_card.md is changed or truncated: sha256:\w+ arrived, the manifest says"),
        (lambda a, s: with_entry(a, s, "model.pkl"), "file 'model.pkl' does not belong in model"),
        (lambda a, s: with_entry(a, s, "../evil.txt"), "file '../evil.txt' does not belong in model"),
        (lambda a, s: with_entry(a, s, "booster.txt", ref="file:///etc/passwd"), "is a reference to 'file:///etc"),
        (lambda a, s: with_entry(a, s, "booster.txt", size=10**9), "has 1000000000 bytes; allowed are 536870912"),
    ],
    ids=["a changed byte", "truncated", "forged", "a pickle", "a path out", "a reference", "too large"],
)
def test_a_bad_download_is_refused_and_what_was_there_stays(
    server: WandbServer,
    pushed: tuple[Machine, Path],
    tmp_path: Path,
    tamper: Fault | Callable[[Artifact, WandbServer], None],
    message: str,
) -> None:
    machine = Machine(tmp_path, server)
    artifact = collection(server, NAME).versions[0]
    entries, manifest = dict(artifact.entries), server.state.blobs[artifact.manifest_key or ""]
    if isinstance(tamper, Fault):
        server.faults.set(tamper)
    else:
        tamper(artifact, server)
    try:
        with pytest.raises((WandbError, BundleError), match=message):
            machine.models.pull(NAME, "production")
    finally:
        server.faults.clear()
        artifact.entries, server.state.blobs[artifact.manifest_key or ""] = entries, manifest
    assert machine.assert_store_whole() == []
    assert machine.models.registry.versions() == []


# The gate and the store


def published(tmp_path: Path, *runs: Path) -> Machine:
    machine = Machine(tmp_path, None)
    for run in runs:
        machine.models.publish(run)
    return machine


def test_a_candidate_worse_than_the_interval_is_refused_unless_forced_for_a_reason(tmp_path: Path) -> None:
    good, bad = make_run(tmp_path / "runs", 1, 0.80), make_run(tmp_path / "runs", 2, 0.74)
    models = published(tmp_path, good, bad).models
    models.promote(NAME, "v0", why="the first")
    refused = (
        rf"{NAME}:v1 is not promoted: average_precision 0.7400 is worse than that of {NAME}:v0, "
        r"0.8000 \[0.7500, 0.8500\]. To promote it all the same, give --force and --why"
    )
    with pytest.raises(GateFailed, match=refused):
        models.promote(NAME, "candidate", why="")
    with pytest.raises(FraudError, match="a forced promotion needs a reason: --why"):
        models.promote(NAME, "candidate", why=" ", force=True)
    assert models.registry.digest_of(NAME, "production") == digest_of(good)
    models.promote(NAME, "candidate", why="the old one leaks", force=True)
    event = models.registry.events(NAME)[0]
    assert event.forced
    assert event.why.startswith("the old one leaks (gate: average_precision 0.7400 is worse")


def test_a_candidate_within_the_interval_passes(tmp_path: Path) -> None:
    models = published(tmp_path, make_run(tmp_path / "runs", 1, 0.80), make_run(tmp_path / "runs", 2, 0.76)).models
    models.promote(NAME, "v0", why="the first")
    with pytest.raises(FraudError, match=f"{NAME} has no previous version to roll back to"):
        models.rollback(NAME, why="")
    assert models.promote(NAME, "v1", why="newer data").aliases == ("candidate", "production")
    assert not models.registry.events(NAME)[0].forced


def test_a_candidate_of_another_library_release_or_feature_specification_is_refused(tmp_path: Path) -> None:
    features = {"features.json": (tmp_path / "x").name.encode()}
    first = make_run(tmp_path / "runs", 1)
    spec = json.loads((first / "bundle" / "features.json").read_text())
    spec["features"][0]["meaning"] = "days since the account was opened"
    features["features.json"] = json.dumps(spec).encode()
    other_spec = make_run(tmp_path / "runs", 2, files=features)
    other_library = make_run(tmp_path / "runs", 3, libraries={"lightgbm": "3.3.5", "numpy": "1.26.0"})
    models = published(tmp_path, first, other_spec, other_library).models
    models.promote(NAME, "v0", why="the first")
    with pytest.raises(GateFailed, match=rf"its feature specification differs from that of {NAME}:v0"):
        models.promote(NAME, "v1", why="")
    with pytest.raises(GateFailed, match=r"trained with lightgbm 3.3.5, installed is \d"):
        models.promote(NAME, "v2", why="")


def test_another_library_warns_where_golden_rows_agree_and_refuses_where_they_do_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path / "runs", 1, libraries={"lightgbm": "3.3.5"})
    published(tmp_path / "a", run)
    assert re.search(r"lightgbm 3\.3\.5 in training, 4\.\S+ here; its golden rows come out the same", caplog.text)

    rows = [json.loads(line) for line in (run / "bundle" / "golden.jsonl").read_text().splitlines()]
    rows[2]["raw_margin"] += 1e-9
    golden = "".join(json.dumps(row) + "\n" for row in rows).encode()
    changed = make_run(tmp_path / "runs", 2, libraries={"lightgbm": "3.3.5"}, files={"golden.jsonl": golden})
    said = r"golden request 2 .* gives another raw_margin .* differ: lightgbm 3\.3\.5 in training, 4\S+ here; install"
    with pytest.raises(BundleError, match=said):
        published(tmp_path / "b", changed)
    assert Machine(tmp_path / "b", None).assert_store_whole() == []


def test_the_store_is_mended_by_a_second_import_and_never_served_damaged(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", 1)
    machine = published(tmp_path, run)
    models, tag = machine.models, f"{NAME}:{short(digest_of(run))}"
    models.promote(NAME, "v0", why="the first")
    models.promote(NAME, "v0", why="the first")
    model_folder, _ = models.store.bundle_paths(tag)
    booster = (model_folder / "booster.txt").read_bytes()
    (model_folder / "booster.txt").write_bytes(booster[:-1] + b"x")
    with pytest.raises(BundleError, match="is not in the Bento store, or is damaged there: fraud pull"):
        models.follow(NAME)
    following = models.registry.following(NAME)
    assert following is not None
    assert "is damaged there" in following.error
    models.publish(run)
    assert (model_folder / "booster.txt").read_bytes() == booster
    assert models.follow(NAME) == tag


def test_a_damaged_version_is_downloaded_again(pushed: tuple[Machine, Path], tmp_path: Path) -> None:
    machine, run = pushed
    model_folder, _ = machine.models.store.bundle_paths(f"{NAME}:{short(digest_of(run))}")
    booster = (model_folder / "booster.txt").read_bytes()
    (model_folder / "booster.txt").write_bytes(booster[: len(booster) // 2])
    machine.models.pull(NAME, "production")
    assert (model_folder / "booster.txt").read_bytes() == booster


def test_the_store_says_where_a_model_came_from(pushed: tuple[Machine, Path]) -> None:
    import bentoml
    from bentoml._internal.models import ModelStore

    machine, run = pushed
    store = ModelStore(machine.home / "bentoml" / "models")
    model: bentoml.Model = store.get(f"{NAME}:latest")
    assert model.info.labels["wandb"] == f"{NAME}:v0"
    assert model.info.labels["run"] == machine.models.registry.resolve(NAME, "v0").run
    assert model.info.metadata["bundle_digest"] == digest_of(run)
    preprocessor = store.get(str(model.info.metadata["preprocessor"]))
    assert preprocessor.info.metadata["preprocessor_digest"] == model.info.metadata["preprocessor_digest"]
