"""Which models a service serves, and the location of their bundles."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fraud.errors import RegistryError
from fraud.models.bento_store import BentoStore
from fraud.models.bundle import Bundle, short
from fraud.models.names import PARTS, checked_name, checked_tag
from fraud.models.registry import Registry
from fraud.settings import ModelSettings


@dataclass(frozen=True)
class Packed:
    """The models packed in the running Bento: versions by model name, and the folder of the Bento's store, if any."""

    versions: Mapping[str, str] = field(default_factory=dict)
    store: Path | None = None

    @classmethod
    def of(cls, service: Any) -> Packed:
        """Return the models packed in a service's Bento; none if the service runs from source."""
        bento = service.bento
        if bento is None:
            return cls()
        versions = {model.tag.name: model.tag.version for model in bento.info.all_models}
        own = Path(bento.path) / "models"
        return cls(
            {name: version for name, version in versions.items() if not name.endswith(PARTS)},
            own if own.is_dir() and any(own.iterdir()) else None,
        )


class Served:
    """The models to serve, by settings and by what is in production.

    Parameters
    ----------
    settings : ModelSettings
    packed : Packed, optional

    Attributes
    ----------
    aliases : dict of str to str
        The alias in force of each model whose version the registry decides, as of the last `champions`.
    """

    def __init__(self, settings: ModelSettings, packed: Packed | None = None) -> None:
        self.packed = packed or Packed()
        self.registry = Registry.beside(settings.bentoml_home, settings.alias_order)
        self._settings = settings
        self._stores = [BentoStore(settings.bentoml_home)]
        if self.packed.store is not None:
            self._stores.insert(0, BentoStore(settings.bentoml_home, self.packed.store))
        self._names: dict[str, str] = {}
        self.aliases: dict[str, str] = {}

    @property
    def names(self) -> dict[str, str]:
        """Names of the models with their version from the settings or the Bento, or "" if the registry decides.

        Decided once: a model promoted later does not change which names a running service serves.

        Raises
        ------
        RegistryError
            FRAUD_MODEL is empty, and not exactly one model is in production; or FRAUD_MODEL_VERSION names no version.
        """
        if not self._names:
            wanted = [name.strip() for name in self._settings.names.split(",")] if self._settings.names.strip() else []
            given = {name: version for name, _, version in (item.partition(":") for item in wanted)}
            for name, version in given.items():
                checked_tag(f"{name}:{version}") if version else checked_name(name, what="FRAUD_MODEL: model name")
            packed = [name for name in self.packed.versions if name != self._settings.anomaly_model.partition(":")[0]]
            found = given or dict.fromkeys(packed or [self._in_production()], "")
            first = next(iter(found))
            found[first] = found[first] or self._pinned(first)
            self._names = {name: version or self.packed.versions.get(name, "") for name, version in found.items()}
        return self._names

    def hand_down(self) -> None:
        """Let the workers of this process, also restarted ones, serve what was decided here."""
        self._settings.hand_down(self._settings.names or ",".join(self.names))

    def champions(self) -> dict[str, str]:
        """Return the tags to serve, by the name a request may ask for; the first is the default.

        A name without a version means what the registry's alias in force names, or else the only version in the store.

        Raises
        ------
        RegistryError
            A name has no version in production, and not exactly one in the store.
        """
        tags, aliases = {}, {}
        for name, version in self.names.items():
            if not version:
                found = self.registry.in_force(name)
                version = short(found.digest) if found else self._only_version(name)
                if found:
                    aliases[name] = found.alias
            tags[name] = f"{name}:{version}"
        self.aliases = aliases
        return tags

    def anomaly(self) -> dict[str, str]:
        """Return the tag of the anomaly model by its name, as `champions` does; empty if none is set."""
        name, _, version = self._settings.anomaly_model.strip().partition(":")
        if not name:
            return {}
        checked_tag(f"{name}:{version}") if version else checked_name(name, what="FRAUD_ANOMALY_MODEL: model name")
        version = version or self.packed.versions.get(name, "")
        if not version:
            found = self.registry.in_force(name)
            version = short(found.digest) if found else self._only_version(name)
            if found:
                self.aliases[name] = found.alias
        return {name: f"{name}:{version}"}

    def challengers(self, champions: Mapping[str, str]) -> dict[str, str]:
        """Return the tags that the registry's challenger alias names, by the model they challenge."""
        if not self._settings.shadow and not self._settings.canary_share:
            return {}
        digests = {name: self.registry.digest_of(name, "challenger") for name in champions}
        tags = {name: f"{name}:{short(digest)}" for name, digest in digests.items() if digest}
        return {name: tag for name, tag in tags.items() if tag != champions[name]}

    def followed(self) -> list[str]:
        """Return the models whose version comes from the registry, neither pinned nor packed."""
        anomaly, _, version = self._settings.anomaly_model.strip().partition(":")
        beside = [anomaly] if anomaly and not version and anomaly not in self.packed.versions else []
        return list(dict.fromkeys([*(name for name, version in self.names.items() if not version), *beside]))

    def folders(self, tag: str) -> tuple[Path, Path]:
        """Return the folders of a model and of its preprocessor.

        Raises
        ------
        RegistryError
            No store has them.
        """
        return self._store_of(tag).bundle_paths(tag)

    def read(self, tag: str, digest: str | None = None) -> Bundle:
        """Return the checked bundle of a tag; its digest must be `digest`, or else the one in the registry.

        Raises
        ------
        RegistryError
            No store has it.
        BundleError
            It is damaged, or another bundle.
        """
        name, version = checked_tag(tag)
        return self._store_of(tag).read(tag, digest or self.registry.digest_beginning(name, version))

    def _pinned(self, name: str) -> str:
        """The version of FRAUD_MODEL_VERSION as the Bento store has it, or "" if there is none."""
        reference = self._settings.version.removeprefix("sha256:")
        if not reference or len(reference) >= 16:
            return reference[:16]
        return short(self.registry.resolve(name, reference).digest)

    def _store_of(self, tag: str) -> BentoStore:
        return next((store for store in self._stores if store.has_folder(tag)), self._stores[-1])

    def _in_production(self) -> str:
        names = self.registry.names_in_production() or self._stores[0].names()
        if len(names) == 1:
            return names[0]
        if not names:
            raise RegistryError(
                "no model is in production; train, import and promote one, or pin one with FRAUD_MODEL=name:version"
            )
        raise RegistryError(
            f"{len(names)} models could be served: {', '.join(names)}; say which with FRAUD_MODEL={names[0]}, or all "
            f"with FRAUD_MODEL={','.join(names)}, of which the first answers where a request names none"
        )

    def _only_version(self, name: str) -> str:
        found = self._stores[0].versions(name)
        if len(found) != 1:
            versions = f"versions {', '.join(found)}, none of them in production" if found else "no version"
            raise RegistryError(
                f"the Bento store has {versions} of {name!r}; train, import and promote one, "
                "or pin one with FRAUD_MODEL=name:version"
            )
        return found[0]


def pack(service: Any, settings: ModelSettings) -> None:
    """Return the models that `bentoml build` packs into the Bento; none if there is none to serve."""
    import bentoml

    served = Served(settings)
    with contextlib.suppress(RegistryError):  # serving says what is missing
        for tag in [*served.champions().values(), *served.anomaly().values()]:
            for folder in served.folders(tag):
                service.models.append(bentoml.models.BentoModel(f"{folder.parent.name}:{folder.name}"))
