"""The contract of a detector, run over every registered algorithm; and the bundles that name them, of every format."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fraud.checks.hostile import try_bundle
from fraud.checks.mutations import MUTATORS
from fraud.detectors.calibration import Calibrator
from fraud.detectors.explain import Explainer
from fraud.detectors.protocol import Algorithm, Detector, Matrix, Unit
from fraud.detectors.registered import ALGORITHMS, algorithm_of
from fraud.errors import BundleError
from fraud.models.bundle import FORMAT_VERSION, MANIFEST, canonical_json, read_bundle
from fraud.models.scorer import Scorer
from fraud.schema import Feature, FeatureSpec, Row
from tests.tiny import write_tiny_bundle
from training.config import BoosterOptions, Config
from training.splits import split_by_order

OLD = Path(__file__).parent / "bundles" / "written_by_9521b23"
OLD_VERSIONS = {"transaction": "030b56e728dc20c3", "features": "8c8a35f565f64eb4"}
SPEC = FeatureSpec(
    "features",
    (
        *(Feature(f"x{i}", "request", missing=True) for i in range(5)),
        Feature("colour", "request", "categorical", ("blue", "green", "red"), missing=True),
    ),
)
KNOTS = Calibrator([-2.0, 0.0, 2.0], [0.05, 0.4, 0.95])


@dataclass(frozen=True)
class Made:
    """A detector fitted by its own registration, and the files that it was loaded from."""

    algorithm: Algorithm
    files: dict[str, bytes]
    detector: Detector
    X: Matrix


@pytest.fixture(scope="module", params=list(ALGORITHMS.values()), ids=list(ALGORITHMS))
def made(request: pytest.FixtureRequest) -> Made:
    algorithm: Algorithm = request.param
    rng = np.random.default_rng(3)
    X = rng.normal(size=(1500, 6))
    X[:, 5] = rng.integers(0, 3, 1500)
    y = (X[:, 0] + X[:, 1] * X[:, 2] + (X[:, 5] == 2) + rng.normal(size=1500) > 1.5).astype(np.int8)
    X[rng.random(X.shape) < 0.1] = np.nan
    config = Config(rounds=15, booster=BoosterOptions(num_leaves=7, min_data_in_leaf=10))
    fitted = algorithm.fit()(X, y, split_by_order(1500, (0.2, 0.2, 0.2)), SPEC, config)
    files = fitted.files(KNOTS)
    return Made(algorithm, files, algorithm.load(files, 6), np.concatenate([X[:200], hard(6)]))


def hard(n: int) -> Matrix:
    """Rows of values that are easily gotten wrong."""
    odd = [np.nan, 0.0, -0.0, 1e-36, np.inf, -np.inf, 1.7e308, -1.0, 2.9, 31.0, 2147483648.0]
    return np.random.default_rng(4).choice(odd, size=(60, n))


def test_its_files_are_those_that_it_registered(made: Made) -> None:
    assert made.files.keys() == made.algorithm.files.keys()
    assert all(0 < len(content) <= made.algorithm.files[name] for name, content in made.files.items())
    assert made.detector.n_features == 6
    assert algorithm_of(made.algorithm.name) is made.algorithm


def test_a_row_has_the_same_bits_alone_and_in_any_batch_layout_and_thread(made: Made) -> None:
    X = made.X
    expected = made.detector.raw_margin(X)
    contributions = made.detector.contributions(X)
    assert expected.shape == (len(X),)
    assert contributions.shape == (len(X), 7)
    assert expected.dtype == contributions.dtype == np.float64
    for n in (1, 3, 8, 17, len(X)):
        parts = [X[i : i + n] for i in range(0, len(X), n)]
        assert np.array_equal(np.concatenate([made.detector.raw_margin(part) for part in parts]), expected)
        assert np.array_equal(np.concatenate([made.detector.contributions(part) for part in parts]), contributions)
    assert np.array_equal(made.detector.raw_margin(np.asfortranarray(X)), expected)
    assert made.detector.raw_margin(X[:0]).shape == (0,)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(made.detector.contributions, [X] * 12):
            assert np.array_equal(found, contributions)


def test_contributions_add_up_to_the_raw_score(made: Made) -> None:
    contributions = made.detector.contributions(made.X)
    np.testing.assert_allclose(contributions.sum(axis=1), made.detector.raw_margin(made.X), rtol=0, atol=1e-9)
    assert len(set(contributions[:, -1])) == 1, "there is one base value"
    made.detector.verify_contributions(made.X[:64])
    assert made.detector.contributions_fallback is None


def test_probabilities_rise_with_the_raw_score_and_stay_between_0_and_1(made: Made) -> None:
    scores = np.concatenate([[-1e9], np.sort(made.detector.raw_margin(made.X)), [1e9]])
    probabilities = made.detector.decision_score(scores)
    assert (np.diff(probabilities) >= 0).all()
    assert probabilities[0] >= 0
    assert probabilities[-1] <= 1


@pytest.mark.parametrize("method", ["raw_margin", "contributions"])
def test_refuses_rows_of_another_shape(made: Made, method: str) -> None:
    for wrong in (np.zeros((2, 5)), np.zeros(6)):
        with pytest.raises(ValueError, match="the model takes"):
            getattr(made.detector, method)(wrong)


def test_refuses_files_of_another_number_of_features(made: Made) -> None:
    with pytest.raises(BundleError, match="6 features, the specification of 7"):
        made.algorithm.load(made.files, 7)


def test_varied_files_are_another_detector_with_the_same_scores(made: Made) -> None:
    varied = made.algorithm.load(made.algorithm.vary(made.files), 6)
    scores = made.detector.raw_margin(made.X)
    assert np.array_equal(varied.raw_margin(made.X), scores)
    assert (varied.decision_score(scores) != made.detector.decision_score(scores)).all()


@pytest.mark.parametrize(
    ("made", "file"),
    [(algorithm, file) for algorithm in ALGORITHMS.values() for file in algorithm.files],
    ids=lambda value: getattr(value, "name", value),
    indirect=["made"],
)
def test_broken_files_are_refused_and_end_no_process(made: Made, file: str, tmp_path: Path) -> None:
    for i in range(40):
        rng = random.Random(i)
        changed = {**made.files, file: rng.choice(MUTATORS)(made.files[file], rng)}
        tried = try_bundle(tmp_path, lambda _, changed=changed: made.algorithm.load(changed, 6))  # type: ignore[misc]
        assert tried.outcome in ("refused", "accepted"), tried


def test_loading_and_scoring_import_nothing_of_training(made: Made, tmp_path: Path) -> None:
    for name, content in made.files.items():
        (tmp_path / name).write_bytes(content)
    code = (
        "import sys; from pathlib import Path; import numpy as np\n"
        "from fraud.detectors.registered import algorithm_of\n"
        "files = {path.name: path.read_bytes() for path in Path(sys.argv[2]).iterdir()}\n"
        "detector = algorithm_of(sys.argv[1]).load(files, 6); detector.warm_up()\n"
        "detector.contributions(np.zeros((1, 6)))\n"
        "assert not {'lightgbm', 'pandas', 'sklearn', 'scipy.stats', 'shap', 'training'} & set(sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, made.algorithm.name, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_reasons_are_worded_in_the_detectors_own_effect(made: Made) -> None:
    unit = Unit("nats", raises="makes it stranger", lowers="makes it more usual")
    contributions = made.detector.contributions(made.X[:1])[0]
    row = Row(None, (), b"{}")
    reasons = Explainer(SPEC, unit).reasons(made.X[0], contributions, row)
    assert {reason.text.partition(", which ")[2] for reason in reasons} <= {unit.raises, unit.lowers}
    own = Explainer(SPEC, made.algorithm.unit).reasons(made.X[0], contributions, row)
    assert all(made.algorithm.unit.raises in r.text or made.algorithm.unit.lowers in r.text for r in own)


def test_no_other_algorithm_is_known() -> None:
    with pytest.raises(BundleError, match="no algorithm 'forest'; this release has lightgbm"):
        algorithm_of("forest")


# Bundles name their detector


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_tiny_bundle(tmp_path / "bundle", "features")


def manifest_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    return content


def test_a_manifest_names_the_algorithm_and_its_files(bundle: Path) -> None:
    manifest = manifest_of(bundle)
    assert manifest["format_version"] == FORMAT_VERSION == 2
    assert manifest["detector"] == {"algorithm": "lightgbm", "files": ["booster.txt", "calibrator.json"]}
    assert read_bundle(bundle).detector_files.keys() == {"booster.txt", "calibrator.json"}


@pytest.mark.parametrize(
    ("detector", "said"),
    [
        ({"algorithm": "pickle", "files": ["booster.txt"]}, "no algorithm 'pickle'"),
        ({"algorithm": "lightgbm", "files": ["booster.txt"]}, "has the files booster.txt, calibrator.json"),
        ({"algorithm": "lightgbm", "files": ["../../etc/passwd"]}, "has the files booster.txt, calibrator.json"),
        ({"algorithm": "lightgbm"}, "missing required field `files`"),
        (None, "cannot be read"),
    ],
)
def test_a_detector_that_is_none_is_refused(bundle: Path, detector: object, said: str) -> None:
    (bundle / MANIFEST).write_bytes(canonical_json(manifest_of(bundle) | {"detector": detector}))
    with pytest.raises(BundleError, match=said):
        read_bundle(bundle)


@pytest.mark.parametrize("kind", ["transaction", "features"])
def test_a_bundle_of_format_1_loads_as_before(kind: str) -> None:
    """As 9521b23 wrote it: the same digest, and every golden row bit for bit."""
    scorer = Scorer.load(OLD / kind)
    assert manifest_of(OLD / kind)["format_version"] == 1
    assert scorer.bundle.algorithm.name == "lightgbm"
    assert scorer.name.version == OLD_VERSIONS[kind]
    assert len(scorer.bundle.golden) == 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 3}, "has format 3; this release reads the formats 1 to 2"),
        ({"format_version": "1"}, "has format '1'"),
        ({"detector": {"algorithm": "lightgbm", "files": []}}, "has format 1"),
    ],
)
def test_a_manifest_of_no_known_format_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(OLD / "features", folder)
    (folder / MANIFEST).write_bytes(canonical_json(manifest_of(folder) | change))
    with pytest.raises(BundleError, match=said):
        read_bundle(folder)
