"""Amounts of several currencies count on one scale, exactly, and the same offline and online."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fraud.currencies import MAX_MINOR_UNITS, Currency, history_amount, history_amounts
from fraud.errors import BundleError, DataError, RequestError
from fraud.features.featurizer import Featurizer, Histories
from fraud.models.specification import expect_specification
from fraud.schema import Feature, FeatureSpec, Role, RowDecoder
from training.currencies import scales, stakes
from training.data import load_transactions
from training.mapping import Mapping
from training.replay import instances_of, replay, transaction_spec

ROLES: dict[str, Any] = {
    "event_time": "when",
    "customer_id": "card",
    "merchant_id": "shop",
    "amount": "amt",
    "category": "kind",
    "label": "fraud",
    "label_delay": "1d",
}
N = 600


def payments(folder: Path, cents: np.ndarray[Any, Any], units: dict[str, float], codes: np.ndarray[Any, Any]) -> Path:
    """Write amounts of `cents` euros, each in the currency of its row, worth `units` of it for a euro."""
    rng = np.random.default_rng(1)
    n = len(cents)
    amounts = [repr(round(float(c * units[code] / 100), 8)) for c, code in zip(cents, codes, strict=True)]
    table = pd.DataFrame(
        {
            "when": pd.date_range("2025-01-01", periods=n, freq="37min", tz="UTC").strftime("%Y-%m-%dT%H:%M:%SZ"),
            "card": rng.integers(0, 8, n),
            "shop": rng.integers(0, 5, n),
            "amt": amounts,
            "kind": rng.choice(["food", "fuel"], n),
            "fraud": (rng.random(n) < 0.05).astype(int),
            "cur": codes,
        }
    )
    path = folder / "payments.csv"
    table.to_csv(path, index=False)
    return path


def featurized(path: Path, **currency: Any) -> tuple[pd.DataFrame, FeatureSpec, np.ndarray[Any, Any]]:
    mapped = Mapping.model_validate(ROLES | currency)
    table = load_transactions(path, mapped)
    spec = transaction_spec(table, mapped, slice(0, N // 2))
    return table, spec, replay(table, Featurizer(spec, [50.0, 100.0, 500.0]), slice(None))


def cents(seed: int = 2) -> np.ndarray[Any, Any]:
    return np.maximum(np.round(np.random.default_rng(seed).lognormal(8, 1.5, N)), 1).astype(np.int64)


@pytest.mark.parametrize(
    ("code", "unit", "more"), [("VND", 16_000, {}), ("KWD", 0.1, {}), ("BTC", 1e-5, {"minor_digits": {"BTC": 8}})]
)
def test_every_feature_is_the_same_in_another_currency(tmp_path: Path, code: str, unit: float, more: Any) -> None:
    """All amounts times 16,000 under another currency's scale: not one bit of one feature changes."""
    found = {}
    for name, worth in (("EUR", 1), (code, unit)):
        path = payments(tmp_path, cents(), {name: worth}, np.full(N, name))
        _, _, found[name] = featurized(path, currency={"constant": name, **(more if name == code else {})})
    np.testing.assert_array_equal(found[code], found["EUR"])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), unit=st.sampled_from([16_000, 100, 1_000_000, 3_700]))
def test_every_feature_is_the_same_whatever_the_unit(
    tmp_path_factory: pytest.TempPathFactory, seed: int, unit: int
) -> None:
    folder = tmp_path_factory.mktemp("c")
    found = []
    for worth, code in ((1, "EUR"), (unit, "XXB")):
        path = payments(folder, cents(seed), {code: worth}, np.full(N, code))
        found.append(featurized(path, currency={"column": "cur", "minor_digits": {"XXB": 0 if unit > 50 else 2}})[2])
    np.testing.assert_array_equal(found[0], found[1])


