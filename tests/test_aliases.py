"""The ordered aliases of the version to serve: the first that names a version is in force, wherever one looks."""

from __future__ import annotations

from pathlib import Path

import pytest

from fraud.errors import RegistryError, SettingsError
from fraud.models.registry import Registry
from fraud.models.served import Served
from fraud.settings import ModelSettings
from tests.test_registry import NAME, aliases, digest, register
from tests.test_served import main_ends
from tests.wandb_runs import NAME as RUN_NAME
from tests.wandb_runs import make_run

ORDER = ("champion", "production", "staging")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Three versions, the last promoted one by one, so that `champion` is in force."""
    registry = Registry(tmp_path / "fraud" / "registry.db", ORDER)
    for n in range(3):
        register(registry, n)
    return registry


def move(registry: Registry, reference: str, alias: str) -> None:
    registry.move(NAME, reference, alias, who="ann@desk", why="a test")


def served(registry: Registry) -> tuple[str, str] | None:
    found = registry.in_force(NAME)
    return None if found is None else (found.alias, found.digest)


def test_the_first_alias_that_names_a_version_is_in_force(registry: Registry) -> None:
    assert served(registry) is None
    assert registry.alias_in_force(NAME) == "champion", "what a first promotion sets"
    assert registry.names_in_production() == []
    for n, alias in enumerate(reversed(ORDER)):
        move(registry, f"v{n}", alias)
        assert served(registry) == (alias, digest(n))
        assert registry.names_in_production() == [NAME]
    move(registry, "v0", "staging")
    assert served(registry) == ("champion", digest(2))


def test_the_version_that_was_served_is_the_previous_one_whichever_alias_moved(registry: Registry) -> None:
    move(registry, "v0", "staging")
    move(registry, "v1", "production")
    assert aliases(registry) == {"candidate": 2, "staging": 0, "production": 1, "previous": 0}
    move(registry, "v2", "staging")
    assert aliases(registry)["previous"] == 0, "staging is not in force"
    move(registry, "v1", "champion")
    assert served(registry) == ("champion", digest(1))
    assert aliases(registry)["previous"] == 0, "the same version goes on under another alias"
    move(registry, "v2", "champion")
    assert aliases(registry)["previous"] == 1
    kinds = [(event.kind, event.alias) for event in registry.events(NAME) if event.alias]
    assert kinds == [
        ("promote", "champion"),
        ("alias", "champion"),
        ("alias", "staging"),
        ("promote", "production"),
        ("promote", "staging"),
    ]


def test_a_rollback_moves_the_alias_in_force_through_what_was_served(registry: Registry) -> None:
    for n, alias in enumerate(reversed(ORDER)):
        move(registry, f"v{n}", alias)
    assert registry.rollback(NAME, who="ann", why="worse").version == 1
    assert aliases(registry) == {"candidate": 2, "staging": 0, "production": 1, "champion": 1, "previous": 0}
    assert registry.rollback(NAME, who="ann", why="still").version == 0
    assert aliases(registry) == {"candidate": 2, "staging": 0, "production": 1, "champion": 0}
    with pytest.raises(RegistryError, match="has no previous version to roll back to"):
        registry.rollback(NAME, who="ann", why="again")
    assert [event.before for event in registry.events(NAME)[:2]] == [1, 2]


def test_what_is_adopted_from_elsewhere_may_bring_and_take_an_alias(registry: Registry) -> None:
    move(registry, "v0", "production")
    for item in registry.pending():
        registry.delivered(item.id)
    assert registry.adopt(NAME, {"champion": digest(2), "previous": digest(0)}, who="W&B", why="moved")
    assert served(registry) == ("champion", digest(2))
    event = registry.events(NAME)[0]
    assert (event.kind, event.alias, event.version, event.before) == ("follow", "champion", 2, 0)
    assert registry.adopt(NAME, {"champion": None, "production": digest(1)}, who="W&B", why="moved")
    assert served(registry) == ("production", digest(1))
    event = registry.events(NAME)[0]
    assert (event.kind, event.alias, event.version, event.before) == ("follow", "production", 1, 2)


def test_an_alias_outside_the_list_is_refused(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="alias 'live' cannot be set; allowed: candidate, challenger, champion, "):
        move(registry, "v0", "live")
    with pytest.raises(RegistryError, match="alias 'champion' cannot be set; allowed: candidate, challenger, prod"):
        move(Registry(registry.path), "v0", "champion")


@pytest.mark.parametrize("value", ["", "production,", "Champion", "challenger", "latest", "v3", "deadbeefdead", "a:b"])
def test_names_that_are_no_alias_of_what_is_served(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAUD_MODEL_ALIASES", value)
    with pytest.raises(SettingsError, match=r"FRAUD_MODEL_ALIASES='.*cannot be the alias of what is served; allowed"):
        ModelSettings.read()
    monkeypatch.setenv("FRAUD_MODEL_ALIASES", "production,production")
    with pytest.raises(SettingsError, match="an alias is named twice"):
        ModelSettings.read()


def test_the_commands_move_the_alias_in_force_and_say_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("FRAUD_MODEL_ALIASES", " champion, production ,staging")
    for seed, precision in ((1, 0.8), (2, 0.9), (3, 0.5)):
        main_ends(["import", str(make_run(tmp_path / "runs", seed, precision))])
    capfd.readouterr()

    main_ends(["promote", f"{RUN_NAME}:v0", "--alias", "production", "--why", "the first"])
    assert f"in production: {RUN_NAME}:v0 (previous" not in (said := capfd.readouterr().out)
    assert f"in production: {RUN_NAME}:v0 (production)" in said
    assert "the alias production moved" in said
    main_ends(["promote", f"{RUN_NAME}:v1", "--alias", "staging", "--why", "to try"])
    assert f"not in force (that is production): {RUN_NAME}:v1 (staging)" in capfd.readouterr().out
    main_ends(["promote", f"{RUN_NAME}:staging", "--why", "good"])
    assert f"in production: {RUN_NAME}:v1 (production, staging)" in capfd.readouterr().out
    main_ends(["promote", f"{RUN_NAME}:v2", "--alias", "champion", "--why", "worse"], 1)
    assert f"{RUN_NAME}:v2 is not promoted: average_precision 0.5000 is worse than that of {RUN_NAME}:v1" in (
        capfd.readouterr().err
    )
    main_ends(["models", "--production"])
    listed = capfd.readouterr().out
    assert f"{RUN_NAME}:v1" in listed
    assert f"{RUN_NAME}:v0" not in listed
    running = Served(ModelSettings.read())
    assert running.champions()[RUN_NAME].endswith(running.registry.resolve(RUN_NAME, "v1").digest[7:23])
    assert running.aliases == {RUN_NAME: "production"}

    main_ends(["rollback", RUN_NAME, "--why", "alerts doubled"])
    said = capfd.readouterr().out
    assert f"in production: {RUN_NAME}:v0 (production)" in said
    assert "the alias production moved" in said
    assert running.champions()[RUN_NAME].endswith(running.registry.resolve(RUN_NAME, "v0").digest[7:23])
    main_ends(["promote", f"{RUN_NAME}:v1", "--alias", "champion", "--challenger"], 2)
    assert "give --challenger or --alias, not both" in capfd.readouterr().err
    main_ends(["promote", f"{RUN_NAME}:v1", "--alias", "live"], 1)
    assert "alias 'live' cannot be set; allowed: candidate, challenger, champion, production, staging" in (
        capfd.readouterr().err
    )
