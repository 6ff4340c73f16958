"""LightGBM as a registered algorithm: its files, its loader and its fitting."""

from __future__ import annotations

from collections.abc import Mapping

from fraud.detectors.calibration import CALIBRATOR, UNCALIBRATED, Calibrator, lowered, read_calibrator, write_calibrator
from fraud.detectors.lightgbm.model import Model
from fraud.detectors.protocol import Algorithm, Unit
from fraud.errors import BundleError

BOOSTER = "booster.txt"
MIB = 1024 * 1024


def detector_files(booster_text: str, calibrator: Calibrator | None) -> dict[str, bytes]:
    """Return the files of a model; without a calibrator, of one whose raw scores alone mean something."""
    return {BOOSTER: booster_text.encode(), CALIBRATOR: write_calibrator(calibrator or UNCALIBRATED)}


def load(files: Mapping[str, bytes], n_features: int) -> Model:
    """Return the model that the files hold; raises `BundleError` if they hold none."""
    try:
        text = files[BOOSTER].decode()
    except UnicodeDecodeError as error:
        raise BundleError(f"{BOOSTER} is not UTF-8: {error}") from None
    return Model(text, _calibrator(files), n_features)


def vary(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return files whose probabilities are a tenth lower."""
    return {**files, CALIBRATOR: write_calibrator(lowered(_calibrator(files)))}


def _calibrator(files: Mapping[str, bytes]) -> Calibrator:
    calibrator = read_calibrator(files[CALIBRATOR])
    if calibrator is None:
        raise BundleError(f"{CALIBRATOR} is null; the margins of LightGBM need a calibration")
    return calibrator


LIGHTGBM = Algorithm(
    name="lightgbm",
    unit=Unit("log-odds", raises="raises the risk", lowers="lowers the risk"),
    files={BOOSTER: 32 * MIB, CALIBRATOR: 4 * MIB},
    load=load,
    vary=vary,
    fitting="training.fit:fit_booster",
    reads_labels=True,
)
