"""Trees whose leaves add up to a raw score: scores and exact contributions, proven against LightGBM's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fraud.detectors.lightgbm.booster import Booster
from fraud.detectors.trees.structure import MAX_CONTRIBUTION_WORK, Forest, UnsupportedModel
from fraud.errors import BundleError

if TYPE_CHECKING:
    from fraud.detectors.trees.treeshap import TreeShap

TOLERANCE = 1e-9  # in the unit of the raw score
WARM_UP_ROWS = 17  # one more than a row at a time is scored
MAX_GOLDEN_ROWS = 32  # compared with LightGBM's own contributions, which take a millisecond a row
PROOF_WORK = 2 * MAX_CONTRIBUTION_WORK  # for all rows compared: a few seconds

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]


class AdditiveTrees:
    """The trees of a text model, ready to score; safe to use from several threads.

    Parameters
    ----------
    forest : Forest
        Checked trees.
    n_features : int, optional
        The number in the specification, which the trees must match.

    Attributes
    ----------
    n_features : int
    contributions_fallback : str or None
        Why contributions come from LightGBM's slow `pred_contrib`; None while the fast kernels are used.

    Raises
    ------
    BundleError
        The trees are of another number of features.
    """

    contributions_fallback: str | None

    def __init__(self, forest: Forest, n_features: int | None = None) -> None:
        if n_features not in (None, forest.n_features):
            raise BundleError(f"the trees are of {forest.n_features} features, the specification of {n_features}")
        from fraud.detectors.trees.scores import TreeScores
        from fraud.detectors.trees.treeshap import TreeShap  # imports numba, which what only reads bundles does without

        self._scores = TreeScores(forest)
        self._shap: TreeShap | None = None
        self.contributions_fallback = None
        try:
            self._shap = TreeShap(forest)
        except UnsupportedModel as error:
            self.contributions_fallback = error.message
        self._booster = Booster(forest)
        self._proven_rows = int(min(MAX_GOLDEN_ROWS, max(1, PROOF_WORK // max(1, forest.contribution_work))))
        self.n_features = self._booster.n_features

    def raw_margin(self, X: Matrix) -> Vector:
        """Return raw scores (n,) float64: bit for bit LightGBM's ``predict(X, raw_score=True)``.

        Parameters
        ----------
        X : ndarray of shape (n, n_features)
            Read as float64; NaN is missing, a categorical feature holds its code.
        """
        return self._scores.raw_scores(self._matrix(X))

    def contributions(self, X: Matrix) -> Matrix:
        """Return SHAP values (n, n_features + 1) float64, the base value last; rows sum to the margin."""
        X = self._matrix(X)
        if self._shap is None:
            return self._booster.contributions(X)
        return self._shap.contributions(X)

    def verify_contributions(self, X_golden: Matrix) -> None:
        """Compare scores and the fast contributions with LightGBM's; use its contributions from then on if they differ.

        Takes up to 32 golden rows (fewer of a very large model) and one variant of each: missing values, zeros,
        infinities, and the exact thresholds of the model's splits.

        Raises
        ------
        BundleError
            A score has other bits than LightGBM's, or base value and contributions miss the margin by more than 1e-9.
        """
        X = self._matrix(X_golden)[: self._proven_rows]
        if self._shap is not None:
            X = np.concatenate([X, _variants(X, self._shap.thresholds)])
        own_scores = np.concatenate([self.raw_margin(X), *(self.raw_margin(row[np.newaxis]) for row in X)])
        if not np.array_equal(own_scores, np.tile(self._booster.raw_margin(X), 2)):
            raise BundleError("the trees do not score as LightGBM scores them")
        if self._shap is not None:
            fast, own = self._shap.contributions(X), self._booster.contributions(X)
            difference = np.abs(fast - own).max(initial=0.0)
            if not difference <= TOLERANCE:
                self._shap = None
                self.contributions_fallback = f"differ from pred_contrib by {difference:.3g} on golden rows"
        difference = np.abs(self.contributions(X).sum(axis=1) - self.raw_margin(X)).max(initial=0.0)
        if not difference <= TOLERANCE:
            raise BundleError(
                f"base value and contributions miss the raw margin by {difference:.3g}; allowed: {TOLERANCE}"
            )

    def warm_up(self) -> None:
        """Load the compiled kernels, LightGBM's and NumPy's code, so that the first call does not wait for them."""
        X = np.zeros((WARM_UP_ROWS, self.n_features))
        for writeable in (True, False):  # there are kernels for either
            X.flags.writeable = writeable
            for rows in (X, X[:1]):
                self.raw_margin(rows)
                self.contributions(rows)

    def _matrix(self, X: Matrix) -> Matrix:
        X = np.ascontiguousarray(X, np.float64)
        if X.ndim != 2 or X.shape[1] != self.n_features:
            raise ValueError(f"X has the shape {X.shape}; the model takes (n, {self.n_features})")
        return X


def _variants(X: Matrix, thresholds: Sequence[Vector]) -> Matrix:
    """Return rows like X (n, n_features) with half of their values replaced by edge cases."""
    rng = np.random.default_rng(0)
    replaced = X.copy()
    for j, values in enumerate(thresholds):
        with np.errstate(over="ignore"):  # a threshold may be the largest number there is
            above = np.nextafter(values, np.inf)
        candidates = np.concatenate([values, above, [np.nan, np.nan, 0.0, -1.0, np.inf, -np.inf]])
        chosen = rng.choice(candidates, len(X))
        replaced[:, j] = np.where(rng.random(len(X)) < 0.5, chosen, replaced[:, j])
    return replaced
