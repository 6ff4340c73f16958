"""Routes of rule sets: the one in force, check one, save it, put it in force, take it back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from fraud.decisions.rules.lint import warnings_of
from fraud.decisions.rules.sets import RuleSet, expect_whole
from fraud.errors import InvalidRequest, RegistryError
from fraud.models.names import RULES
from fraud.models.registry import Version
from fraud.models.rule_sets import RuleSets
from fraud.schema import Id
from fraud.serving.bodies import decode_body
from fraud.serving.http import Answer, Call, Route
from fraud.serving.parameters import parameters

logger = logging.getLogger("fraud.serving.rules")

T = TypeVar("T")
EXAMPLE = '{"model": "fraud-transaction", "rules": [{"id": "dear", "when": "amount > 1000", "outcome": "review"}]}'


class ModelNamed(msgspec.Struct):
    """Whose rules."""

    model: Annotated[Id, Meta(description="The name of the model.")]


class PromoteRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Which saved set is put in force."""

    reference: Annotated[str, Meta(min_length=1, max_length=80, description="an alias, vN, or a digest")]
    why: Annotated[str, Meta(max_length=500)] = ""


class RollbackRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Why the set before is put back in force."""

    why: Annotated[str, Meta(max_length=500)] = ""


class RulesChecked(msgspec.Struct):
    """The model in force can decide every rule of the set."""

    digest: str
    warnings: Sequence[str]


class RulesVersion(msgspec.Struct):
    """A saved set."""

    version: Annotated[str, Meta(description="such as v3")]
    digest: str
    aliases: Sequence[str]


class RulesInForceAnswer(msgspec.Struct):
    """The set in force for a model."""

    digest: Annotated[str | None, Meta(description="null where no set is in force")]
    rules: RuleSet | None


_decode = msgspec.json.Decoder(RuleSet)
_promote = msgspec.json.Decoder(PromoteRequest)
_rollback = msgspec.json.Decoder(RollbackRequest)
_encode = msgspec.json.Encoder().encode


def rule_routes(sets: RuleSets) -> list[Route]:
    """`/v1/rulesets`, `/v1/rulesets/check`, `/v1/rulesets/{model}` and what moves the one in force."""

    async def show(call: Call) -> Answer:
        model = parameters(call, ModelNamed).model
        digest = await _done(lambda: sets.in_force(model))
        found = None if digest is None else await _done(lambda: sets.read(digest))
        return Answer(_encode(RulesInForceAnswer(digest, found)))

    async def check(call: Call) -> Answer:
        rule_set = await _read(call)
        rules = await _done(lambda: sets.check(rule_set))
        return Answer(_encode(RulesChecked(rules.digest, warnings_of(rules))))

    async def save(call: Call) -> Answer:
        rule_set = await _read(call)
        version = await _done(lambda: sets.save(rule_set, who=_who(call)))
        return _moved("saved", call, version)

    async def promote(call: Call) -> Answer:
        model = parameters(call, ModelNamed).model
        asked = decode_body(_promote, await call.json_body(), '{"reference": "candidate", "why": "..."}')
        version = await _done(lambda: sets.promote(model, asked.reference, who=_who(call), why=asked.why))
        return _moved("promoted", call, version)

    async def rollback(call: Call) -> Answer:
        model = parameters(call, ModelNamed).model
        asked = decode_body(_rollback, await call.json_body(), '{"why": "..."}')
        version = await _done(lambda: sets.rollback(model, who=_who(call), why=asked.why))
        return _moved("rolled back", call, version)

    return [
        Route(
            "GET",
            "/v1/rulesets/{model}",
            "read",
            show,
            "The rule set in force for a model.",
            answer=RulesInForceAnswer,
            parameters=ModelNamed,
            tag="Rules",
        ),
        Route(
            "POST",
            "/v1/rulesets/check",
            "rules",
            check,
            "Check a rule set against the model in force; nothing is saved.",
            request=RuleSet,
            answer=RulesChecked,
            tag="Rules",
        ),
        Route(
            "POST",
            "/v1/rulesets",
            "rules",
            save,
            "Check a rule set and save it as candidate; an unchanged one makes no new version.",
            request=RuleSet,
            answer=RulesVersion,
            tag="Rules",
        ),
        Route(
            "POST",
            "/v1/rulesets/{model}/promote",
            "rules",
            promote,
            "Put a saved rule set in force, in every worker of this machine within seconds.",
            request=PromoteRequest,
            answer=RulesVersion,
            parameters=ModelNamed,
            tag="Rules",
        ),
        Route(
            "POST",
            "/v1/rulesets/{model}/rollback",
            "rules",
            rollback,
            "Put the rule set before back in force.",
            request=RollbackRequest,
            answer=RulesVersion,
            parameters=ModelNamed,
            tag="Rules",
        ),
    ]


async def _read(call: Call) -> RuleSet:
    rule_set = decode_body(_decode, await call.json_body(), EXAMPLE)
    expect_whole(rule_set)
    return rule_set


async def _done(job: Callable[[], T]) -> T:
    """Run a job of the registry in a thread; what it does not find or refuses is the caller's matter."""
    try:
        return await asyncio.to_thread(job)
    except RegistryError as error:
        raise InvalidRequest(error.message) from None


def _who(call: Call) -> str:
    return f"key {call.scope.get('fraud.key_id', 'none')}"


def _moved(what: str, call: Call, version: Version) -> Answer:
    logger.info(
        "rules of %s %s: %s, %s, by %s", version.name.removesuffix(RULES), what, version, version.digest, _who(call)
    )
    return Answer(_encode(RulesVersion(f"v{version.version}", version.digest, version.aliases)))
