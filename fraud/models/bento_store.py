"""Bundles in the Bento store: two models each, written by an atomic rename, so a partial one is never visible."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from fraud.errors import BundleError, RegistryError
from fraud.models.bento_files import write_model
from fraud.models.bundle import (
    MANIFEST,
    MAX_MODEL_YAML_BYTES,
    MODEL_YAML,
    PREPROCESSOR_FILES,
    Bundle,
    Manifest,
    read_bundle,
    read_files,
    read_manifest,
    short,
)
from fraud.models.names import checked_name, checked_tag, is_name
from fraud.models.plain_files import read_plain


def tags_of(digest: str, manifest: Manifest) -> tuple[str, str]:
    """Bento store tags of a bundle: (model, preprocessor)."""
    model = f"{manifest.name}:{short(digest)}"
    return model, f"{manifest.name}-preprocessor:{short(manifest.preprocessor_digest)}"


class BentoStore:
    """The bundles in the Bento store of one BENTOML_HOME.

    Parameters
    ----------
    bentoml_home : Path
        Its ``models`` folder is the store; ``fraud/staging`` beside it holds unfinished imports.
    models : Path, optional
        Another store folder: the one inside a Bento.
    """

    def __init__(self, bentoml_home: Path, models: Path | None = None) -> None:
        self.models = models or bentoml_home / "models"
        self.staging = bentoml_home / "fraud" / "staging"

    def bundle_paths(self, tag: str) -> tuple[Path, Path]:
        """Folders of the model and of its preprocessor, for ``read_bundle(*bundle_paths(tag))``.

        Raises
        ------
        RegistryError
            The store lacks the model or its preprocessor.
        """
        model = self._folder(tag)
        if not (model / MANIFEST).is_file():
            raise RegistryError(f"the Bento store {self.models} has no bundle {tag}")
        digest, manifest = read_manifest(model)
        _, preprocessor_tag = tags_of(digest, manifest)
        preprocessor = self._folder(preprocessor_tag)
        if not preprocessor.is_dir():
            raise RegistryError(f"the Bento store {self.models} has {tag}, but not its {preprocessor_tag}")
        return model, preprocessor

    def read(self, tag: str, digest: str | None = None) -> Bundle:
        """Return the checked bundle of a tag, whose name and digits it must have, and this `digest` if one is given.

        Every file was compared with the manifest; here the manifest is compared with the tag, because someone with
        write access could replace the folder by another consistent bundle.

        Raises
        ------
        RegistryError
            The store does not hold it.
        BundleError
            It is damaged, or another one.
        """
        name, version = checked_tag(tag)
        model, preprocessor = self.bundle_paths(tag)
        bundle = read_bundle(model, preprocessor)
        if (bundle.manifest.name, bundle.version) != (name, version):
            raise BundleError(f"{model} should be {tag}; it holds {bundle.manifest.name}, bundle {bundle.digest}")
        if digest is not None and bundle.digest != digest:
            raise BundleError(f"{model} should be bundle {digest} by the registry; it holds {bundle.digest}")
        if preprocessor.name != short(bundle.manifest.preprocessor_digest):
            raise BundleError(
                f"{preprocessor} should hold the preprocessor {preprocessor.name}; "
                f"it holds {bundle.manifest.preprocessor_digest}"
            )
        return bundle

    def has_folder(self, tag: str) -> bool:
        """Whether a folder exists under this tag, complete or not."""
        return self._folder(tag).is_dir()

    def names(self) -> list[str]:
        """Models in the store, without their preprocessors."""
        if not self.models.is_dir():
            return []
        return sorted(path.name for path in self.models.iterdir() if path.is_dir() and is_name(path.name))

    def versions(self, name: str) -> list[str]:
        """Versions of a model in the store, 16 hexadecimal digits each; a damaged one counts."""
        folder = self.models / checked_name(name)
        return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []

    def holds(self, name: str, digest: str) -> bool:
        """Whether the store has the complete, unchanged bundle; reads every byte of it, needs no network."""
        tag = f"{name}:{short(digest)}"
        if not self._folder(tag).is_dir():
            return False
        try:
            return self.read(tag, digest).digest == digest
        except (BundleError, RegistryError):
            return False

    def import_bundle(self, bundle: Path, facts: Mapping[str, str], preprocessor: Path | None = None) -> str:
        """Import a checked bundle into the store and return its tag; importing again changes nothing.

        Parameters
        ----------
        bundle : Path
            A whole bundle, or its model part. The bytes whose digests are compared here are the bytes that are stored.
        facts : mapping of str to str
            Labels for lineage: run, wandb (the version's path) and so on.
        preprocessor : Path, optional
            The preprocessor part where it lies in another folder.
        """
        digest, manifest, content = read_files(bundle, preprocessor)
        tag, preprocessor_tag = tags_of(digest, manifest)
        labels = {key: value for key, value in facts.items() if value} | {"kind": manifest.kind}
        metadata = {
            "bundle_digest": digest,
            "preprocessor": preprocessor_tag,
            "preprocessor_digest": manifest.preprocessor_digest,
            "features_digest": manifest.features_digest,
            "libraries": dict(manifest.libraries),
            "git_commit": manifest.git_commit,
        }
        parts = (
            (preprocessor_tag, {name: content[name] for name in PREPROCESSOR_FILES}, preprocessor_metadata(manifest)),
            (tag, {name: content[name] for name in content if name not in PREPROCESSOR_FILES}, metadata),
        )
        with self._alone():
            for part, files, facts_of_part in parts:
                if not self._has(part, files):
                    self._put(part, files, labels, facts_of_part)
        return tag

    def label(self, tag: str, facts: Mapping[str, str]) -> None:
        """Add labels to a model in the store, such as its W&B version once known."""
        with self._alone():
            path = self._folder(tag) / MODEL_YAML
            description = yaml.safe_load(read_plain(path, MAX_MODEL_YAML_BYTES))
            if facts.items() <= description["labels"].items():
                return
            description["labels"] |= dict(facts)
            with tempfile.NamedTemporaryFile("w", dir=self.staging, delete=False) as file:
                yaml.safe_dump(description, file, sort_keys=False)
            os.replace(file.name, path)

    def _folder(self, tag: str) -> Path:
        name, _, version = tag.partition(":")
        checked_tag(f"{name.removesuffix('-preprocessor')}:{version}")
        return self.models / name / version

    def _has(self, tag: str, files: Mapping[str, bytes]) -> bool:
        folder = self._folder(tag)
        try:
            read_plain(folder / MODEL_YAML, MAX_MODEL_YAML_BYTES)
            return all(read_plain(folder / name, max(len(content), 1)) == content for name, content in files.items())
        except BundleError:
            return False

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the store's write lock; the leftovers of a killed process in staging are removed."""
        self.staging.mkdir(parents=True, exist_ok=True)
        with FileLock(self.staging.parent / "import.lock"):
            for leftover in self.staging.iterdir():
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield

    def _put(
        self,
        tag: str,
        files: Mapping[str, bytes],
        labels: dict[str, str],
        metadata: dict[str, Any],
    ) -> None:
        """Build one model in a private store on the same disk, then rename it into the real one."""
        private = Path(tempfile.mkdtemp(dir=self.staging))
        write_model(private, tag, files, labels, metadata)
        target = self._folder(tag)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():  # damaged or incomplete: this import repairs it
            os.rename(target, Path(tempfile.mkdtemp(dir=self.staging)) / "damaged")
        stored = private / target.relative_to(self.models)
        os.rename(stored, target)
        os.replace(stored.parent / "latest", target.parent / "latest")


def preprocessor_metadata(manifest: Manifest) -> dict[str, Any]:
    return {"preprocessor_digest": manifest.preprocessor_digest, "features_digest": manifest.features_digest}
