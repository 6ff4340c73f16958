"""The algorithms that bundles may name: one line each."""

from __future__ import annotations

from fraud.detectors.isolation_forest.algorithm import ISOLATION_FOREST
from fraud.detectors.lightgbm.algorithm import LIGHTGBM
from fraud.detectors.protocol import Algorithm
from fraud.errors import BundleError

ALGORITHMS: dict[str, Algorithm] = {algorithm.name: algorithm for algorithm in (LIGHTGBM, ISOLATION_FOREST)}


def algorithm_of(name: str) -> Algorithm:
    """Return a registered algorithm.

    Raises
    ------
    BundleError
        No algorithm has this name.
    """
    if name not in ALGORITHMS:
        raise BundleError(f"no algorithm {name[:100]!r}; this release has {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]
