"""LightGBM's booster over its C API: the library's own numbers, without its Python package.

Importing ``lightgbm`` brings in pandas and scikit-learn where they are installed (2 s, 170 MB), and its ``predict``
costs more than the prediction of one row; the shared library needs neither.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
import weakref
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fraud.detectors.lightgbm.text import write_text
from fraud.detectors.trees.structure import Forest
from fraud.errors import BundleError

FLOAT64 = 1  # C_API_DTYPE_FLOAT64
RAW_SCORE, CONTRIBUTIONS = 1, 3  # C_API_PREDICT_RAW_SCORE, C_API_PREDICT_CONTRIB
ALL_ITERATIONS = (0, -1)  # a saved model holds only the iterations that `predict` uses
PARAMETERS = b"num_threads=1 verbosity=-1"
FEW_ROWS = 16  # up to here single-row calls beat one call for all, which first parses its parameters (15 µs)

Matrix = NDArray[np.float64]


@cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.PyDLL]:
    """Return LightGBM's shared library twice: calls that release the interpreter lock, and calls that keep it."""
    spec = importlib.util.find_spec("lightgbm")
    if spec is None or not spec.submodule_search_locations:
        raise BundleError("LightGBM is not installed; install the serve dependencies")
    package = Path(spec.submodule_search_locations[0])
    found = sorted(package.glob("*/lib_lightgbm.*"))
    if not found:
        raise BundleError("the installed LightGBM has no shared library lib_lightgbm; reinstall it")
    library, holding = ctypes.CDLL(str(found[0])), ctypes.PyDLL(str(found[0]))
    for handle in (library, holding):
        handle.LGBM_GetLastError.restype = ctypes.c_char_p
    holding.LGBM_BoosterPredictForMatSingleRowFast.argtypes = [ctypes.c_void_p] * 4
    return library, holding


def _check(code: int) -> None:
    if code:
        raise BundleError(f"LightGBM: {_libraries()[0].LGBM_GetLastError().decode(errors='replace')}")


def _free(row_config: ctypes.c_void_p, booster: ctypes.c_void_p) -> None:
    library, _ = _libraries()
    library.LGBM_FastConfigFree(row_config)
    library.LGBM_BoosterFree(booster)


class Booster:
    """A LightGBM model, made by the library from checked trees; safe to use from several threads.

    Every call runs on the calling thread alone (``num_threads=1``): waking other threads costs more than scoring a row.

    Parameters
    ----------
    forest : Forest

    Raises
    ------
    BundleError
        LightGBM is not installed, or refuses the trees.
    """

    def __init__(self, forest: Forest) -> None:
        library, holding = _libraries()
        self._handle, self._row_config = ctypes.c_void_p(), ctypes.c_void_p()
        n_iterations, n_features = ctypes.c_int(), ctypes.c_int()
        _check(
            library.LGBM_BoosterLoadModelFromString(
                ctypes.c_char_p(write_text(forest).encode()), ctypes.byref(n_iterations), ctypes.byref(self._handle)
            )
        )
        weakref.finalize(self, _free, self._row_config, self._handle)
        _check(library.LGBM_BoosterGetNumFeature(self._handle, ctypes.byref(n_features)))
        self.n_features = n_features.value
        if (self.n_features, n_iterations.value) != (forest.n_features, len(forest.trees)):
            raise BundleError(
                f"LightGBM read {n_iterations.value} trees of {self.n_features} features where "
                f"{len(forest.trees)} of {forest.n_features} were written"
            )
        _check(
            library.LGBM_BoosterPredictForMatSingleRowFastInit(
                self._handle,
                ctypes.c_int(RAW_SCORE),
                *map(ctypes.c_int, ALL_ITERATIONS),
                ctypes.c_int(FLOAT64),
                ctypes.c_int32(self.n_features),
                ctypes.c_char_p(PARAMETERS),
                ctypes.byref(self._row_config),
            )
        )
        self._predict_row = holding.LGBM_BoosterPredictForMatSingleRowFast
        self._written = ctypes.c_int64()
        self._written_at = ctypes.addressof(self._written)
        self._contributions_lock = threading.Lock()

    def raw_margin(self, X: Matrix) -> NDArray[np.float64]:
        """Return the raw scores (n,) of a C-contiguous float64 matrix (n, n_features)."""
        margins = np.empty(len(X))
        if len(X) > FEW_ROWS:
            self._predict(X, RAW_SCORE, margins)
            return margins
        # The interpreter lock stays held for these microseconds: releasing it could cost a turn of 5 ms.
        row, out = X.ctypes.data, margins.ctypes.data
        for _ in range(len(X)):
            _check(self._predict_row(self._row_config, row, self._written_at, out))
            row += 8 * self.n_features
            out += 8
        return margins

    def contributions(self, X: Matrix) -> Matrix:
        """Return LightGBM's own SHAP values (n, n_features + 1), the base value last: exact, and slow."""
        contributions = np.empty((len(X), self.n_features + 1))
        with self._contributions_lock:  # LightGBM notes the trees' depths in the model while it predicts
            self._predict(X, CONTRIBUTIONS, contributions)
        return contributions

    def _predict(self, X: Matrix, kind: int, out: NDArray[np.float64]) -> None:
        written = ctypes.c_int64()
        _check(
            _libraries()[0].LGBM_BoosterPredictForMat(
                self._handle,
                ctypes.c_void_p(X.ctypes.data),
                ctypes.c_int(FLOAT64),
                ctypes.c_int32(len(X)),
                ctypes.c_int32(self.n_features),
                ctypes.c_int(1),  # row major
                ctypes.c_int(kind),
                *map(ctypes.c_int, ALL_ITERATIONS),
                ctypes.c_char_p(PARAMETERS),
                ctypes.byref(written),
                ctypes.c_void_p(out.ctypes.data),
            )
        )
        if written.value != out.size:
            raise BundleError(f"LightGBM wrote {written.value} numbers where {out.size} belong")
