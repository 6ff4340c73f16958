"""The bundle: the folder a trained model travels in, checked before anything is built from it.

All of it is text. A manifest names every file with its SHA-256; the digest of the manifest names the
bundle. The two parts, preprocessor (`PREPROCESSOR_FILES`) and model (the rest), may lie in two folders,
as W&B and the Bento store keep them.

To change the format: raise `FORMAT_VERSION`, keep reading the older ones here with a test for each.

A bundle is untrusted. Each file is read once, if it is a plain file within its size limit, and everything is built from
the bytes whose digest was compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from fraud.decisions.policy import Policy
from fraud.detectors.lightgbm.algorithm import LIGHTGBM
from fraud.detectors.protocol import Algorithm
from fraud.detectors.registered import ALGORITHMS, algorithm_of
from fraud.errors import BundleError, RegistryError
from fraud.models.names import Digest, checked_name
from fraud.models.plain_files import KIB, MIB, read_plain
from fraud.models.specification import expect_preprocessor, expect_specification
from fraud.schema import FeatureSpec, Kind

FORMAT_VERSION = 2
MOST_BYTES = {
    "features.json": 4 * MIB,
    "preprocessor.json": 1 * MIB,
    "policy.json": 64 * KIB,
    "model_card.md": 1 * MIB,
    "metrics.json": 1 * MIB,
    "reference.json": 8 * MIB,
    "golden.jsonl": 8 * MIB,
}
"""The files of every bundle, and how large each may be; the algorithm of its detector has further ones."""
PREPROCESSOR_FILES = ("features.json", "preprocessor.json")
MANIFEST, MODEL_YAML = "manifest.json", "model.yaml"
MAX_MANIFEST_BYTES = MAX_MODEL_YAML_BYTES = 1 * MIB
MAX_GOLDEN = 1000
T = TypeVar("T")


class Preprocessor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Statistics of the training data that the features need.

    `amount_quantiles` are the 0 to 99% quantiles of the training amounts, ascending, in currency units;
    empty for a features model.
    """

    amount_quantiles: list[float] = []


