"""Private parts of other libraries: each is used in one place, and a test fails where an upgrade moves it."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import bentoml
import numpy as np
import wandb
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from fraud.compiling import compiled
from fraud.detectors.trees import lanes
from fraud.models.bento_files import write_model
from fraud.serving.app import FrontedService
from fraud.telemetry.recorder import _Histogram
from wandb_sync.sdk import quiet
from wandb_sync.settings import WandbSettings

ROOT = Path(__file__).parent.parent


def test_a_model_that_is_written_into_a_store_of_our_own_is_bentomls(tmp_path: Path) -> None:
    """What is written through private parts is read by public ones, in a process that knows nothing of them."""
    (tmp_path / "models").mkdir()
    write_model(tmp_path / "models", "some-model:0123456789abcdef", {"a.txt": b"content"}, {"run": "r1"}, {"n": 1})
    assert (tmp_path / "models" / "some-model" / "latest").read_text() == "0123456789abcdef"
    code = (
        "import bentoml; from pathlib import Path\n"
        "model = bentoml.models.get('some-model:latest')\n"
        "assert model.tag.version == '0123456789abcdef' and Path(model.path_of('a.txt')).read_bytes() == b'content'\n"
        "assert model.info.labels == {'run': 'r1'} and model.info.metadata == {'n': 1}\n"
        "assert [str(m.tag) for m in bentoml.models.list()] == ['some-model:0123456789abcdef']\n"
    )
    environment = {**os.environ, "BENTOML_HOME": str(tmp_path), "BENTOML_DO_NOT_TRACK": "True"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_wandb_knows_the_settings_that_bound_it(tmp_path: Path) -> None:
    """An unknown WANDB_X_ variable would be ignored in silence, and the SDK would retry for minutes."""
    environment = WandbSettings.of({"HOME": str(tmp_path)}).environment(tmp_path)
    bounds = {name.removeprefix("WANDB_").lower() for name in environment if name.startswith("WANDB_X_")}
    assert len(bounds) == 9
    assert bounds <= wandb.Settings.model_fields.keys()
    assert {name for name in quiet().model_fields_set if name.startswith("x_")} == {
        "x_disable_stats",
        "x_disable_meta",
        "x_save_requirements",
    }
    assert {"x_stats_pid", "x_stats_sampling_interval"} <= wandb.Settings.model_fields.keys()


def test_wandb_has_the_command_that_sends_an_offline_run() -> None:
    said = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--help"], capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stderr
    assert {"--entity", "--project"} <= set(re.findall(r"--\w+", said.stdout))


def test_lanes_are_eight_numbers_to_numba_and_llvm() -> None:
    """Each instruction that is written in LLVM's terms, compiled and compared with NumPy."""

    @compiled
    def all_of_them(a, b, out):  # type: ignore[no-untyped-def]
        x, y = lanes.load(a, 0), lanes.load(b, 0)
        lanes.store(out, 0, lanes.sub(x, y))
        lanes.store(out, 8, lanes.mul(x, y))
        lanes.store(out, 16, lanes.at_most(x, y))
        lanes.store(out, 24, lanes.fma(x, y, lanes.splat(0.5)))

    a, b, out = np.arange(8.0), np.array([3.0, -1.0, 2.0, 0.25, 9.0, 5.0, 7.0, 1.0]), np.empty(32)
    all_of_them(a, b, out)  # type: ignore[no-untyped-call]
    assert np.array_equal(out, np.concatenate([a - b, a * b, (a <= b).astype(float), a * b + 0.5]))
    assert lanes.WIDTH == 8
    assert lanes.aligned(8).ctypes.data % 64 == 0


def test_prometheus_histograms_take_counts() -> None:
    """`_buckets` and `_sum` of the client: one addition for all values of a batch must be what single ones are."""
    buckets = (0.1, 1.0, 10.0)
    at_once, singly = CollectorRegistry(), CollectorRegistry()
    counted = _Histogram("h", "h", registry=at_once, buckets=buckets)
    observed = Histogram("h", "h", registry=singly, buckets=buckets)
    values = [0.05, 0.1, 0.5, 3.0, 99.0, 100.0]
    counted.add([2, 1, 1, 2], sum(values))
    for value in values:
        observed.observe(value)

    def samples(registry: CollectorRegistry) -> list[str]:
        return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]

    assert samples(at_once) == samples(singly)


def test_bentoml_makes_a_service_of_our_class_and_serves_what_its_to_asgi_returns() -> None:
    """`Service.to_asgi` is no documented seam; `bentoml.service(service_class=...)` is what makes ours."""
    assert list(inspect.signature(bentoml.Service.to_asgi).parameters) == ["self", "is_main"]
    made = bentoml.service(service_class=FrontedService)(type("Plain", (), {}))
    assert type(made) is FrontedService
    assert type(made).to_asgi is not bentoml.Service.to_asgi
    found = importlib.util.find_spec("_bentoml_impl.worker.service")
    assert found is not None
    assert found.origin is not None
    assert "to_asgi(is_main" in Path(found.origin).read_text(), "BentoML's worker serves what to_asgi returns"


def test_private_parts_are_used_where_this_says_and_nowhere_else() -> None:
    used = {}
    for name, pattern in {
        "BentoML": r"bentoml\._internal|_bentoml_\w+",
        "LLVM": r"from llvmlite|import llvmlite",
        "W&B's commands": r"wandb\.cli",
    }.items():
        files = [path for room in ("fraud", "wandb_sync", "training") for path in (ROOT / room).rglob("*.py")]
        files.append(ROOT / "service.py")
        used[name] = {str(path.relative_to(ROOT)) for path in files if re.search(pattern, path.read_text())}
    assert used["BentoML"] == {"fraud/models/bento_files.py"}
    assert used["LLVM"] == {"fraud/detectors/trees/lanes.py"}
    assert used["W&B's commands"] == set()


def test_files_are_locked_by_filelock_but_for_the_writers_turn() -> None:
    """It says why beside it: there the kernel hands over at once."""
    rooms = ("fraud", "wandb_sync", "training", "load_tests")
    found = {path for room in rooms for path in (ROOT / room).rglob("*.py") if "fcntl" in path.read_text()}
    assert {path.name for path in found} == {"sqlite_file.py", "sqlite_log.py", "case_tables.py"}