def test_without_a_currency_nothing_changes(tmp_path: Path) -> None:
    path = payments(tmp_path, cents(), {"EUR": 1}, np.full(N, "EUR"))
    _, spec, _ = featurized(path)
    assert b"currenc" not in msgspec.json.encode(spec)
    row = RowDecoder(FeatureSpec("transaction", (Feature("amount", "history"),))).decode(
        b'{"transaction_id":"t","event_time":"2025-01-01T00:00:00Z","customer_id":"c","amount":4.5}', "$"
    )
    assert (row.history_amount, row.scaled_amount) == (4.5, None)


def test_mixed_currencies_are_the_same_online_as_offline(tmp_path: Path) -> None:
    codes = np.random.default_rng(3).choice(["EUR", "VND", "JPY"], N)
    path = payments(tmp_path, cents(), {"EUR": 1, "VND": 16_000, "JPY": 150}, codes)
    table, spec, offline = featurized(path, currency="cur")
    decoder = RowDecoder(spec)
    rows = [decoder.decode(instance, "$") for instance in instances_of(table, spec)]
    featurizer = Featurizer(spec, [50.0, 100.0, 500.0])
    unlabelled = [i for i, name in enumerate(spec.derived) if "fraud" not in name]
    online = featurizer.advance(rows, Histories.new(rows))
    np.testing.assert_array_equal(online[:, unlabelled], offline[:, unlabelled])
    assert next(f.meaning for f in spec.features if f.name == "amount").endswith(
        "percent of its currency's typical amount"
    )


@given(st.lists(st.floats(1e-9, 1e12), min_size=1, max_size=20), st.integers(0, 18), st.integers(1, 2**53 - 1))
def test_one_amount_is_scaled_as_many_are(amounts: list[float], digits: int, typical: int) -> None:
    currency = Currency(digits, typical)
    assert history_amounts(np.array(amounts), currency).tolist() == [history_amount(a, currency) for a in amounts]


def test_a_request_names_a_currency_that_the_model_knows() -> None:
    features = (Feature("amount", "history"),)
    both = {"EUR": Currency(2, 4_000), "VND": Currency(0, 700_000)}
    several = RowDecoder(FeatureSpec("transaction", features, (Role("currency"),), currencies=both))
    one = RowDecoder(
        FeatureSpec("transaction", features, (Role("currency", missing=True),), currencies={"VND": both["VND"]})
    )
    row = {"transaction_id": "t", "event_time": "2025-01-01T00:00:00Z", "customer_id": "c", "amount": 350_000}

    def decode(decoder: RowDecoder, **more: str) -> Any:
        return decoder.decode(msgspec.json.encode(row | more), "$.instances[0]")

    assert decode(several, currency="VND").history_amount == 50.0
    assert (decode(one).history_amount, decode(one).amount) == (50.0, 350_000)
    for decoder, more, message, path in (
        (several, {"currency": "PLN"}, "unknown currency 'PLN'; allowed: EUR, VND", "$.instances[0].currency"),
        (one, {"currency": "EUR"}, "unknown currency 'EUR'; allowed: VND", "$.instances[0].currency"),
        (several, {}, "missing currency", "$.instances[0]"),
    ):
        with pytest.raises(RequestError) as caught:
            decode(decoder, **more)
        assert (caught.value.message, caught.value.path) == (message, path)


def test_a_typical_amount_is_the_training_windows_or_the_mappings(tmp_path: Path) -> None:
    codes = np.array(["EUR"] * 400 + ["JPY"] * 200)
    path = payments(tmp_path, cents(), {"EUR": 1, "JPY": 100}, codes)
    with pytest.raises(DataError, match=r"^currency JPY comes only after the training window, which shows no typical"):
        featurized(path, currency="cur")
    table, spec, _ = featurized(path, currency={"column": "cur", "typical": {"JPY": 6_000, "CHF": 45.5}})
    assert isinstance(spec.currencies, dict)
    assert spec.currencies == {
        "CHF": Currency(2, 4_550),
        "EUR": Currency(2, int(np.partition(cents()[:300], 149)[149])),
        "JPY": Currency(0, 6_000),
    }
    in_euros = stakes(table, spec.currencies, slice(0, 300))
    np.testing.assert_array_equal(in_euros[:400], table["amount"][:400])
    typical = spec.currencies["EUR"].typical_minor_units / 100
    np.testing.assert_allclose(in_euros[400:], table["amount"][400:] / 6_000 * typical)


