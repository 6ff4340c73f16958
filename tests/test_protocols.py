"""Clients of other systems, unmodified, against a real server: one transaction has one probability and one decision."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bentoml
import numpy as np
import pytest
import requests

from fraud.checks.carriers import CARRIERS, OWN, Carrier
from fraud.decisions.verdict import Verdict
from fraud.models.scorer import ModelName
from fraud.pipeline.rows import Decision
from fraud.serving.contracts.bank_transaction import score_of
from fraud.serving.contracts.merchant_form import MerchantForm
from fraud.serving.security import new_key
from fraud.settings import ContractSettings
from fraud.simulation.simulate import simulate_transactions
from tests.conftest import EXAMPLES
from tests.servers import bentoml_serve
from tests.tiny import form_rows, ready_rows, store_of_tiny_models, tiny_form_model, transactions
from training.data import Mapping, load_table
from training.replay import further_features

CLIENTS = Path(sys.prefix) / "clients" / "bin" / "python"
KEPT_BY_A_BANK = ("transaction_id", "event_time", "customer_id", "amount", "device_id", "category")
SCORER, KEY = new_key(["score"])
SLOW, SLOW_KEY = new_key(["score"], rate=0.001, burst=1)
READER, READER_KEY = new_key(["read"])


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three models: of transactions, of ready features, and of the merchant's form."""
    home = tmp_path_factory.mktemp("home")
    environment = store_of_tiny_models(home)
    bank = {"FRAUD_BANK_HIGH_ABOVE": "0.5", "FRAUD_BANK_MEDIUM_ABOVE": "0.3", "FRAUD_BANK_FRAUD_ABOVE": "0.45"}
    keys = " ".join(key.line() for key in (KEY, SLOW_KEY, READER_KEY))
    return {
        **environment,
        **bank,
        "FRAUD_MODEL": f"{environment['FRAUD_MODEL']},{tiny_form_model(home)}",
        "FRAUD_DURABLE": "false",
        "FRAUD_API_KEYS": keys,
    }