class Golden(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request with its exact results, bit for bit; None is a missing value.

    Golden requests of a transaction model follow one another from an empty history. `fraud_probability` is None for a
    detector that is not calibrated.
    """

    instance: msgspec.Raw
    features: list[float | None]
    raw_margin: float
    fraud_probability: float | None
    contributions: list[float]


class DetectorPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The detector in a bundle: its registered algorithm and its files."""

    algorithm: str
    files: list[str]

    @classmethod
    def of(cls, algorithm: Algorithm) -> DetectorPart:
        return cls(algorithm.name, list(algorithm.files))


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The contents and origin of a bundle."""

    name: str
    kind: Kind
    detector: DetectorPart
    files: dict[str, Digest]
    preprocessor_digest: Digest
    features_digest: Digest
    libraries: dict[str, str]
    data: dict[str, Any]
    seed: int
    git_commit: str
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files have been checked and parsed, but not yet verified by scoring."""

    digest: str
    manifest: Manifest
    spec: FeatureSpec
    preprocessor: Preprocessor
    policy: Policy
    algorithm: Algorithm
    detector_files: Mapping[str, bytes]
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
    """Return canonical JSON: sorted keys and a final newline."""
    return msgspec.json.format(msgspec.json.encode(value, order="deterministic"), indent=1) + b"\n"


def preprocessor_digest(files: Mapping[str, str]) -> str:
    """Return the digest of the preprocessor part from the digests of a bundle's files."""
    return sha256(canonical_json({name: files[name] for name in PREPROCESSOR_FILES}))


def most_bytes_of(algorithm: Algorithm) -> dict[str, int]:
    """Return the files of a bundle with a detector of this algorithm, and how large each may be."""
    return {**MOST_BYTES, **algorithm.files}


def model_files() -> list[str]:
    """Return the files that the model part of a bundle may have, whatever its algorithm."""
    files = [name for algorithm in ALGORITHMS.values() for name in most_bytes_of(algorithm)]
    return [MANIFEST, *dict.fromkeys(name for name in files if name not in PREPROCESSOR_FILES)]


def write_bundle(
    folder: Path,
    files: Mapping[str, bytes],
    *,
    algorithm: Algorithm,
    name: str,
    kind: Kind,
    libraries: dict[str, str],
    data: dict[str, Any],
    seed: int,
    git_commit: str,
) -> str:
    """Write the files and their manifest into a new folder and return the bundle's digest."""
    most_bytes = most_bytes_of(algorithm)
    if files.keys() != most_bytes.keys():
        raise BundleError(f"a bundle holds {', '.join(most_bytes)}; {', '.join(files)} were given")
    for file, content in files.items():
        if len(content) > most_bytes[file]:
            raise BundleError(f"{file} has {len(content)} bytes; {most_bytes[file]} are allowed")
    checked_name(name)
    digests = {file: sha256(content) for file, content in sorted(files.items())}
    manifest = canonical_json(
        Manifest(
            name=name,
            kind=kind,
            detector=DetectorPart.of(algorithm),
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
    """Return a bundle's digest and manifest without looking at the other files.

    Raises
    ------
    BundleError
        It is missing, of another format, or does not list a bundle's files.
    """
    content, manifest = _manifest(model_dir)
    return sha256(content), manifest


def _manifest(model_dir: Path) -> tuple[bytes, Manifest]:
    path = model_dir / MANIFEST
    if not path.is_symlink() and not path.exists():
        raise BundleError(f"{model_dir} is no bundle: it has no {MANIFEST}")
    content = read_plain(path, MAX_MANIFEST_BYTES)
    manifest = _upgraded(_parse(content, dict[str, Any], path), path)
    try:
        checked_name(manifest.name)
    except RegistryError as error:
        raise BundleError(f"{path}: {error.message}") from None
    algorithm = algorithm_of(manifest.detector.algorithm)
    if sorted(manifest.detector.files) != sorted(algorithm.files):
        raise BundleError(f"{path}: a detector of {algorithm.name} has the files {', '.join(algorithm.files)}")
    expected = most_bytes_of(algorithm)
    if manifest.files.keys() != expected.keys():
        wrong = sorted(manifest.files.keys() ^ expected.keys())
        raise BundleError(f"{path} lacks or adds {_some(wrong)}; a bundle holds {', '.join(expected)}")
    if manifest.preprocessor_digest != preprocessor_digest(manifest.files):
        raise BundleError(f"{model_dir}: the manifest names another preprocessor than its files are")
    if manifest.features_digest != manifest.files["features.json"]:
        raise BundleError(f"{model_dir}: the manifest names another features.json than is among its files")
    return content, manifest


def read_files(model_dir: Path, preprocessor_dir: Path | None = None) -> tuple[str, Manifest, dict[str, bytes]]:
    """Return a bundle's digest, its manifest, and the bytes of all its files, compared with their digests.

    Raises
    ------
    BundleError
        A file is missing, changed, unexpected, a link, not plain or too large.
    """
    raw, manifest = _manifest(model_dir)
    most_bytes = most_bytes_of(algorithm_of(manifest.detector.algorithm))
    if preprocessor_dir is None or preprocessor_dir == model_dir:
        parts = {model_dir: {*most_bytes}}
    else:
        parts = {model_dir: most_bytes.keys() - PREPROCESSOR_FILES, preprocessor_dir: {*PREPROCESSOR_FILES}}
    content = {MANIFEST: raw}
    for folder, names in parts.items():
        content |= {name: _audited(folder / name, most_bytes[name], manifest.files[name]) for name in sorted(names)}
        _expect_no_other(folder, names | ({MANIFEST} if folder == model_dir else set()))
    return sha256(raw), manifest, content


def read_bundle(model_dir: Path, preprocessor_dir: Path | None = None) -> Bundle:
    """Check and parse a bundle.

    Parameters
    ----------
    model_dir : Path
        The folder with the manifest; the whole bundle if `preprocessor_dir` is not given.
    preprocessor_dir : Path, optional
        The folder of the preprocessor part where it is kept apart.

    Raises
    ------
    BundleError
        A file is missing, changed, unexpected, a link or too large, the format is unknown, or the files are
        inconsistent.
    """
    digest, manifest, content = read_files(model_dir, preprocessor_dir)
    algorithm = algorithm_of(manifest.detector.algorithm)

    def parsed(name: str, type_: type[T]) -> T:
        return _parse(content[name], type_, model_dir / name)

    spec, preprocessor = parsed("features.json", FeatureSpec), parsed("preprocessor.json", Preprocessor)
    if spec.kind != manifest.kind:
        raise BundleError(f"{model_dir}: the manifest says kind {manifest.kind}, features.json says {spec.kind}")
    expect_specification(spec, model_dir / "features.json")
    expect_preprocessor(spec, preprocessor.amount_quantiles, model_dir / "preprocessor.json")
    return Bundle(
        digest=digest,
        manifest=manifest,
        spec=spec,
        preprocessor=preprocessor,
        policy=parsed("policy.json", Policy),
        algorithm=algorithm,
        detector_files={name: content[name] for name in algorithm.files},
        golden=_golden(content["golden.jsonl"], len(spec.features), model_dir / "golden.jsonl"),
        metrics=parsed("metrics.json", dict[str, Any]),
        reference=parsed("reference.json", dict[str, Any]),
    )


def row_of(values: list[float | None]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return a golden row's features as float64, NaN for None."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _golden(content: bytes, n_features: int, path: Path) -> tuple[Golden, ...]:
    lines = content.splitlines()
    if not 1 <= len(lines) <= MAX_GOLDEN:
        raise BundleError(f"{path} has {len(lines)} golden requests; 1 to {MAX_GOLDEN} are allowed")
    golden = tuple(_parse(line, Golden, path) for line in lines)
    for i, row in enumerate(golden):
        if (len(row.features), len(row.contributions)) != (n_features, n_features + 1):
            raise BundleError(
                f"{path}: golden request {i} has {len(row.features)} features and {len(row.contributions)} "
                f"contributions; the specification has {n_features} features"
            )
    return golden


def _audited(path: Path, most_bytes: int, expected: str) -> bytes:
    content = read_plain(path, most_bytes)
    if sha256(content) != expected:
        raise BundleError(f"{path} is changed or truncated: {sha256(content)} arrived, the manifest says {expected}")
    return content


def _expect_no_other(folder: Path, names: set[str]) -> None:
    foreign = list(islice((path.name for path in folder.iterdir() if path.name not in {*names, MODEL_YAML}), 6))
    if foreign:
        raise BundleError(f"{folder} holds files that are not in its manifest: {_some(sorted(foreign))}")
    if (folder / MODEL_YAML).is_symlink() or (folder / MODEL_YAML).exists():
        read_plain(folder / MODEL_YAML, MAX_MODEL_YAML_BYTES)


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(name[:100] for name in names[:most]) + (" and more" if len(names) > most else "")


def _upgraded(manifest: dict[str, Any], path: Path) -> Manifest:
    """Return a manifest of any earlier format in the current one.

    Format 2 names the detector; in format 1 it was always LightGBM's.
    """
    found = manifest.get("format_version", 1)
    if found == 1 and "detector" not in manifest:
        manifest = {**manifest, "format_version": 2, "detector": msgspec.to_builtins(DetectorPart.of(LIGHTGBM))}
    elif found != FORMAT_VERSION:
        raise BundleError(f"{path} has format {found!r}; this release reads the formats 1 to {FORMAT_VERSION}")
    try:
        return msgspec.convert(manifest, Manifest)
    except msgspec.ValidationError as error:
        raise BundleError(f"{path} cannot be read: {error}") from None


def _parse(content: bytes, type_: type[T], path: Path) -> T:
    try:
        return msgspec.json.decode(content, type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from None
