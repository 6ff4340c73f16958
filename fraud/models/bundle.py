"""The bundle: the folder a trained model travels in, audited before anything is built from it.

All of it is text. A manifest names every file with its SHA-256; the digest of the manifest names the
bundle. The two parts, preprocessor (`PREPROCESSOR_FILES`) and model (the rest), may lie in two folders,
as W&B and the Bento store keep them.

To change the format: raise `FORMAT_VERSION`, keep reading the older ones here with a test for each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from fraud.decisions.policy import Policy
from fraud.errors import BundleError
from fraud.schema import FeatureSpec, Kind

FORMAT_VERSION = 1
PREPROCESSOR_FILES = ("features.json", "preprocessor.json")
MODEL_FILES = (
    "booster.txt",
    "calibrator.json",
    "policy.json",
    "model_card.md",
    "metrics.json",
    "reference.json",
    "golden.jsonl",
)
MANIFEST = "manifest.json"
T = TypeVar("T")
MAX_FILE_BYTES = 512 * 1024 * 1024


class Calibrator(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Knots of the isotonic map from raw margin `x` (log-odds) to probability `y`."""

    x: list[float]
    y: list[float]


class Preprocessor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the features need from the training data.

    `amount_quantiles` are the 0 to 99% quantiles of the training amounts, ascending, in currency units;
    empty for a features model.
    """

    amount_quantiles: list[float] = []


class Golden(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request with all that must come out of it, bit for bit; None stands for a missing value.

    Golden requests of a transaction model follow one another from an empty history.
    """

    instance: msgspec.Raw
    features: list[float | None]
    raw_margin: float
    fraud_probability: float
    contributions: list[float]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a bundle is and where it came from."""

    name: str
    kind: Kind
    files: dict[str, str]
    preprocessor_digest: str
    features_digest: str
    libraries: dict[str, str]
    data: dict[str, Any]
    seed: int
    git_commit: str
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files have been audited and parsed; nothing has been scored with it yet."""

    digest: str
    manifest: Manifest
    spec: FeatureSpec
    preprocessor: Preprocessor
    policy: Policy
    calibrator: Calibrator
    booster_text: str
    golden: tuple[Golden, ...]
    metrics: dict[str, Any]
    reference: dict[str, Any]

    @property
    def version(self) -> str:
        """The short name of the version: 16 hexadecimal digits of the digest."""
        return short(self.digest)


def short(digest: str) -> str:
    """Return the first 16 hexadecimal digits of a digest, as in a Bento store's tag."""
    return digest.removeprefix("sha256:")[:16]


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def canonical_json(value: object) -> bytes:
    """Return JSON with sorted keys and a final newline, the same for the same value."""
    return msgspec.json.format(msgspec.json.encode(value, order="deterministic"), indent=1) + b"\n"


def preprocessor_digest(files: Mapping[str, str]) -> str:
    """Return the digest of the preprocessor part from the digests of a bundle's files."""
    return sha256(canonical_json({name: files[name] for name in PREPROCESSOR_FILES}))


def write_bundle(
    folder: Path,
    files: Mapping[str, bytes],
    *,
    name: str,
    kind: Kind,
    libraries: dict[str, str],
    data: dict[str, Any],
    seed: int,
    git_commit: str,
) -> str:
    """Write the files and their manifest into a new folder and return the bundle's digest."""
    expected = {*PREPROCESSOR_FILES, *MODEL_FILES}
    if files.keys() != expected:
        raise BundleError(f"a bundle holds {sorted(expected)}; {sorted(files)} were given")
    digests = {file: sha256(content) for file, content in sorted(files.items())}
    manifest = canonical_json(
        Manifest(
            name=name,
            kind=kind,
            files=digests,
            preprocessor_digest=preprocessor_digest(digests),
            features_digest=digests["features.json"],
            libraries=libraries,
            data=data,
            seed=seed,
            git_commit=git_commit,
        )
    )
    folder.mkdir(parents=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    (folder / MANIFEST).write_bytes(manifest)
    return sha256(manifest)


def read_manifest(model_dir: Path) -> tuple[str, Manifest]:
    """Return a bundle's digest and manifest without looking at the other files."""
    path = model_dir / MANIFEST
    if not path.is_file():
        raise BundleError(f"{model_dir} is no bundle: it has no {MANIFEST}")
    content = _read(path)
    manifest = _parse(content, Manifest, path)
    if manifest.format_version != FORMAT_VERSION:
        raise BundleError(f"{path} has format {manifest.format_version}; this release reads format {FORMAT_VERSION}")
    return sha256(content), manifest


def read_bundle(model_dir: Path, preprocessor_dir: Path | None = None) -> Bundle:
    """Audit and parse a bundle.

    Parameters
    ----------
    model_dir : Path
        The folder with the manifest; the whole bundle if `preprocessor_dir` is not given.
    preprocessor_dir : Path, optional
        The folder of the preprocessor part where it is kept apart.

    Raises
    ------
    BundleError
        A file is missing, changed, foreign, a link or too large, or the format is another one.
    """
    digest, manifest = read_manifest(model_dir)
    content = {
        name: _audited(
            preprocessor_dir if preprocessor_dir and name in PREPROCESSOR_FILES else model_dir, name, manifest
        )
        for name in (*PREPROCESSOR_FILES, *MODEL_FILES)
    }
    if manifest.preprocessor_digest != preprocessor_digest(manifest.files):
        raise BundleError(f"{model_dir}: the manifest names another preprocessor than its files are")
    allowed = {*manifest.files, MANIFEST}
    for folder in filter(None, (model_dir, preprocessor_dir)):
        foreign = sorted(p.name for p in folder.iterdir() if p.name not in allowed and p.name != "model.yaml")
        if foreign:
            raise BundleError(f"{folder} holds files that are not in its manifest: {', '.join(foreign)}")
    spec = _parse(content["features.json"], FeatureSpec, model_dir / "features.json")
    return Bundle(
        digest=digest,
        manifest=manifest,
        spec=spec,
        preprocessor=_parse(content["preprocessor.json"], Preprocessor, model_dir / "preprocessor.json"),
        policy=_parse(content["policy.json"], Policy, model_dir / "policy.json"),
        calibrator=_parse(content["calibrator.json"], Calibrator, model_dir / "calibrator.json"),
        booster_text=content["booster.txt"].decode(),
        golden=tuple(_parse(line, Golden, model_dir / "golden.jsonl") for line in content["golden.jsonl"].splitlines()),
        metrics=_parse(content["metrics.json"], dict[str, Any], model_dir / "metrics.json"),
        reference=_parse(content["reference.json"], dict[str, Any], model_dir / "reference.json"),
    )


def row_of(values: list[float | None]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return a golden row's features as float64, NaN for None."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _audited(folder: Path, name: str, manifest: Manifest) -> bytes:
    expected = manifest.files.get(name)
    if expected is None:
        raise BundleError(f"the manifest does not name {name}")
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{path} is {'a link' if path.is_symlink() else 'missing'}; a bundle holds plain files")
    content = _read(path)
    if sha256(content) != expected:
        raise BundleError(f"{path} is changed or truncated: {sha256(content)} arrived, the manifest says {expected}")
    return content


def _read(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise BundleError(f"{path} has {size} bytes; {MAX_FILE_BYTES} are allowed")
    return path.read_bytes()


def _parse(content: bytes, type_: type[T], path: Path) -> T:
    try:
        return msgspec.json.decode(content, type=type_)
    except msgspec.DecodeError as error:
        raise BundleError(f"{path} cannot be read: {error}") from None