@pytest.fixture(scope="module")
def url(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("log") / "log"
    with bentoml_serve(environment, log) as url:
        yield url
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def client() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


def banking(n: int, seed: int) -> list[dict[str, Any]]:
    """Transactions of those fields that every contract for transactions carries."""
    return [{k: v for k, v in row.items() if k in KEPT_BY_A_BANK} for row in transactions(n, seed)]


def ask(client: requests.Session, url: str, carrier: Carrier, row: dict[str, Any], model: str, version: str) -> Any:
    path = carrier.path.replace("{name}", model).replace("{version}", version)
    headers = {} if carrier.has_id else {"Idempotency-Key": row["transaction_id"]}
    return client.post(url + path, json=carrier.body([row], model), headers=headers)


@pytest.mark.parametrize("model", ["tiny-transaction", "tiny-features", "tiny-form"])
def test_one_transaction_has_one_probability_and_one_decision_by_every_contract(
    url: str, client: requests.Session, model: str
) -> None:
    """Whoever sends it first and whoever again: each contract begins with a transaction of its own."""
    versions = {m["name"]: m["version"] for m in client.get(f"{url}/readyz").json()["models"]}
    contracts = {"product": OWN, **CARRIERS}
    del contracts["anomaly-inference"]  # its score is how unusual a transaction is, not its probability
    if model != "tiny-features":
        del contracts["application-score"]
    if model != "tiny-form":
        del contracts["merchant-form"]
    if model != "tiny-transaction":
        del contracts["bank-transaction"]
    if model == "tiny-form":  # the features model comes first
        contracts.pop("application-score", None)
    carriers = [carrier for some in contracts.values() for carrier in some]
    made = {"tiny-transaction": banking, "tiny-features": ready_rows, "tiny-form": form_rows}[model]
    for turn, row in enumerate(made(len(carriers), 77)):
        row = {"transaction_id": f"{model}-{turn}", **row}
        found: set[tuple[float, str]] = set()
        for carrier in (*carriers[turn:], *carriers[:turn]):
            answer = ask(client, url, carrier, row, model, versions[model])
            assert answer.status_code == 200, (carrier.path, answer.text)
            (probability,) = carrier.probabilities(answer.json())
            decision = answer.headers.get("x-fraud-decision") or answer.json()["predictions"][0]["decision"]
            found.add((probability, decision))
        assert len(found) == 1, (row, found)
        query = {"model": model} if model != "tiny-transaction" else {}
        recorded = client.get(f"{url}/v1/decisions/{row['transaction_id']}", params=query).json()["decision"]
        assert {(recorded["fraud_probability"], recorded["decision"])} == found


def test_bentomls_own_client_has_the_same_probability(url: str, client: requests.Session) -> None:
    row = banking(1, 5)[0] | {"transaction_id": "by-bento"}
    with bentoml.SyncHTTPClient(url) as bento:
        (prediction,) = bento.predict(instances=[row])["predictions"]
    answer = ask(client, url, CARRIERS["bank-transaction"][0], row, "tiny-transaction", "")
    assert answer.json()["fraud_probability"] == prediction["fraud_probability"]


# ---- the merchant's form


def test_a_form_is_answered_in_a_word(url: str, client: requests.Session) -> None:
    rows = form_rows(40, 9)
    batch = client.post(f"{url}/predict/batch", json=rows, allow_redirects=False)
    predicted = client.post(f"{url}/predict", json={"instances": rows, "model": "tiny-form"}).json()["predictions"]
    words = {True: "fraudulent", False: "non-fraudulent"}
    assert batch.json() == [
        {"prediction": words[p["prediction"]], "fraud_probability": p["fraud_probability"]} for p in predicted
    ]
    assert {verdict["prediction"] for verdict in batch.json()} == set(words.values())
    one = client.post(f"{url}/predict/", json=rows[0], allow_redirects=False)
    assert (one.status_code, one.json()) == (200, batch.json()[0])
    lax = {"amt": str(rows[0]["amt"]), "hour": f"{rows[0]['hour']}", "day_of_week": rows[0]["day_of_week"]}
    assert client.post(f"{url}/predict/", json=rows[0] | lax | {"note": 1}).json() == batch.json()[0]


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"hour": 24}, "hour", "Expected `int` <= 23"),
        ({"hour": -1}, "hour", "Expected `int` >= 0"),
        ({"hour": None}, "hour", "Expected `int`, got `null`"),
        ({"day_of_week": 7}, "day_of_week", "Expected `int` <= 6"),
        ({"amt": 0}, "amt", "Expected `float` > 0.0"),
        ({"category": 3}, "category", "Expected `str`, got `int`"),
    ],
)
def test_a_bad_form_is_422_and_names_the_field(
    url: str, client: requests.Session, changes: dict[str, Any], field: str, message: str
) -> None:
    row = form_rows(1, 1)[0] | changes
    answer = client.post(f"{url}/predict/", json=row)
    (detail,) = answer.json()["detail"]
    assert (answer.status_code, detail["loc"]) == (422, ["body", field])
    assert detail["msg"].startswith(message)
    several = client.post(f"{url}/predict/batch", json=[form_rows(1, 1)[0], row, row])
    assert [detail["loc"] for detail in several.json()["detail"]] == [["body", 1, field], ["body", 2, field]]


def test_a_form_that_lacks_a_field_names_it_as_fastapi_does(url: str, client: requests.Session) -> None:
    answer = client.post(f"{url}/predict/", json={"amt": 3.5, "hour": 1, "category": "cafe"})
    missing = {"type": "missing", "loc": ["body", "day_of_week"], "msg": "Field required"}
    assert (answer.status_code, answer.json()) == (422, {"detail": [missing]})
    nothing: list[Any] = [[], {}, "x"]
    for body in nothing:
        assert client.post(f"{url}/predict/batch", json=body).status_code == 422


# ---- the bank's transaction


