"""What the tests share: one small simulated file and the models trained on it, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.config import Booster, Config
from training.data import Mapping, dataset_digest, load_features, load_transactions
from training.simulate import simulate_features, simulate_transactions
from training.train import Run, train_features, train_transactions

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = Config(rounds=30, n_bootstrap=20, booster=Booster(num_leaves=15, min_data_in_leaf=20))


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Parquet file of simulated transactions: 150 customers, 90 days."""
    path = tmp_path_factory.mktemp("simulated") / "transactions.parquet"
    simulate_transactions(150, 90, 3, out=path)
    return path


@pytest.fixture(scope="session")
def simulated_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Parquet file of a simulated loan-application table: 4,000 rows."""
    path = tmp_path_factory.mktemp("simulated") / "features.parquet"
    simulate_features(4000, 3, out=path)
    return path


@pytest.fixture(scope="session")
def transaction_run(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished training of a transaction model."""
    mapping = Mapping.from_yaml(EXAMPLES / "simulated.yaml")
    dataset = {"name": simulated.name, "digest": dataset_digest(simulated)}
    table = load_transactions(simulated, mapping)
    runs = tmp_path_factory.mktemp("runs")
    return train_transactions(table, mapping, TINY, name="fraud-transaction", dataset=dataset, runs=runs)


@pytest.fixture(scope="session")
def features_run(simulated_features: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished training of a feature-vector model."""
    mapping = Mapping.from_yaml(EXAMPLES / "features.yaml")
    dataset = {"name": simulated_features.name, "digest": dataset_digest(simulated_features)}
    table = load_features(simulated_features, mapping)
    runs = tmp_path_factory.mktemp("runs")
    return train_features(table, mapping, TINY, name="fraud-features", dataset=dataset, runs=runs)


@pytest.fixture(scope="session")
def transaction_bundle(transaction_run: Run) -> Path:
    return transaction_run.folder / "bundle"


@pytest.fixture(scope="session")
def bundle_dir(features_run: Run) -> Path:
    """A small feature-vector bundle."""
    return features_run.folder / "bundle"
