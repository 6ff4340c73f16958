"""Find a model's files from a folder, or from a name and version in the registry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fraud.models.bundle import MANIFEST, Bundle, read_bundle, short
from fraud.models.served import Served
from fraud.settings import ModelSettings

if TYPE_CHECKING:
    from fraud.models.scorer import Scorer

IN_PRODUCTION = ""
"""Means the one model that is in production."""


def bundle_folders(model: str) -> tuple[Path, Path | None]:
    """Return where a model and its preprocessor lie: a bundle or run folder, NAME[:REF] of the registry, or ""."""
    if folder := bundle_folder(model):
        return folder, None
    served = Served(ModelSettings.read())
    return served.folders(_tag_and_digest(served, model)[0])


def bundle_folder(model: str) -> Path | None:
    """Return the bundle's folder if `model` is a bundle or run folder; None if it names a version."""
    if not model:
        return None
    return next((folder for folder in (Path(model), Path(model) / "bundle") if (folder / MANIFEST).is_file()), None)


def load_bundle(model: str) -> Bundle:
    """Return the checked bundle that `model` names."""
    if folder := bundle_folder(model):
        return read_bundle(folder)
    served = Served(ModelSettings.read())
    return served.read(*_tag_and_digest(served, model))


def load_scorer(model: str) -> Scorer:
    """Return the verified model that `model` names."""
    from fraud.models.scorer import Scorer  # takes a second to import

    return Scorer.of(load_bundle(model))


def _tag_and_digest(served: Served, model: str) -> tuple[str, str | None]:
    if not model:
        return next(iter(served.champions().values())), None
    name, _, reference = model.partition(":")
    version = served.registry.resolve(name, reference or served.registry.alias_in_force(name))
    return f"{name}:{short(version.digest)}", version.digest