def test_a_banks_answer(url: str, client: requests.Session) -> None:
    levels = set()
    for i, row in enumerate(banking(60, 31)):
        row["amount"] *= 1 + i
        named = {"amount": "transaction_amount", "category": "merchant_category"}
        left_out = "event_time" if i % 2 else ""  # the time is now; the others have one, and so a score of their own
        body = {named.get(name, name): value for name, value in row.items() if name != left_out}
        answer = client.post(f"{url}/predict", json=body)
        said = answer.json()
        p = said["fraud_probability"]
        level = "High" if p > 0.5 else "Medium" if p > 0.3 else "Low"
        assert said == {
            "fraud_probability": p,
            "risk_level": level,
            "is_fraud": int(p > 0.45),
            "transaction_id": row["transaction_id"],
        }
        assert answer.headers["x-fraud-decision"] in ("approve", "review", "decline")
        if not left_out:
            levels.add(level)
        assert client.post(f"{url}/predict", json=body).json() == said  # again, at another time if it has none
    assert levels == {"High", "Medium", "Low"}


@pytest.mark.parametrize(
    ("probability", "said"),
    [(0.81, ("High", 1)), (0.8, ("Medium", 1)), (0.7, ("Medium", 0)), (0.51, ("Medium", 0)), (0.5, ("Low", 0))],
)
def test_where_a_banks_levels_begin_by_default(probability: float, said: tuple[str, int]) -> None:
    decision = Decision("t", ModelName("m", "1", "sha256:1"), 0.0, probability, Verdict(False, "low", "approve"))
    score = score_of(decision, ContractSettings.model_validate({}))
    assert (score.risk_level, score.is_fraud) == said


def test_a_bank_transaction_gets_an_id_and_its_retry_the_same_answer(url: str, client: requests.Session) -> None:
    body: dict[str, Any] = {"customer_id": 17, "transaction_amount": 12.5, "merchant_category": "fuel", "channel": None}
    first, second = (client.post(f"{url}/predict", json=body).json()["transaction_id"] for _ in range(2))
    assert first != second
    key = {"Idempotency-Key": "bank-1"}
    answers = [client.post(f"{url}/predict", json=body, headers=key).json() for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0]["transaction_id"] == "bank-1"
    other = client.post(f"{url}/predict", json=body | {"transaction_amount": 13}, headers=key)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")


@pytest.mark.parametrize(
    ("body", "message", "path"),
    [
        ({"transaction_amount": -1, "customer_id": "c"}, "Expected `float` > 0.0; -1 arrived", "$.transaction_amount"),
        ({"transaction_amount": 5}, "missing customer_id", "$"),
        ({"transaction_amount": 5, "customer_id": "c", "event_time": "noon"}, "Invalid RFC3339", "$.event_time"),
        ({"amount": 5}, "one transaction alone has the field transaction_amount", "$"),
        ({"instances": [], "transaction_amount": 5}, "0 instances arrived", "$.instances"),
    ],
)
def test_a_body_of_neither_kind_and_a_bad_one_of_a_bank(
    url: str, client: requests.Session, body: dict[str, Any], message: str, path: str
) -> None:
    answer = client.post(f"{url}/predict", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["path"]) == (422, path)
    assert message in error["message"]
    if path == "$" and "amount" in body:
        assert '{"instances": [{...}]}' in error["message"]


def test_the_document_shows_both_bodies_of_predict(url: str, client: requests.Session) -> None:
    operation = client.get(f"{url}/docs.json").json()["paths"]["/predict"]["post"]
    for content, names in (
        (operation["requestBody"], ("ScoreBody", "BankTransaction")),
        (operation["responses"]["200"], ("PredictAnswer", "BankScore")),
    ):
        schema = content["content"]["application/json"]["schema"]
        assert schema == {"oneOf": [{"$ref": f"#/components/schemas/{name}"} for name in names]}


# ---- the protocols, by their own clients


