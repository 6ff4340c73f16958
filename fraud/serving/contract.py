"""The JSON types of scoring and errors, each defined once for decoding, encoding and OpenAPI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from fraud.decisions.anomaly import Anomaly
from fraud.decisions.policy import Action
from fraud.detectors.explain import Reason
from fraud.models.scorer import ModelName
from fraud.schema import MAX_ID_LENGTH, MAX_INSTANCES, Reading

JsonObject: TypeAlias = dict[str, Any]
"""An object whose fields are not fixed."""
COMPONENTS = "#/components/schemas/"


def described_by(*kinds: type[msgspec.Struct]) -> Meta:
    """Describe a field that msgspec cannot type, such as JSON decoded later, by the structs it may hold."""
    references = [{"$ref": COMPONENTS + kind.__name__} for kind in kinds]
    schema = {"anyOf": references} if len(references) > 1 else references[0]
    return Meta(extra_json_schema=schema, extra={"members": kinds})


if TYPE_CHECKING:
    First = TypeVar("First")
    Second = TypeVar("Second")
    Either: TypeAlias = First | Second
else:

    class Either:
        """A union of structs that are only encoded: msgspec describes only unions that it can decode."""

        def __class_getitem__(cls, kinds: tuple[type[msgspec.Struct], ...]) -> Any:
            return Annotated[Any, described_by(*kinds)]


class Problem(msgspec.Struct, frozen=True):
    """One error: what arrived, what is allowed, and where."""

    code: str
    message: str
    path: Annotated[str | None, Meta(description="where in the request, such as $.instances[2].amount")]


class RequestProblem(Problem, frozen=True):
    """A problem of the whole request, with the request id found in the log."""

    request_id: str


class ErrorAnswer(msgspec.Struct, omit_defaults=True):
    """The error body of all routes without a contract of their own."""

    error: RequestProblem
    errors: Annotated[list[Problem] | None, Meta(description="one per instance, when every one of them is bad")] = None


class Refused(msgspec.Struct, frozen=True):
    """Replaces a row that could not be scored; other rows are not affected."""

    transaction_id: str | None
    error: Problem


class Scored(msgspec.Struct):
    """What every answer to a row says."""

    transaction_id: str | None
    fraud_probability: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        Meta(description="calibrated; null only from a model without labels to calibrate by, which has an anomaly"),
    ]
    prediction: Annotated[bool, Meta(description="whether the policy acts on the transaction: review or decline")]
    risk_level: Literal["low", "medium", "high", "critical"]
    decision: Action
    model: ModelName
    degraded: Annotated[Sequence[str], Meta(description="what the score had to do without")]
    decided_by: Annotated[str, Meta(description="the id of the rule that decided, or model")]
    rules_hit: Annotated[Sequence[str], Meta(description="the rules that fired, in their order of precedence")]


class Prediction(Scored, kw_only=True):
    """A row's score and the decision made by it."""

    anomaly: Annotated[
        Anomaly | msgspec.UnsetType,
        Meta(description="how unusual the transaction is, where a model measures it"),
    ] = msgspec.UNSET
    anomaly_model: Annotated[
        ModelName | msgspec.UnsetType, Meta(description="which model measured the anomaly, where it is not `model`")
    ] = msgspec.UNSET
    reading: Annotated[
        Reading | msgspec.UnsetType,
        Meta(description="table, where the row came with the column names of the table that trained the model"),
    ] = msgspec.UNSET


class Explanation(Prediction):
    """A prediction with what every feature added to it."""

    raw_margin: Annotated[float, Meta(description="base_value plus the sum of all contributions, in the unit")]
    base_value: float
    contributions: dict[str, float]
    reasons: Annotated[list[Reason], Meta(description="the strongest contributions, at most 5")]
    unit: Annotated[str, Meta(description="of raw_margin, base_value and contributions, such as log-odds")]
    explanation: Annotated[str, Meta(description="what is unusual for this customer, in a sentence")]


class PredictAnswer(msgspec.Struct):
    """One element per instance, in order."""

    predictions: Sequence[Either[Prediction, Refused]]


class ExplainAnswer(msgspec.Struct):
    """One element per instance, in order."""

    predictions: Sequence[Either[Explanation, Refused]]


ID_SCHEMA = {"type": ["string", "integer"], "minLength": 1, "maxLength": MAX_ID_LENGTH}
Instance = Annotated[
    msgspec.Raw,
    Meta(
        title="Instance",
        description=(
            "A raw transaction for a transaction model, or a flat map of ready features for a feature model, "
            "with the further fields that the model's own specification names; or a row with the column names and "
            "value forms of the table that trained the model."
        ),
        extra_json_schema={
            "type": "object",
            "properties": {
                "transaction_id": ID_SCHEMA,
                "event_time": {"type": "string", "description": "RFC 3339 with a zone; transaction models only"},
                "customer_id": ID_SCHEMA,
                "merchant_id": ID_SCHEMA,
                "amount": {"type": "number", "exclusiveMinimum": 0},
            },
            "additionalProperties": True,
        },
    ),
]


class ScoreBody(msgspec.Struct):
    """Rows to score independently, in order."""

    instances: Annotated[list[Instance], Meta(extra_json_schema={"minItems": 1, "maxItems": MAX_INSTANCES})]
    model: Annotated[str | None, Meta(description="which model, when another than the default is wanted")] = None


class ContractStatus(msgspec.Struct, frozen=True):
    """A contract that is answered, and the model that it scores with."""

    name: str
    model: str | None
    problem: Annotated[str | None, Meta(description="why no model served here fits; the contract then answers 503")]


class Readiness(msgspec.Struct):
    """What this worker serves, and what it failed to load."""

    status: Literal["ready", "degraded", "refusing"]
    queued_rows: int
    contracts: list[ContractStatus]
    anomaly_model: Annotated[
        JsonObject | None,
        Meta(description="the model of FRAUD_ANOMALY_MODEL: name, version, digest, and the models that it is beside"),
    ] = None
