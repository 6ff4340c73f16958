"""What the tests share: a small simulated file and the models trained on it, a tiny model, stores and their servers.

`make test` runs one module after the other in each of several processes (pytest-xdist). What is made once for all of
them is made under a lock by the first that needs it.
"""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from fraud.detectors.isolation_forest.algorithm import ISOLATION_FOREST
from fraud.detectors.lightgbm.algorithm import LIGHTGBM
from fraud.detectors.protocol import Algorithm
from fraud.models.scorer import Scorer
from fraud.old_variables import ALTERNATIVES, REFUSED
from fraud.simulation.simulate import simulate_features, simulate_transactions
from fraud.stores.labelling import compile_kernels
from fraud.stores.opening import StoreOptions, open_store
from fraud.stores.protocol import Store
from tests.kafka import Cluster, cluster
from tests.servers import Postgres, Redis, Server, running
from tests.tiny import register_tiny, tiny_anomaly_model, write_tiny_bundle
from training.config import BoosterOptions, Config, ForestOptions
from training.data import Mapping, dataset_digest, load_table
from training.train import Run, train

for _name in (*ALTERNATIVES, *REFUSED):
    os.environ.pop(_name, None)  # a platform may set PORT or DATABASE_URL for another program

EXAMPLES = Path(__file__).parent.parent / "examples"
STORES = ("sqlite", "redis", "postgresql", "redis+postgresql")
PATIENT = {"budget_ms": 5_000.0, "cold_budget_ms": 10_000.0, "durable": False}
NO_SKIPS = "NOTHING_IS_SKIPPED"
"""Set where every part is installed, as in CI: a skipped test then fails the run."""
Once = Callable[[str, Callable[[Path], object]], Path]
TINY = Config(
    rounds=30,
    n_bootstrap=20,
    booster=BoosterOptions(num_leaves=15, min_data_in_leaf=20),
    forest=ForestOptions(trees=25),
)
LONGEST = (
    "test_readme",
    "test_load_run",
    "test_store_faults",
    "test_stores",
    "test_public_tables",
    "test_fuzz_http",
    "test_environment",
    "test_wandb_kill",
    "test_wandb_serve",
    "test_wandb_follow",
)
"""The modules that take longest: they run first, so that no process is left with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_collection_finish() -> None:
    """Keep all that was imported out of later garbage collections, which would take a tenth of the time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get(NO_SKIPS) and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def once(worker_id: str, tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Returns a folder of a name that one process fills and all use."""
    root = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent

    def folder_of(name: str, fill: Callable[[Path], object]) -> Path:
        folder = root / f"once-{name}"
        with FileLock(root / f"once-{name}.lock"):
            if not (folder / "done").exists():
                folder.mkdir()
                fill(folder)
                (folder / "done").touch()
        return folder

    return folder_of


@pytest.fixture(scope="session", autouse=True)
def _compiled(once: Once) -> Path:
    """Compile the kernels in one process, where numba has no cache yet: each process would take 20 s for it."""

    def fill(folder: Path) -> None:
        Scorer.load(write_tiny_bundle(folder / "transaction", "transaction"))
        compile_kernels()

    return once("tiny", fill) / "transaction"


@pytest.fixture(scope="session")
def simulated(once: Once) -> Path:
    """A Parquet file of simulated transactions: 150 customers, 90 days."""
    name = "transactions.parquet"
    return once("simulated", lambda folder: simulate_transactions(150, 90, 3, out=folder / name)) / name


@pytest.fixture(scope="session")
def simulated_features(once: Once) -> Path:
    """A Parquet file of a simulated loan-application table: 4,000 rows."""
    name = "features.parquet"
    return once("simulated-features", lambda folder: simulate_features(4000, 3, out=folder / name)) / name


@pytest.fixture(scope="session")
def transaction_run(simulated: Path, once: Once) -> Run:
    """A finished training of a transaction model."""
    return _trained_once(once, simulated, "simulated.yaml", "fraud-transaction")


@pytest.fixture(scope="session")
def features_run(simulated_features: Path, once: Once) -> Run:
    """A finished training of a feature-vector model."""
    return _trained_once(once, simulated_features, "features.yaml", "fraud-features")


@pytest.fixture(scope="session")
def forest_run(simulated: Path, once: Once) -> Run:
    """A finished training of an isolation forest on transactions without labels."""
    how: dict[str, Any] = {"algorithm": ISOLATION_FOREST, "labelled": False}
    return _trained_once(once, simulated, "simulated.yaml", "fraud-anomaly", **how)


def _trained_once(once: Once, data: Path, example: str, name: str, **how: Any) -> Run:
    def fill(folder: Path) -> None:
        (folder / "run").write_bytes(pickle.dumps(trained(data, example, name, folder, **how)))

    run: Run = pickle.loads((once(f"run-{name}", fill) / "run").read_bytes())
    return run


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
def tiny_bundle(_compiled: Path) -> Path:
    """A transaction bundle trained in a moment; see `tests.tiny`."""
    return _compiled


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


@pytest.fixture(scope="module")
def kafka() -> Iterator[Cluster]:
    with cluster() as broker:
        yield broker


@pytest.fixture(scope="module")
def stream_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Bento store with a tiny model of transactions in production, and one that measures anomalies."""
    home = tmp_path_factory.mktemp("home")
    register_tiny(home, "transaction", "production")
    tiny_anomaly_model(home)
    return home


@pytest.fixture
def stream_environment(stream_home: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a `fraud stream` with that store and a state folder of its own."""
    return {
        **os.environ,
        "BENTOML_HOME": str(stream_home),
        "FRAUD_MODEL": "tiny-transaction",
        "FRAUD_STATE_DIR": str(tmp_path / "state"),
        "FRAUD_LOG_FORMAT": "text",
    }
