"""Which models are served: named by a setting, versioned by the registry, kept in the Bento store."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bentoml

from fraud.bundle import read_manifest, short
from fraud.errors import RegistryError
from fraud.registry import Registry
from fraud.settings import Settings


def active_tags(settings: Settings, packed: Mapping[str, str] | None = None) -> dict[str, str]:
    """Bento store tags of the models to serve, by the name a request may ask for; the first is the default.

    ``name:version`` in the settings is a tag already. A name alone is the version packed into the Bento that runs,
    else the one in production by the registry, else the only one that the store has.

    Parameters
    ----------
    packed : mapping of str to str, optional
        Versions by name of the models in the Bento.

    Raises
    ------
    RegistryError
        A name has no version in production, and not exactly one in the store.
    """
    registry = Registry(settings.bentoml_home / "fraud" / "registry.db")
    tags = {}
    for wanted in settings.model.split(","):
        name, _, version = wanted.strip().partition(":")
        if not version and packed and name in packed:
            version = packed[name]
        if not version:
            digest = registry.digest_of(name, "production")
            version = short(digest) if digest else _only_version(name)
        tags[name] = f"{name}:{version}"
    return tags


def _only_version(name: str) -> str:
    try:
        found = sorted(str(model.tag.version) for model in bentoml.models.list(name))
    except bentoml.exceptions.NotFound:
        found = []
    if len(found) != 1:
        versions = f"versions {', '.join(found)}, none of them in production" if found else "no version"
        raise RegistryError(
            f"the Bento store has {versions} of {name!r}; train, import and promote one, "
            "or pin one with FRAUD_MODEL=name:version"
        )
    return found[0]


def bundle_paths(tag: str) -> tuple[Path, Path]:
    """Folders of a model and of its preprocessor in the Bento store.

    Raises
    ------
    RegistryError
        The store lacks one of them.
    """
    model = _folder(tag)
    name = tag.partition(":")[0]
    return model, _folder(f"{name}-preprocessor:{short(read_manifest(model)[1].preprocessor_digest)}")


def _folder(tag: str) -> Path:
    try:
        return Path(bentoml.models.get(tag).path)
    except bentoml.exceptions.NotFound:
        raise RegistryError(f"the Bento store has no {tag}") from None


def packed_versions(service: Any) -> dict[str, str]:
    """Versions by name of the models in the Bento that runs; none when the service runs from its source."""
    bento = service.bento
    return {} if bento is None else {model.tag.name: model.tag.version for model in bento.info.all_models}


def pack(service: Any, settings: Settings) -> None:
    """Name the models that `bentoml build` puts into the Bento; none while there is none to serve."""
    with contextlib.suppress(RegistryError):  # serving says what is missing
        for tag in active_tags(settings).values():
            for folder in bundle_paths(tag):
                service.models.append(bentoml.models.BentoModel(f"{folder.parent.name}:{folder.name}"))
