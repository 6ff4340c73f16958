"""The registered contracts, and those that FRAUD_CONTRACTS chooses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module

import msgspec

from fraud.errors import SettingsError
from fraud.refusals import closest
from fraud.serving.bodies import decode_body
from fraud.serving.contracts.anomaly_inference import ANOMALY_INFERENCE
from fraud.serving.contracts.application_score import APPLICATION_SCORE
from fraud.serving.contracts.bank_transaction import BANK_TRANSACTION
from fraud.serving.contracts.merchant_form import MERCHANT_FORM
from fraud.serving.contracts.open_inference import OPEN_INFERENCE
from fraud.serving.contracts.platforms import KSERVE_V1, SAGEMAKER
from fraud.serving.contracts.protocol import Contract, ContractModel, OtherBody
from fraud.serving.contracts.registry_predict import REGISTRY_PREDICT
from fraud.serving.engine import Engine
from fraud.serving.http import ONE_SHAPE, Route
from fraud.serving.routes import Closed
from fraud.serving.scoring import WithoutInstances
from fraud.settings import ContractSettings, Settings

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])

CONTRACTS: dict[str, Contract] = {
    contract.name: contract
    for contract in (
        *(APPLICATION_SCORE, REGISTRY_PREDICT, ANOMALY_INFERENCE),
        *(MERCHANT_FORM, BANK_TRANSACTION, OPEN_INFERENCE, KSERVE_V1, SAGEMAKER),
    )
}
"""Every contract of the product by its name."""


def contracts_of(engine: Engine, settings: Settings) -> list[ContractModel]:
    """Return the chosen contracts, each with its model.

    Raises
    ------
    SettingsError
        FRAUD_CONTRACTS or FRAUD_CONTRACT_MODELS names something that is none, or a module that cannot be used.
    """
    chosen: dict[str, Contract] = {}
    for contract in _chosen(settings.contracts):
        if chosen.setdefault(contract.name, contract) is not contract:
            raise SettingsError(f"FRAUD_CONTRACTS: two contracts have the name {contract.name!r}")
    models = _models(settings.contracts, chosen)
    return [ContractModel(contract, engine, models.get(name)) for name, contract in chosen.items()]


def contract_routes(model: ContractModel, settings: Settings) -> list[Route]:
    """Return the routes of one contract, in its error shape and under its heading, where a route has none of its own.

    Raises
    ------
    SettingsError
        The contract fails to make them.
    """
    try:
        return [
            replace(
                route,
                errors=model.contract.errors if route.errors is ONE_SHAPE else route.errors,
                tag=route.tag or heading(model.contract.name),
            )
            for route in model.contract.routes(model, settings)
        ]
    except Exception as error:  # a team's own code
        raise SettingsError(
            f"FRAUD_CONTRACTS: contract {model.contract.name!r} has no routes: {type(error).__name__}: {error}"
        ) from error


def other_bodies(models: Sequence[ContractModel], settings: Settings) -> dict[str, OtherBody]:
    """Return the bodies that contracts take on `/predict` beside the product's own, by the field that names each.

    Raises
    ------
    SettingsError
        Two contracts name the same field.
    """
    found: dict[str, OtherBody] = {}
    for model in models:
        if model.contract.on_predict is not None:
            other = model.contract.on_predict(model, settings)
            if found.setdefault(other.field, other) is not other:
                raise SettingsError(f"FRAUD_CONTRACTS: two contracts take a body with {other.field!r} on /predict")
    return found


def other_of(others: Mapping[str, OtherBody], body: bytes, error: WithoutInstances) -> OtherBody:
    """Return the contract that a body without `instances` is for; raises an error that names every form otherwise."""
    fields = decode_body(_fields, body, '{"instances": [{...}]}')
    for name, other in others.items():
        if name in fields:
            return other
    if others:
        error.message += f"; one transaction alone has the field {', or '.join(others)}"
        error.path = "$"
    raise error


def heading(name: str) -> str:
    """Return the heading of a contract's routes in the OpenAPI document."""
    return f"Contract {name}"


def closed_by(models: Sequence[ContractModel]) -> list[Closed]:
    """Return the prefixes that the contracts close."""
    return [Closed(prefix, model.contract.errors) for model in models for prefix in model.contract.prefixes]


def _chosen(settings: ContractSettings) -> Iterator[Contract]:
    for name in _parts(settings.names):
        if name == "all":
            yield from CONTRACTS.values()
        elif name in CONTRACTS:
            yield CONTRACTS[name]
        elif "." in name:
            yield _imported(name)
        else:
            near = closest(name, CONTRACTS)
            hint = f"did you mean {near!r}? " if near else ""
            raise SettingsError(
                f"FRAUD_CONTRACTS names {name!r}; {hint}allowed: all, {', '.join(CONTRACTS)}, and dotted Python modules"
            )


def _imported(name: str) -> Contract:
    try:
        contract = getattr(import_module(name), "CONTRACT", None)
    except Exception as error:  # a team's own code
        raise SettingsError(
            f"FRAUD_CONTRACTS: module {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(contract, Contract):
        raise SettingsError(
            f"FRAUD_CONTRACTS: module {name!r} has no CONTRACT = Contract(...), as docs/contracts.md shows it"
        )
    if contract.name in CONTRACTS:
        raise SettingsError(f"FRAUD_CONTRACTS: module {name!r} takes the name {contract.name!r} of another contract")
    return contract


def _models(settings: ContractSettings, chosen: dict[str, Contract]) -> dict[str, str]:
    models: dict[str, str] = {}
    for entry in _parts(settings.models):
        name, _, model = (part.strip() for part in entry.partition("="))
        if not name or not model:
            raise SettingsError(f"FRAUD_CONTRACT_MODELS has {entry!r}; write contract=model")
        if name not in chosen and name not in CONTRACTS:
            raise SettingsError(f"FRAUD_CONTRACT_MODELS names {name!r}; contracts here: {', '.join(chosen) or 'none'}")
        if name in models:
            raise SettingsError(f"FRAUD_CONTRACT_MODELS gives {name!r} two models")
        models[name] = model
    return models


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