@pytest.fixture(scope="module")
def asked(url: str) -> dict[str, Any]:
    """What tritonclient and KServe's SDK made of 30 transactions; some of them lack a basket."""
    assert CLIENTS.exists(), f"{CLIENTS} is missing; make it with: make .venv/clients.done"
    rows = [row | {"basket_size": i} if i % 3 else row for i, row in enumerate(banking(30, 13))]
    rows = [{name: row.get(name, "") for name in KEPT_BY_A_BANK} | row for row in rows]
    ran = subprocess.run(
        [CLIENTS, Path(__file__).with_name("protocol_clients.py"), url],
        input=json.dumps({"model": "tiny-transaction", "rows": rows}),
        capture_output=True,
        text=True,
        env={},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    answered: dict[str, Any] = json.loads(ran.stdout)
    return answered | {"rows": rows}


def test_triton_and_kserve_have_the_probabilities_of_predict(
    asked: dict[str, Any], url: str, client: requests.Session
) -> None:
    predicted = client.post(f"{url}/predict", json={"instances": asked["rows"]}).json()["predictions"]
    expected = [prediction["fraud_probability"] for prediction in predicted]
    assert asked["triton"]["binary"] == expected
    complete = [p for p, row in zip(expected, asked["rows"], strict=True) if "basket_size" in row]
    assert asked["triton"]["json"] == asked["kserve"]["json"] == complete
    assert asked["triton"]["decisions"] == [prediction["decision"] for prediction in predicted]
    assert asked["triton"]["ids"] == [row["transaction_id"] for row in asked["rows"]]
    assert asked["triton"]["id"] == "r-1"
    assert asked["kserve"]["binary"] == expected
    assert asked["kserve"]["v1"] == predicted


def test_what_the_protocols_say_of_server_and_model(asked: dict[str, Any]) -> None:
    for client in ("triton", "kserve"):
        said = asked[client]
        assert (said["live"], said["ready"], said["model_ready"], said["unknown_ready"]) == (True, True, True, False)
    assert asked["kserve"]["v1_ready"] is True
    assert asked["triton"]["extensions"] == ["binary_tensor_data"]
    metadata = asked["triton"]["metadata"]
    kinds = {tensor["name"]: tensor["datatype"] for tensor in metadata["inputs"]}
    assert (kinds["amount"], kinds["customer_id"], kinds["basket_size"]) == ("FP64", "BYTES", "FP64")
    assert "missing transaction_id" in asked["triton"]["error"]
    assert "missing transaction_id" in asked["kserve"]["v1_error"]


def infer(client: requests.Session, url: str, body: Any, headers: dict[str, str] | None = None) -> requests.Response:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": "application/json"} | (headers or {})
    return client.post(f"{url}/v2/models/tiny-form/infer", data=data, headers=given)


def tensors(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    body = CARRIERS["open-inference"][0].body(rows, "tiny-form")
    inputs: list[dict[str, Any]] = body["inputs"]
    return inputs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [3]}, "$.inputs[1].shape: tensor 'hour' has 3 rows, and the first one 2"),
        ({"shape": [2, 2]}, "$.inputs[1].shape: tensor 'hour' has the shape [2, 2]; [n] or [n, 1] with n rows"),
        ({"datatype": "FP8"}, "$.inputs[1].datatype: datatype 'FP8' is not read here; allowed: BOOL, BYTES, INT8"),
        ({"data": [1]}, "$.inputs[1].data: 1 elements arrived; the shape says 2"),
        ({"data": None}, "$.inputs[1]: tensor 'hour' has no data"),
        ({"data": [1, 24]}, "$.inputs.hour[1]: Expected `float` <= 23.0; 24 arrived"),
        ({"data": [1, None]}, "$.inputs.hour[1]: Expected `float`, got `null`"),
        ({"name": "amt"}, "$.inputs[1]: tensor 'amt' arrived twice"),
        ({"name": "nothing"}, "$.inputs[0]: missing hour"),
        ({"parameters": {"binary_data_size": 16}}, "$.inputs[1]: binary_data_size says 16 bytes, and 0 are left"),
    ],
)
def test_a_bad_tensor_is_named(url: str, client: requests.Session, change: dict[str, Any], message: str) -> None:
    inputs = tensors(form_rows(2, 4))
    inputs[1] |= change
    answer = infer(client, url, {"inputs": inputs})
    assert (answer.status_code, answer.json().keys()) == (422, {"error"})
    assert answer.json()["error"].startswith(message)


