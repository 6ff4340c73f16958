"""Simulated loan applications: 15 ready features, and fraud that overlaps with honest applicants."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

DAY_MS = 86_400_000
SPAN_DAYS = 365
FRAUD_RATE = 0.03
TYPOLOGIES = ("synthetic_identity", "stolen_identity", "bust_out")
HONEST, SYNTHETIC, STOLEN, BUST_OUT = range(4)
EMAIL_DOMAINS = ("free", "corporate", "education", "privacy", "disposable")
EMPLOYMENT = ("employed", "self_employed", "student", "retired", "unemployed")
TERMS = np.array([12, 24, 36, 48, 60, 72])


def make_applications(rng: np.random.Generator, rows: int, start_ms: int) -> tuple[pa.Table, dict[str, int]]:
    """Return applications in order of arrival over a year, and the number of each kind of fraud.

    Honest applicants, synthetic identities, stolen identities and first-party fraud each have their own distributions,
    which overlap.
    """
    kind = np.where(rng.random(rows) < FRAUD_RATE, rng.choice([1, 2, 3], rows, p=[0.4, 0.35, 0.25]), HONEST)

    def normal(means: list[float], deviation: float) -> NDArray[np.float64]:
        return np.array(means)[kind] + deviation * rng.normal(0, 1, rows)

    def chance(shares: list[float]) -> NDArray[np.bool_]:
        return rng.random(rows) < np.array(shares)[kind]

    def one_of(weights: list[list[float]]) -> NDArray[np.int64]:
        quantiles = np.cumsum(weights, axis=1)[kind]
        drawn: NDArray[np.int64] = (rng.random(rows)[:, None] > quantiles[:, :-1]).sum(axis=1)
        return drawn

    age = np.clip(normal([44, 35, 52, 38], 13), 18, 90)
    income = np.exp(normal([10.6, 10.8, 10.7, 10.6], 0.5))
    amount = np.clip(income * np.exp(normal([-1.2, -0.8, -0.9, -0.6], 0.6)), 500, 100_000)
    score = np.clip(normal([690, 665, 715, 680], 70), 300, 850)
    employment = np.where((age > 66) & (rng.random(rows) < 0.8), 3, one_of([[0.68, 0.14, 0.08, 0.05, 0.05]] * 4))
    debt = np.clip(normal([0.31, 0.24, 0.30, 0.42], 0.14), 0, 2)
    applied_ms = np.sort(rng.integers(0, SPAN_DAYS * DAY_MS, rows)) + start_ms
    fraud = kind != HONEST
    report_ms = (np.exp(rng.normal(np.log(40), 0.5, rows)) * DAY_MS).astype(np.int64)
    table = pa.table(
        {
            "application_id": [f"a{number:08d}" for number in range(1, rows + 1)],
            "applied_at": _times(applied_ms),
            "applicant_age": np.floor(age),
            "annual_income": _sometimes(rng, np.round(income, -2), 0.03),
            "loan_amount": np.round(amount, -2),
            "loan_term_months": TERMS[np.minimum((rng.beta(2, 2, rows) * 6 + (kind == BUST_OUT)).astype(int), 5)],
            "credit_score": _sometimes(rng, np.round(score), np.array([0.04, 0.22, 0.02, 0.03])[kind]),
            "debt_to_income": np.round(debt, 3),
            "employment_years": np.round(np.minimum(rng.gamma(1.5, 4, rows), age - 17), 1),
            "address_months": np.round(rng.gamma(1.3, np.array([55, 22, 45, 40])[kind])),
            "applications_30d": rng.poisson(np.array([0.35, 0.9, 1.3, 1.6])[kind]),
            "ip_distance_km": _sometimes(rng, np.round(np.exp(normal([2.6, 3.6, 4.3, 2.7], 1.5)), 1), 0.05),
            "session_seconds": np.round(np.exp(normal([6.1, 5.6, 5.5, 6.0], 0.6))),
            "phone_verified": chance([0.93, 0.82, 0.74, 0.92]),
            "device_seen_before": chance([0.55, 0.25, 0.12, 0.5]),
            "email_domain_category": _words(
                one_of(
                    [
                        [0.72, 0.17, 0.06, 0.04, 0.01],
                        [0.66, 0.03, 0.03, 0.15, 0.13],
                        [0.73, 0.06, 0.02, 0.11, 0.08],
                        [0.77, 0.12, 0.05, 0.05, 0.01],
                    ]
                ),
                EMAIL_DOMAINS,
            ),
            "employment_status": _words(employment, EMPLOYMENT),
            "is_fraud": fraud.astype(np.int8),
            "label_time": _times(applied_ms + report_ms, missing=~fraud),
        }
    )
    counts = np.bincount(kind, minlength=4)[1:]
    return table, dict(zip(TYPOLOGIES, counts.tolist(), strict=True))


def _sometimes(rng: np.random.Generator, values: NDArray[Any], missing: Any) -> pa.Array:
    return pa.array(values, mask=rng.random(len(values)) < missing)


def _times(milliseconds: NDArray[np.int64], missing: Any = None) -> pa.Array:
    return pa.array(milliseconds, mask=missing).cast(pa.timestamp("ms", tz="UTC"))


def _words(codes: NDArray[np.int64], names: tuple[str, ...]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int8)), pa.array(names))