def test_currencies_that_nobody_knows(tmp_path: Path) -> None:
    path = payments(tmp_path, cents(), {"EUR": 1, "BTC": 1e-5}, np.array(["EUR", "BTC"] * (N // 2)))
    with pytest.raises(DataError) as caught:
        featurized(path, currency="cur")
    assert caught.value.message.startswith(
        "payments.csv: column 'cur' (currency) holds other codes: 'BTC' is no code of ISO 4217; say how many decimal "
        "places its amounts have: currency: {minor_digits: {BTC: 2}}; 300 of 600 rows break this: row 2 ('BTC')"
    )
    for wrong in (
        {"constant": "BTC"},
        {"column": "c", "typical": {"BTC": 1.0}},
        {},
        {"column": "c", "constant": "EUR"},
    ):
        with pytest.raises(ValueError, match=r"no code of ISO 4217|give column, or constant"):
            Mapping.model_validate(ROLES | {"currency": wrong})


def test_a_bundle_with_scales_that_are_none_is_refused(tmp_path: Path) -> None:
    features, role = (Feature("amount", "history"),), (Role("currency"),)
    good = FeatureSpec("transaction", features, role, currencies={"EUR": Currency(2, 100)})
    expect_specification(good, tmp_path)
    for bad in (
        FeatureSpec("transaction", features, role),
        FeatureSpec("transaction", features, (), currencies={"EUR": Currency(2, 100)}),
        FeatureSpec("transaction", features, role, currencies={"EUR": Currency(2, 0)}),
        FeatureSpec("transaction", features, role, currencies={"EUR": Currency(400, 1)}),
        FeatureSpec("transaction", features, role, currencies={}),
        FeatureSpec(
            "transaction",
            features,
            (Role("currency", missing=True),),
            currencies={"A": Currency(2, 1), "B": Currency(2, 1)},
        ),
    ):
        with pytest.raises(BundleError, match="has currencies without their role, or scales that are none"):
            expect_specification(bad, tmp_path)


@pytest.mark.parametrize(("unit", "told"), [(1, 0), (16_000, 1), (1e-5, 1)])
def test_amounts_that_histories_do_not_tell_apart_are_told(
    tmp_path: Path, unit: float, told: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = payments(tmp_path, cents(), {"X": unit}, np.full(N, "X"))
    load_transactions(path, Mapping.model_validate(ROLES))
    assert sum("name their currency: currency: {constant: VND}" in message for message in caplog.messages) == told
    caplog.clear()
    named = {"currency": {"constant": "X", "minor_digits": {"X": 8}}}
    load_transactions(path, Mapping.model_validate(ROLES | named))
    assert caplog.messages == []


def test_scales_are_of_the_training_window_alone(tmp_path: Path) -> None:
    path = payments(tmp_path, cents(), {"EUR": 1}, np.full(N, "EUR"))
    mapped = Mapping.model_validate(ROLES | {"currency": "cur"})
    table = load_transactions(path, mapped)
    assert mapped.currency is not None
    later = table.assign(amount=np.where(np.arange(N) < 300, table["amount"], 9e6))
    assert scales(later, mapped.currency, slice(0, 300)) == scales(table, mapped.currency, slice(0, 300))


@pytest.mark.parametrize("digits", [0, 2, 8])
@pytest.mark.parametrize("amount", [1e-300, 1e-7, 48.2, 1e15, 1e17, 1.7e308])
def test_an_amount_of_any_size_is_finite_on_its_scale_and_the_same_online_as_offline(
    amount: float, digits: int
) -> None:
    currency = Currency(digits, 1)
    scaled = history_amount(amount, currency)
    assert scaled == history_amounts(np.array([amount]), currency)[0]
    assert 100.0 <= scaled <= 100.0 * MAX_MINOR_UNITS
