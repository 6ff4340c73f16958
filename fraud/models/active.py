"""Which models are served: named by a setting, versioned by the registry, kept in the Bento store.

Every worker polls the registry. A new version is loaded, verified and warmed in a thread while the old one answers,
then swapped in atomically; a request is answered entirely by the version it began with, and an unreferenced version is
freed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import sqlite3
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from filelock import FileLock

from fraud.errors import BundleError, FraudError, RegistryError
from fraud.models.active_rules import ActiveRules
from fraud.models.bundle import short
from fraud.models.following import ASKED, AliasFollower
from fraud.models.lifecycle import Lifecycle
from fraud.models.served import Packed, Served
from fraud.models.turns import short_turns
from fraud.settings import Settings

if TYPE_CHECKING:  # a worker imports it when it loads; the process that only starts workers never does
    from fraud.decisions.rules.in_force import RulesInForce
    from fraud.models.beside import Beside
    from fraud.models.scorer import Scorer

logger = logging.getLogger("fraud.serving.active")

Role = Literal["champion", "challenger", "anomaly", "rules"]
MAX_RETRY_S = 60.0
MAX_PAST = 2
"""Versions that stay loaded though they are served no more, to explain what they decided."""


@dataclass(frozen=True)
class Swap:
    """One attempt to swap in another version; `error` says why it failed, `seconds` how long it took."""

    name: str
    role: Role
    before: str | None
    tag: str
    seconds: float
    error: Exception | None = None


@dataclass
class _Failure:
    tag: str
    code: str
    since: float
    retry_at: float
    attempts: int = 1


Install = Callable[[dict[str, "Scorer"], dict[str, "Scorer"], "Beside | None", Mapping[str, "RulesInForce"]], None]
"""Takes champions and challengers by name, the anomaly model, and the rules of each by the version's digest."""
Key = tuple[str, Role]


