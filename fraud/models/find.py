"""From what a person calls a model to its files: a folder, or a name and version of the registry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fraud.models.bento_store import BentoStore
from fraud.models.bundle import MANIFEST, Bundle, read_bundle, short
from fraud.models.registry import Registry
from fraud.settings import Settings

if TYPE_CHECKING:
    from fraud.models.scorer import Scorer


def bundle_folders(model: str) -> tuple[Path, Path | None]:
    """Return where a model and its preprocessor lie: a bundle or run folder, or NAME[:REF] of the registry."""
    if folder := bundle_folder(model):
        return folder, None
    name, _, reference = model.partition(":")
    home = Settings.read().models.bentoml_home
    version = Registry(home / "fraud" / "registry.db").resolve(name, reference or "production")
    return BentoStore(home).bundle_paths(f"{name}:{short(version.digest)}")


def bundle_folder(model: str) -> Path | None:
    """Return the bundle's folder where `model` is one, or a run's; None where it names a version."""
    return next((folder for folder in (Path(model), Path(model) / "bundle") if (folder / MANIFEST).is_file()), None)


def load_bundle(model: str) -> Bundle:
    """Return the audited bundle that `model` names."""
    return read_bundle(*bundle_folders(model))


def load_scorer(model: str) -> Scorer:
    """Return the verified model that `model` names."""
    from fraud.models.scorer import Scorer  # takes a second to import

    return Scorer.load(*bundle_folders(model))
