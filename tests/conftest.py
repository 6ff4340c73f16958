"""What the tests share: a small simulated file and the models trained on it, a tiny model, stores and their servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fraud.detectors.isolation_forest.algorithm import ISOLATION_FOREST
from fraud.detectors.lightgbm.algorithm import LIGHTGBM
from fraud.detectors.protocol import Algorithm
from fraud.models.scorer import Scorer
from fraud.simulation.simulate import simulate_features, simulate_transactions
from fraud.stores.opening import StoreOptions, open_store
from fraud.stores.protocol import Store
from tests.servers import Postgres, Redis, Server, running
from tests.tiny import write_tiny_bundle
from training.config import BoosterOptions, Config, ForestOptions
from training.data import Mapping, dataset_digest, load_table
from training.train import Run, train

EXAMPLES = Path(__file__).parent.parent / "examples"
STORES = ("sqlite", "redis", "postgresql", "redis+postgresql")
PATIENT = {"budget_ms": 5_000.0, "cold_budget_ms": 10_000.0, "durable": False}
TINY = Config(
    rounds=30,
    n_bootstrap=20,
    booster=BoosterOptions(num_leaves=15, min_data_in_leaf=20),
    forest=ForestOptions(trees=25),
)


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
    return trained(simulated, "simulated.yaml", "fraud-transaction", tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def features_run(simulated_features: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished training of a feature-vector model."""
    return trained(simulated_features, "features.yaml", "fraud-features", tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def forest_run(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished training of an isolation forest on transactions without labels."""
    folder = tmp_path_factory.mktemp("runs")
    return trained(simulated, "simulated.yaml", "fraud-anomaly", folder, algorithm=ISOLATION_FOREST, labelled=False)


def trained(
    data: Path,
    example: str,
    name: str,
    runs: Path,
    *,
    config: Config = TINY,
    algorithm: Algorithm = LIGHTGBM,
    labelled: bool = True,
) -> Run:
    mapping = Mapping.from_yaml(EXAMPLES / example)
    if not labelled:
        mapping = mapping.model_copy(update={"label": None, "label_time": None, "label_delay": None})
    dataset = {"name": data.name, "digest": dataset_digest(data)}
    table = load_table(data, mapping, labelled=labelled)
    return train(table, mapping, config, name=name, dataset=dataset, runs=runs, algorithm=algorithm)


@pytest.fixture(scope="session")
def transaction_bundle(transaction_run: Run) -> Path:
    return transaction_run.folder / "bundle"


@pytest.fixture(scope="session")
def bundle_dir(features_run: Run) -> Path:
    """A small feature-vector bundle."""
    return features_run.folder / "bundle"


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transaction bundle trained in a moment; see `tests.tiny`."""
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "transaction", "transaction")


@pytest.fixture(scope="session")
def scorer(tiny_bundle: Path) -> Scorer:
    """The tiny transaction model."""
    return Scorer.load(tiny_bundle)


@pytest.fixture(scope="module")
def redis_server() -> Iterator[Server]:
    with running(Redis) as server:
        yield server


@pytest.fixture(scope="module")
def postgres_server() -> Iterator[Server]:
    with running(Postgres) as server:
        yield server


@pytest.fixture(params=STORES)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    """Opens one and the same store, as several workers would."""
    kind: str = request.param
    if kind == "sqlite":
        return lambda: open_store("sqlite:", StoreOptions(tmp_path, durable=False))
    first, _, behind = kind.partition("+")
    fixture = {"redis": "redis_server", "postgresql": "postgres_server"}
    url = request.getfixturevalue(fixture[first]).url
    cold = request.getfixturevalue(fixture[behind]).url if behind else None
    return lambda: open_store(url, StoreOptions(tmp_path, cold_store=cold, **PATIENT))  # type: ignore[arg-type]