class ActiveModels:
    """The models that one worker serves; `load` at start, then `follow`.

    Parameters
    ----------
    settings : Settings
    packed : Packed, optional
        The models packed in the running Bento.
    on_swap : callable
        Called with every `Swap`, also at start.
    on_rule_stopped : callable
        Called with a model's name and the id of a rule that fired on too large a share and is stopped.
    hashed : callable, optional
        Returns the keyed hash of an id, where lists hold hashes.
    """

    def __init__(
        self,
        settings: Settings,
        packed: Packed | None = None,
        on_swap: Callable[[Swap], None] | None = None,
        on_rule_stopped: Callable[[str, str], None] | None = None,
        hashed: Callable[[str], str] | None = None,
    ) -> None:
        self._settings = settings
        self._served = Served(settings.models, packed)
        self._on_swap = on_swap or (lambda swap: None)
        self._tags: dict[Key, str] = {}
        self._scorers: dict[Key, Scorer] = {}
        self.past: dict[str, Scorer] = {}
        self._failures: dict[Key, _Failure] = {}
        self._registry_error = ""
        self.following = AliasFollower(self._served.registry, self._served.followed())
        self.beside: Beside | None = None
        self.rules = ActiveRules(
            settings.models.bentoml_home,
            settings.rules.max_share,
            on_rule_stopped or (lambda model, rule: None),
            hashed,
        )
        self._install: Install = lambda champions, challengers, beside, rules: None
        self._lock = asyncio.Lock()
        self._past_lock = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "load")
        self._task: asyncio.Task[None] | None = None

    @property
    def champions(self) -> dict[str, Scorer]:
        return {name: scorer for (name, role), scorer in self._scorers.items() if role == "champion"}

    @property
    def challengers(self) -> dict[str, Scorer]:
        return {name: scorer for (name, role), scorer in self._scorers.items() if role == "challenger"}

    async def load(self) -> None:
        """Load, verify and warm every model.

        Raises
        ------
        BundleError, RegistryError, RuleError
            A champion or the anomaly model cannot be served, or the rules in force cannot be applied to a champion. A
            challenger that fails is only reported.
        """
        for key, tag in (await self._in_thread(self._wanted)).items():
            try:
                await self._swap(key, tag)
            except Exception:
                if key[1] != "challenger":
                    raise

    def follow(self, install: Install) -> None:
        """Pass the scorers to `install`, now and after every change, in one call on the event loop."""
        self._install = install
        self._install_all()
        self._task = asyncio.get_running_loop().create_task(self._poll())

    async def check(self, *, now: bool = False) -> None:
        """Serve the versions that the registry names; on a failure the old version stays.

        Parameters
        ----------
        now : bool
            Also retry what failed a moment ago.
        """
        async with self._lock:
            try:
                wanted = await self._in_thread(self._wanted)
                await self._in_thread(self.following.read, [name for name, role in wanted if role != "challenger"])
            except (FraudError, OSError, sqlite3.Error) as error:
                if not self._registry_error:
                    logger.error("the registry cannot be read; what is served stays: %s", error)
                self._registry_error = str(error)
                return
            self._registry_error = ""
            changed = False
            for key in [key for key in self._failures if wanted.get(key) != self._failures[key].tag]:
                del self._failures[key]
            for key, tag in wanted.items():
                if self._tags.get(key) != tag and (now or self._may_try(key)):
                    with contextlib.suppress(Exception):  # _swap has reported it
                        await self._swap(key, tag)
                        changed = True
            for key in [key for key in self._tags if key not in wanted]:  # no longer challenged, or without rules
                self._drop(key)
                changed = True
            if changed:
                self._install_all()

    async def load_past(self, name: str, digest: str) -> None:
        """Load a version that is no longer served into `past`, if the Bento store still has it."""
        async with self._past_lock:
            if digest in self.past:
                return
            try:
                with short_turns():
                    scorer = await self._in_thread(self._load, f"{name}:{short(digest)}", digest)
            except FraudError as error:
                logger.error("decisions of %s %s cannot be explained: %s", name, digest, error)
                return
            while len(self.past) >= MAX_PAST:
                del self.past[next(iter(self.past))]
            self.past[digest] = scorer

    async def refresh(self) -> str:
        """Serve what the registry names, then what W&B names; returns the outcome of the W&B poll.

        The registry comes first, so a local swap does not wait for the network.
        """
        await self.check(now=True)
        asked = await self.following.look()
        await self.check(now=True)
        errors = [f"{name}: {look.error}" for name, look in self.following.looks.items() if look.error]
        return f"failed: {'; '.join(errors)}" if asked == ASKED and errors else asked

    async def switch(self, name: str, reference: str, *, why: str) -> None:
        """Promote another version of a model, whatever the gate says of it, and serve it; other workers follow.

        It is loaded and verified first: if that fails, no alias moves and what is served stays.

        Raises
        ------
        RegistryError
            No version, or more than one, matches the reference; or the version of the model is pinned.
        BundleError
            The version is damaged, or does not score here as it did in training.
        """
        if name not in self._served.followed():
            raise RegistryError(f"the version of {name} is pinned here by FRAUD_MODEL, by its version or by the Bento")
        version = await self._in_thread(self._served.registry.resolve, name, reference)
        await self._in_thread(self._load_in_turn, f"{name}:{short(version.digest)}")
        models = self._settings.models
        lifecycle = Lifecycle(models.bentoml_home, models.alias_order)
        await self._in_thread(partial(lifecycle.promote, name, version.digest, why=why, force=True))
        await self.check(now=True)

    def describe(self) -> dict[str, Any]:
        """Return what is served, by which alias, and what failed, for ``/readyz``; error texts are only logged."""
        failed = [
            {
                "name": name,
                "role": role,
                "wanted": f.tag,
                "code": f.code,
                "attempts": f.attempts,
                "since": round(f.since),
            }
            for (name, role), f in self._failures.items()
        ]
        challengers = [msgspec.to_builtins(scorer.name) for scorer in self.challengers.values()]
        return {
            "challengers": challengers,
            "rules": {name: tag for (name, role), tag in self._tags.items() if role == "rules"},
            "anomaly_model": self._described_beside(),
            "failed_swaps": failed,
            "wandb": {
                name: {"checked": look.checked, "failed": bool(look.error)}
                for name, look in self.following.looks.items()
            },
            "aliases": dict(self._served.aliases),
            "registry_readable": not self._registry_error,
            "pid": os.getpid(),
        }

    async def close(self) -> None:
        """Stop polling."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self.following.close()
        self._thread.shutdown()

    async def _poll(self) -> None:
        while True:
            await self.check()
            served = {n: scorer.name.digest for (n, role), scorer in self._scorers.items() if role != "challenger"}
            await self._in_thread(self.following.record_served, served)
            await asyncio.sleep(self._settings.models.poll_s * random.uniform(0.8, 1.2))

    def _wanted(self) -> dict[Key, str]:
        champions = self._served.champions()
        challengers = self._served.challengers(champions)
        wanted: dict[Key, str] = {(name, "champion"): tag for name, tag in champions.items()}
        wanted |= {(name, "challenger"): tag for name, tag in challengers.items()}
        wanted |= {(name, "anomaly"): tag for name, tag in self._served.anomaly().items()}
        return wanted | {(name, "rules"): digest for name, digest in self.rules.wanted(champions).items()}

    def _may_try(self, key: Key) -> bool:
        failure = self._failures.get(key)
        return failure is None or time.monotonic() >= failure.retry_at

    async def _swap(self, key: Key, tag: str) -> None:
        """Replace one scorer, or the rules of one model, by those of `tag`; on a fault keep them and raise."""
        name, role = key
        before, started = self._tags.get(key), time.perf_counter()
        try:
            take = await (self._rules_of(name, tag) if role == "rules" else self._scorer_of(key, tag))
        except Exception as error:
            self._failed(key, tag, error)
            self._on_swap(Swap(name, role, before, tag, time.perf_counter() - started, error))
            raise
        self._failures.pop(key, None)
        self._tags[key] = tag
        take()
        seconds = time.perf_counter() - started
        logger.info("%s %s is %s after %.2f s, before it was %s", role, name, tag, seconds, before or "none")
        self._on_swap(Swap(name, role, before, tag, seconds))

    async def _scorer_of(self, key: Key, tag: str) -> Callable[[], None]:
        """Load a version, check the rules in force against it, and return what makes it served."""
        scorer = next((self._scorers[k] for k, loaded in self._tags.items() if loaded == tag), None)
        with short_turns():
            scorer = scorer or await self._in_thread(self._load_in_turn, tag)
        if key[1] == "anomaly":
            beside = self._beside_champions(scorer)
            return lambda: self._take_beside(key, beside)
        await self._in_thread(self.rules.prepare, scorer)
        if self.beside is not None and (misfit := self.beside.misfit(scorer)):
            logger.warning("%s is answered without an anomaly: %s", tag, misfit)
        return lambda: self._scorers.__setitem__(key, scorer)

    async def _rules_of(self, name: str, digest: str) -> Callable[[], None]:
        """Load a rule set, check it against every version of its model, and return what puts it in force."""
        scorers = [scorer for (model, _), scorer in self._scorers.items() if model == name]
        take: Callable[[], None] = await self._in_thread(self.rules.load, name, digest, scorers)
        return take

    def _drop(self, key: Key) -> None:
        del self._tags[key]
        if key[1] == "rules":
            self.rules.drop(key[0])
        else:
            del self._scorers[key]

    def _beside_champions(self, scorer: Scorer) -> Beside:
        """Return a scorer as the anomaly model; raises `BundleError` if it can be beside none of the champions."""
        from fraud.models.beside import Beside

        beside = Beside(scorer)
        misfits = [beside.misfit(champion) for champion in self.champions.values()]
        if None not in misfits:
            raise BundleError("; ".join(filter(None, misfits)))
        return beside

    def _take_beside(self, key: Key, beside: Beside) -> None:
        self.beside, self._scorers[key] = beside, beside.scorer

    def _install_all(self) -> None:
        rules = self.rules.by_version(self._scorers.values())
        self._install(self.champions, self.challengers, self.beside, rules)

    def _described_beside(self) -> dict[str, Any] | None:
        if self.beside is None:
            return None
        measured = [name for name, scorer in self.champions.items() if self.beside.misfit(scorer) is None]
        return {**msgspec.to_builtins(self.beside.scorer.name), "beside": measured}

    def _load_in_turn(self, tag: str) -> Scorer:
        """Load while no other worker of this server does, so that cores stay free for requests."""
        if self._task is None:  # at start there are no requests yet
            return self._load(tag)
        self._settings.process.state_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(self._settings.process.state_dir / "load.lock"):
            return self._load(tag)

    def _load(self, tag: str, digest: str | None = None) -> Scorer:
        from fraud.models.scorer import Scorer

        return Scorer.of(
            self._served.read(tag, digest), max_ahead_ms=round(self._settings.scoring.max_clock_ahead_s * 1000)
        )

    def _failed(self, key: Key, tag: str, error: Exception) -> None:
        failure = self._failures.get(key)
        attempts = failure.attempts + 1 if failure else 1
        wait_s = min(MAX_RETRY_S, self._settings.models.poll_s * 2.0**attempts)
        since = failure.since if failure else time.time()
        code = error.code if isinstance(error, FraudError) else "internal"
        self._failures[key] = _Failure(tag, code, since, time.monotonic() + wait_s, attempts)
        expected = isinstance(error, FraudError)
        logger.error(
            "%s %s is not served, what was stays: %s", key[1], tag, error, exc_info=None if expected else error
        )

    async def _in_thread(self, job: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, job, *arguments)