def test_binary_and_json_tensors_may_be_mixed_and_outputs_chosen(url: str, client: requests.Session) -> None:
    rows = form_rows(3, 6)
    plain = infer(client, url, {"inputs": tensors(rows)}).json()
    inputs = tensors(rows)
    hours = np.array([row["hour"] for row in rows], np.int64).tobytes()
    inputs[1] = {"name": "hour", "shape": [3, 1], "datatype": "INT64", "parameters": {"binary_data_size": len(hours)}}
    inputs[2]["data"] = [[value] for value in inputs[2]["data"]]
    outputs = [{"name": "decision"}, {"name": "fraud_probability", "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": inputs, "outputs": outputs, "id": "x"}).encode()
    length = {"Inference-Header-Content-Length": str(len(head))}
    answer = infer(client, url, head + hours, {**length, "Content-Type": "application/octet-stream"})
    assert answer.headers["content-type"] == "application/octet-stream"
    size = int(answer.headers["inference-header-content-length"])
    said = json.loads(answer.content[:size])
    assert (said["id"], [output["name"] for output in said["outputs"]]) == ("x", ["decision", "fraud_probability"])
    by_name = {output["name"]: output["data"] for output in plain["outputs"]}
    assert np.frombuffer(answer.content[size:], "<f8").tolist() == by_name["fraud_probability"]
    assert said["outputs"][0]["data"] == by_name["decision"]
    for bad, error in (
        ({**length, "Inference-Header-Content-Length": "9999999"}, "Inference-Header-Content-Length is '9999999'"),
        ({"Inference-Header-Content-Length": "x"}, "Inference-Header-Content-Length is 'x'"),
    ):
        refused = infer(client, url, head + hours, bad)
        assert (refused.status_code, error in refused.json()["error"]) == (422, True)
    unknown = infer(client, url, {"inputs": tensors(rows), "outputs": [{"name": "odds"}]})
    assert unknown.json()["error"].startswith("$.outputs[0].name: there is no output 'odds'; there are fraud_prob")


def test_sagemaker_pings_and_invokes(url: str, client: requests.Session) -> None:
    assert (client.get(f"{url}/ping").status_code, client.get(f"{url}/ping").content) == (200, b"")
    rows = form_rows(2, 8)
    invoked = client.post(f"{url}/invocations", json={"instances": rows, "model": "tiny-form"}).json()
    predicted = client.post(f"{url}/predict", json={"instances": rows, "model": "tiny-form"}).json()
    for prediction in (*invoked["predictions"], *predicted["predictions"]):
        assert prediction.pop("transaction_id").startswith("given-")
    assert invoked == predicted


# ---- errors of every contract, those before its handler too

SHAPES = {"merchant-form": "detail", "bank-transaction": "error", "open-inference": "error", "kserve-v1": "error"}


@pytest.mark.parametrize("contract", [*SHAPES, "sagemaker"])
def test_refusals_before_the_handler_have_the_contracts_shape(
    contract: str, url: str, client: requests.Session
) -> None:
    path = CARRIERS[contract][0].path.replace("{name}", "tiny-form")
    key = SHAPES.get(contract, "error")
    large = b'{"a": "' + b"x" * 5_000_000 + b'"}'
    json_ = {"Content-Type": "application/json"}
    answers = {
        401: client.post(url + path, json={}, headers={"X-API-Key": "fb_wrong"}),
        403: client.post(url + path, json={}, headers={"X-API-Key": READER}),
        413: client.post(url + path, data=large, headers=json_),
        415: client.post(url + path, data=b"{}", headers={"Content-Type": "text/csv"}),
        405: client.delete(url + path),
    }
    client.post(url + path, json={}, headers={"X-API-Key": SLOW})
    answers[429] = client.post(url + path, json={}, headers={"X-API-Key": SLOW})
    for status, answer in answers.items():
        assert (answer.status_code, answer.json().keys()) == (status, {key}), answer.text
        said = answer.json()[key]
        assert isinstance(said, dict) == (contract == "bank-transaction")


