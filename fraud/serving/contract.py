"""The types of the HTTP contract, for the OpenAPI document and for callers within Python.

They describe what the data plane reads and writes; nothing on the request's way is built from them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from bentoml import IODescriptor
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, WithJsonSchema

Instance = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "title": "Instance",
            "type": "object",
            "description": (
                "A raw transaction for a transaction model, or a flat map of ready features for a feature model, "
                "with the further fields that the model's own specification names."
            ),
            "properties": {
                "transaction_id": {"type": "string", "minLength": 1, "maxLength": 128},
                "event_time": {"type": "string", "description": "RFC 3339 with a zone; transaction models only"},
                "customer_id": {"type": "string", "minLength": 1, "maxLength": 128},
                "merchant_id": {"type": "string", "minLength": 1, "maxLength": 128},
                "amount": {"type": "number", "exclusiveMinimum": 0},
            },
            "additionalProperties": True,
        },
        mode="serialization",  # BentoML's clients read the other mode, and send only the properties it names
    ),
]
_Whole = WithJsonSchema({"type": "object"}, mode="validation")  # ... and return only those


class ScoreRequest(IODescriptor):  # type: ignore[misc]
    instances: list[Instance] = Field(min_length=1, max_length=1000, description="scored in order, each by itself")
    model: str | None = Field(None, description="the name of the model, when another than the default is wanted")


class Problem(BaseModel):
    """What is wrong: what arrived, what is allowed, and where."""

    code: str
    message: str
    path: str | None = Field(description="where in the request, such as $.instances[2].amount")


class RequestProblem(Problem):
    request_id: str


class ErrorAnswer(BaseModel):
    error: RequestProblem
    errors: list[Problem] | None = Field(None, description="one per instance, when every one of them is bad")


class RowFailure(BaseModel):
    """Stands in the place of a row that could not be scored; its neighbours are."""

    transaction_id: str | None
    error: Problem


class ModelVersion(BaseModel):
    name: str
    version: str
    digest: str


class Prediction(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    transaction_id: str | None
    fraud_probability: float = Field(ge=0, le=1, description="calibrated")
    prediction: bool = Field(description="whether the probability reaches the policy's threshold")
    risk_level: Literal["low", "medium", "high", "critical"]
    decision: Literal["approve", "review", "decline"]
    model: ModelVersion
    degraded: list[str] = Field(description="what the score had to do without")


class Reason(BaseModel):
    feature: str
    value: Any
    contribution: float = Field(description="in log-odds")
    direction: Literal["raises", "lowers"]
    text: str


class Explanation(Prediction):
    raw_margin: float = Field(description="log-odds: base_value plus the sum of all contributions")
    base_value: float
    contributions: dict[str, float]
    reasons: list[Reason] = Field(description="the strongest contributions, at most 5")


class PredictAnswer(IODescriptor):  # type: ignore[misc]
    predictions: list[Annotated[Prediction | RowFailure, _Whole]]


class ExplainAnswer(IODescriptor):  # type: ignore[misc]
    predictions: list[Annotated[Explanation | RowFailure, _Whole]]


class Label(BaseModel):
    """One transaction that turned out to be fraud; one that nobody tells counts as legitimate."""

    model_config = ConfigDict(extra="forbid")

    transaction_id: str = Field(min_length=1, max_length=128, description="as it was scored")
    is_fraud: Literal[True]
    label_time: AwareDatetime | None = Field(
        None, description="when it became known, RFC 3339 with a zone; now by default"
    )


class LabelsRequest(BaseModel):
    labels: list[Label] = Field(min_length=1, max_length=1000)


class LabelOutcome(BaseModel):
    transaction_id: str
    outcome: Literal["told", "known", "unknown"] = Field(
        description="told to the histories now, told before, or of a transaction that is not on record"
    )


class LabelsAnswer(BaseModel):
    labels: list[LabelOutcome | RowFailure]


class ProfileWindow(BaseModel):
    transactions: int
    amount_mean: float | None
    amount_max: float | None
    frauds: int


class RecentTransaction(BaseModel):
    event_time: AwareDatetime
    amount: float


class ProfileAnswer(BaseModel):
    """What is kept of a customer: amounts in currency units, times in UTC, windows up to the last transaction's day."""

    customer_id: str
    transactions: int
    first_seen: AwareDatetime | None
    last_seen: AwareDatetime | None
    amount_mean: float | None
    amount_standard_deviation: float | None
    windows: dict[Literal["1d", "7d", "30d"], ProfileWindow]
    usual_hours_utc: list[int] = Field(max_length=3)
    usual_weekdays: list[str] = Field(max_length=3)
    known_categories: int
    known_merchants: int
    known_merchants_recent: int
    known_devices_recent: int
    frauds: int = Field(description="known by now")
    last_fraud: AwareDatetime | None = Field(description="when the latest of them happened")
    recent: list[RecentTransaction] = Field(description="the latest transactions, newest first")
    approximate: dict[str, str] = Field(description="which of these figures are approximate, and how")
    state_bytes: int


class ResetAnswer(BaseModel):
    customer_id: str
    reset: Literal[True]


class Readiness(BaseModel):
    model_config = ConfigDict(extra="allow")

    status: Literal["ready"]
    queued_rows: int
