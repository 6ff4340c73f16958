"""LightGBM's booster over its C API: the library's own numbers, without its Python package.

They prove what the project's own kernels score and explain, and explain what those cannot. Importing ``lightgbm`` would
bring in pandas and scikit-learn where they are installed (2 s, 170 MB); the shared library needs neither.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
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

Matrix = NDArray[np.float64]
_limiting = threading.Lock()


@cache
def _library() -> ctypes.CDLL:
    """Return LightGBM's shared library; its calls release the interpreter lock."""
    spec = importlib.util.find_spec("lightgbm")
    if spec is None or not spec.submodule_search_locations:
        raise BundleError("LightGBM is not installed; install the serve dependencies")
    package = Path(spec.submodule_search_locations[0])
    found = sorted(package.glob("*/lib_lightgbm.*"))
    if not found:
        raise BundleError("the installed LightGBM has no shared library lib_lightgbm; reinstall it")
    library = ctypes.CDLL(str(found[0]))
    library.LGBM_GetLastError.restype = ctypes.c_char_p
    return library


@contextmanager
def _one_thread(library: ctypes.CDLL) -> Iterator[None]:
    """Let the library start no threads: a worker has no use for them, and a process that forks would lose them."""
    most = ctypes.c_int()
    with _limiting:
        _check(library.LGBM_GetMaxThreads(ctypes.byref(most)))
        _check(library.LGBM_SetMaxThreads(ctypes.c_int(1)))
        try:
            yield
        finally:
            _check(library.LGBM_SetMaxThreads(most))


def _check(code: int) -> None:
    if code:
        raise BundleError(f"LightGBM: {_library().LGBM_GetLastError().decode(errors='replace')}")


def _free(booster: ctypes.c_void_p) -> None:
    _library().LGBM_BoosterFree(booster)


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
        library = _library()
        self._handle = ctypes.c_void_p()
        n_iterations, n_features = ctypes.c_int(), ctypes.c_int()
        text = ctypes.c_char_p(write_text(forest).encode())
        with _one_thread(library):
            _check(
                library.LGBM_BoosterLoadModelFromString(text, ctypes.byref(n_iterations), ctypes.byref(self._handle))
            )
        weakref.finalize(self, _free, self._handle)
        _check(library.LGBM_BoosterGetNumFeature(self._handle, ctypes.byref(n_features)))
        self.n_features = n_features.value
        if (self.n_features, n_iterations.value) != (forest.n_features, len(forest.trees)):
            raise BundleError(
                f"LightGBM read {n_iterations.value} trees of {self.n_features} features where "
                f"{len(forest.trees)} of {forest.n_features} were written"
            )
        self._contributions_lock = threading.Lock()

    def raw_margin(self, X: Matrix) -> NDArray[np.float64]:
        """Return LightGBM's own raw scores (n,) of a C-contiguous float64 matrix (n, n_features)."""
        margins = np.empty(len(X))
        self._predict(X, RAW_SCORE, margins)
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
            _library().LGBM_BoosterPredictForMat(
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
