"""Scores of other packages' detectors without labels, in their own environment: `anomaly.py IN.npz OUT.npz`.

IN holds `learn` and `test` (n, n_features) float64 with NaN for missing; OUT gets a vector of scores of `test` for each
detector, higher being more unusual.
"""

import sys
import warnings

import numpy as np
from isotree import IsolationForest
from pyod.models.copod import COPOD
from pyod.models.ecod import ECOD
from pyod.models.hbos import HBOS
from pyod.models.inne import INNE
from pyod.models.knn import KNN
from pyod.models.loda import LODA
from pyod.models.lof import LOF
from pyod.models.pca import PCA

LEARNED = 20_000  # rows that pyod's detectors are fitted on: for some of them the time grows with the square


def main(given: str, found: str) -> None:
    data = np.load(given)
    learn, test = data["learn"], data["test"]
    scores = {
        "isotree": IsolationForest(random_seed=1, nthreads=1).fit(learn).predict(test),
        "isotree, single-variable": IsolationForest(ndim=1, sample_size=256, ntrees=100, random_seed=1, nthreads=1)
        .fit(learn)
        .predict(test),
    }
    some = learn[np.random.default_rng(1).permutation(len(learn))[:LEARNED]]
    median = np.nan_to_num(np.nanmedian(some, axis=0))
    some, filled = (np.where(np.isnan(rows), median, rows) for rows in (some, test))
    scale = np.maximum(some.std(axis=0), 1e-12)
    for detector in (ECOD(), COPOD(), HBOS(), INNE(random_state=1), KNN(), LODA(), LOF(novelty=True), PCA()):
        name = f"pyod {type(detector).__name__}"
        try:
            detector.fit(some / scale)
            scores[name] = detector.decision_function(filled / scale)
        except Exception as error:  # a peer that cannot take these rows is left out, and said to be
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
    np.savez(found, **{name: np.asarray(values, np.float64) for name, values in scores.items()})


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
