"""What a machine's environment may hold without harm: proxies, a broken netrc, W&B's saved settings, a sweep."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from fraud.checks.servers import free_port
from tests.test_cli import run_in_a_process
from tests.wandb_machine import Machine, collection
from tests.wandb_runs import NAME, make_run
from tests.wandb_server import WandbServer
from wandb_sync.settings import WandbSettings


@contextmanager
def ready_service() -> Iterator[int]:
    """A port where everything is answered with 200."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield server.server_address[1]
        server.shutdown()
        serving.join()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_no_proxy_is_asked_for_this_machine(host: str, tiny_bundle: Path) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    proxies = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"), nowhere)
    with ready_service() as port:
        url = f"http://{host}:{port}"
        done = run_in_a_process("", "try", "--url", url, "--model", tiny_bundle, "--wait", 0, **proxies)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"curl -s {url}/predict")


def test_a_url_that_is_none_is_one_message(tiny_bundle: Path) -> None:
    done = run_in_a_process("", "try", "--url", "localhost:3000", "--model", tiny_bundle, "--wait", 0)
    assert done.returncode == 1
    assert "give one such as http://localhost:3000" in done.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"machine api.wandb.ai\n  login user\n  pasword kkk\n", "in line 3"),
        (b"\xff\xfe\x00m\x00a", "cannot be read"),
    ],
)
def test_a_malformed_netrc_stops_no_command_and_is_told_where_the_key_is_missed(
    content: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_bytes(content)
    machine = Machine(tmp_path, None)
    done = machine.run("models")
    assert done.returncode == 0, done.stdout
    pushed = machine.run("push", make_run(tmp_path / "runs", 1))
    assert pushed.returncode == 75
    assert f"W&B is off ({tmp_path}/.netrc cannot be read" in pushed.stdout
    assert said in pushed.stdout
    assert "Traceback" not in pushed.stdout
    assert WandbSettings.of({"HOME": str(tmp_path), "WANDB_API_KEY": "k" * 40}).online


def test_the_host_of_wandb_login_is_used_and_its_key_found_by_port(tmp_path: Path) -> None:
    (tmp_path / ".config" / "wandb").mkdir(parents=True)
    (tmp_path / ".config" / "wandb" / "settings").write_text("[default]\nbase_url = http://wandb.local:8080/\n")
    (tmp_path / ".netrc").write_text(
        "machine wandb.local:8080\n  login user\n  password kkk\ndefault login a password b\n"
    )
    settings = WandbSettings.of({"HOME": str(tmp_path), "WANDB_DIR": str(tmp_path)})
    assert (settings.base_url, settings.online) == ("http://wandb.local:8080", True)
    environment = settings.environment(tmp_path / "sdk")
    assert (environment["WANDB_BASE_URL"], environment["WANDB_API_KEY"]) == ("http://wandb.local:8080", "kkk")
    elsewhere = WandbSettings.of({"HOME": str(tmp_path), "WANDB_BASE_URL": "http://other"})
    assert elsewhere.base_url == "http://other"
    assert not elsewhere.online, "the netrc file's default entry is no key of W&B"
    assert elsewhere.offline_because == f"no WANDB_API_KEY, and no key of other in {tmp_path}/.netrc"


def test_what_wandb_init_saved_in_the_working_folder_wins_over_the_user_and_variables_over_both(tmp_path: Path) -> None:
    user, folder = tmp_path / "user", tmp_path / "work"
    for place, text in (
        (user, "[default]\nentity = mine\nproject = everywhere\n"),
        (folder / "wandb", "[default]\nproject = here\nmode = offline\n"),
    ):
        place.mkdir(parents=True)
        (place / "settings").write_text(text)
    known = {"WANDB_CONFIG_DIR": str(user), "WANDB_DIR": str(folder), "WANDB_API_KEY": "k", "HOME": str(tmp_path)}
    settings = WandbSettings.of(known)
    assert (settings.entity, settings.project, settings.online) == ("mine", "here", False)
    assert settings.offline_because == "WANDB_MODE=offline"
    assert WandbSettings.of(known | {"WANDB_MODE": "online"}).online
    (folder / "wandb" / "settings").write_text("no section\n")
    assert WandbSettings.of(known).project == "everywhere"


def test_a_run_under_a_sweeps_variables_is_found_again(tmp_path: Path) -> None:
    with WandbServer() as server:
        machine = Machine(tmp_path, server)
        machine.environment |= {
            "WANDB_RUN_ID": "theirs",
            "WANDB_RESUME": "must",
            "WANDB_SWEEP_ID": "s1",
            "WANDB_SWEEP_PARAM_PATH": str(tmp_path / "none.yaml"),
            "WANDB_JOB_TYPE": "sweep",
            "WANDB_NAME": "theirs",
        }
        pushed = machine.run("push", make_run(tmp_path / "runs", 1))
        assert pushed.returncode == 0, pushed.stdout
        assert machine.run("push", "--pending").returncode == 0
        (version,) = collection(server, NAME).committed()
        (found,) = machine.models.lineage(NAME)
        assert found["logged_by"] not in (None, "theirs")
        assert version.state == "COMMITTED"
        unknown = machine.run("lineage", "nobody")
        assert unknown.returncode == 1
        assert "has no version of a model 'nobody'; this machine's registry knows fraud-features" in unknown.stdout