def test_undeclared_paths_are_closed_in_the_contracts_shape(url: str, client: requests.Session) -> None:
    for path, key in (
        ("/v2/models", "error"),
        ("/v2/models/m/config", "error"),
        ("/v1/models/m/x", "error"),
        ("/predict/x", "detail"),
    ):
        answer = client.get(url + path)
        assert (answer.status_code, answer.json().keys()) == (404, {key})
        assert isinstance(answer.json()[key], str)
    unknown = client.get(f"{url}/v2/models/tiny-form/versions/0000/ready")
    assert (unknown.status_code, unknown.json().keys()) == (404, {"error"})


def test_without_a_model_that_fits_a_contract_answers_503_in_its_shape(
    environment: dict[str, str], client: requests.Session, tmp_path: Path
) -> None:
    alone = environment | {"FRAUD_MODEL": environment["FRAUD_MODEL"].split(",")[1]}
    with bentoml_serve(alone, tmp_path / "log") as url:
        problems = {c["name"]: c["problem"] for c in client.get(f"{url}/readyz").json()["contracts"]}
        assert (
            problems["merchant-form"]
            == "tiny-features: it needs email_domain, has_phone, income, which the form has not"
        )
        assert problems["bank-transaction"] == "tiny-features: it is a features model; a transaction model is needed"
        assert problems["open-inference"] is problems["kserve-v1"] is problems["sagemaker"] is None
        form = client.post(f"{url}/predict/", json=form_rows(1, 1)[0])
        assert (form.status_code, form.json()) == (503, {"detail": problems["merchant-form"]})
        bank = client.post(f"{url}/predict", json={"customer_id": "c", "transaction_amount": 5})
        assert (bank.status_code, bank.json()["error"]["message"]) == (503, problems["bank-transaction"])


def test_the_traffic_script_of_the_form(environment: dict[str, str], url: str) -> None:
    command = [sys.executable, "-m", "load_tests", "--num_requests", "6", "--delay", "0.01", "--seed", "3"]
    ran = subprocess.run(command, env=environment | {"BASE_URL": url}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr + ran.stdout
    *each, summary = ran.stdout.splitlines()
    assert len(each) == 6
    assert all(re.match(r"\d/6 (non-)?fraudulent, probability 0\.\d{4} \d+\.\d ms", line) for line in each)
    assert summary.startswith(f"{url}: 6 payments: ")
    ran = subprocess.run(
        command, env=environment | {"BASE_URL": f"{url}/nowhere"}, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, "status 404" in ran.stdout) == (1, True)


def test_what_is_simulated_for_the_form_trains_a_model_of_its_fields(tmp_path: Path) -> None:
    simulate_transactions(12, 40, 1, out=tmp_path / "merchant.csv", merchant_form=True)
    mapping = Mapping.from_yaml(EXAMPLES / "merchant_form.yaml")
    table = load_table(tmp_path / "merchant.csv", mapping)
    features = further_features(table, mapping, slice(0, len(table)))
    assert [feature.name for feature in features] == [*MerchantForm.__struct_fields__]
    assert features[3].unknown == "missing"
    assert set(table["hour"]) <= set(range(24))
    assert set(table["day_of_week"]) == set(range(7))
    times = table["event_time_ms"].to_numpy()
    assert (table["hour"].to_numpy() == times // 3_600_000 % 24).all()
    assert (table["day_of_week"].to_numpy() == (times // 86_400_000 + 3) % 7).all()
