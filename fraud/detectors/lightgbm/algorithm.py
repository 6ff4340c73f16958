"""LightGBM as a registered algorithm: its files, its loader and its fitting."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from fraud.detectors.calibration import Calibrator
from fraud.detectors.lightgbm.model import Model
from fraud.detectors.protocol import Algorithm, Unit
from fraud.errors import BundleError

BOOSTER, CALIBRATOR = "booster.txt", "calibrator.json"
MIB = 1024 * 1024


def detector_files(booster_text: str, calibrator: Calibrator) -> dict[str, bytes]:
    """Return the files of a model."""
    return {BOOSTER: booster_text.encode(), CALIBRATOR: _written(calibrator)}


def load(files: Mapping[str, bytes], n_features: int) -> Model:
    """Return the model that the files hold; raises `BundleError` if they hold none."""
    try:
        text = files[BOOSTER].decode()
    except UnicodeDecodeError as error:
        raise BundleError(f"{BOOSTER} is not UTF-8: {error}") from None
    return Model(text, _calibrator(files), n_features)


def vary(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return files whose probabilities are a tenth lower."""
    calibrator = _calibrator(files)
    return {**files, CALIBRATOR: _written(Calibrator(calibrator.x, [0.9 * y for y in calibrator.y]))}


def _calibrator(files: Mapping[str, bytes]) -> Calibrator:
    try:
        return msgspec.json.decode(files[CALIBRATOR], type=Calibrator)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{CALIBRATOR} cannot be read: {error}") from None


def _written(calibrator: Calibrator) -> bytes:
    return msgspec.json.format(msgspec.json.encode(calibrator), indent=1) + b"\n"


LIGHTGBM = Algorithm(
    name="lightgbm",
    unit=Unit("log-odds", raises="raises the risk", lowers="lowers the risk"),
    files={BOOSTER: 32 * MIB, CALIBRATOR: 4 * MIB},
    load=load,
    vary=vary,
    fitting="training.fit:fit_booster",
)
