"""Every error the project raises on purpose.

FraudError
├── RequestError                 what a caller sent cannot be scored
│   ├── MalformedHttp            400  the request is no HTTP
│   ├── HeadersTooLarge          431  the headers are longer than allowed
│   ├── HeaderTimeout            408  the headers did not arrive in time
│   ├── MalformedJson            400  the body is no JSON
│   ├── InvalidRequest           422  the body or a row breaks the contract
│   │   └── AheadOfClock              a time lies ahead of the server's clock
│   ├── IdempotencyConflict      409  a transaction id came again with other contents
│   ├── UnknownModel             404  the named model is not served here
│   │   └── PastVersion               the version that decided is served no more
│   ├── RuleError                422  a rule or a rule set cannot be used
│   ├── UnknownCustomer          404  nothing is known of a customer
│   ├── UnknownTransaction       404  no decision on a transaction is on record
│   ├── UnknownCase              404  there is no such case
│   ├── CaseConflict             409  a case is not in the state that a change needs
│   ├── UnknownPath              404  no route is declared for the path
│   ├── PayloadTooLarge          413  the body is larger than allowed
│   ├── MethodNotAllowed         405  the path does not answer this method
│   ├── UnsupportedMediaType     415  the body is not declared as JSON
│   │   └── UnsupportedEncoding       it is compressed by another means than gzip
│   └── BodyTimeout              408  the body did not arrive in time
├── AccessError
│   ├── Unauthenticated          401  no key, or a wrong one
│   ├── Forbidden                403  the key lacks the scope
│   └── RateLimited              429  too many requests for this key
├── Unavailable
│   ├── NotReady                 503  no verified model is loaded yet
│   └── Overloaded               503  the queue is full
├── DataError                    a table or its mapping cannot be used
├── BundleError                  a bundle is damaged, foreign or does not score as it did in training
├── RegistryError                a model version or alias cannot be found or moved
├── StoreError                   a history or decision store failed
│   └── StoreDown                it cannot be reached, or not within its budget, or refuses
└── SettingsError                a setting has a value that is not allowed
"""

from __future__ import annotations

from typing import Self


class FraudError(Exception):
    """Base of all errors; `http_status` and `code` are what an HTTP caller sees.

    Parameters
    ----------
    message : str
        What arrived, what is allowed and, where it helps, the next step.
    path : str, optional
        Where in the request, such as ``$.instances[2].amount``.
    """

    http_status = 500
    code = "internal"

    def __init__(self, message: str, path: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.path = path

    def kept(self) -> Self:
        """Return the error as something to keep: without the frames it passed and what they hold.

        Kept in one of those objects it would be part of a cycle, and with it the whole request, which the garbage
        collector frees late.
        """
        self.__context__ = None
        return self.with_traceback(None)


class RequestError(FraudError):
    http_status = 422
    code = "invalid_request"


class MalformedHttp(RequestError):
    http_status = 400
    code = "malformed_http"

    def __init__(self) -> None:
        super().__init__("the request cannot be read as HTTP/1.1")


class HeadersTooLarge(RequestError):
    http_status = 431
    code = "headers_too_large"

    def __init__(self, limit: int, unit: str = "bytes") -> None:
        super().__init__(f"the headers are longer than the {limit} {unit} allowed")


class HeaderTimeout(RequestError):
    http_status = 408
    code = "header_timeout"

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"the headers did not arrive within {limit_s:g} s")


class MalformedJson(RequestError):
    http_status = 400
    code = "malformed_json"


class InvalidRequest(RequestError):
    pass


class AheadOfClock(InvalidRequest):
    """A time lies further ahead of the server's clock than is allowed: one of the two clocks is wrong."""


class IdempotencyConflict(RequestError):
    http_status = 409
    code = "idempotency_conflict"

    def __init__(self, transaction_id: str, path: str | None = None) -> None:
        super().__init__(
            f"transaction {transaction_id!r} was scored before with other contents; "
            "send a retry unchanged, or a new transaction under a new id",
            path,
        )


class NotMeasured(RequestError):
    """A transaction was decided before, and its anomaly was not measured then."""

    http_status = 409
    code = "not_measured"

    def __init__(self, transaction_id: str | None) -> None:
        super().__init__(f"transaction {transaction_id!r} was decided before, without a model that measures anomalies")


class UnknownModel(RequestError):
    http_status = 404
    code = "unknown_model"

    def __init__(self, name: str, served: list[str]) -> None:
        known = ", ".join(served) or "none"
        shown = name if len(name) <= 100 else name[:100] + "…"
        super().__init__(f"model {shown!r} is not served here; served: {known}", "$.model")


class PastVersion(UnknownModel):
    """The version that decided is no longer served; a caller with access to the store may load it and retry."""

    def __init__(self, name: str, digest: str, served: list[str]) -> None:
        super().__init__(f"{name} {digest}", served)
        self.name, self.digest = name, digest


class RuleError(RequestError):
    code = "invalid_rule"


class UnknownCustomer(RequestError):
    http_status = 404
    code = "unknown_customer"

    def __init__(self) -> None:
        super().__init__("nothing is known of this customer", "$.id")


class UnknownTransaction(RequestError):
    http_status = 404
    code = "unknown_transaction"

    def __init__(self) -> None:
        super().__init__("no decision on this transaction is on record", "$.transaction_id")


class UnknownCase(RequestError):
    http_status = 404
    code = "unknown_case"

    def __init__(self, case_id: int) -> None:
        super().__init__(f"there is no case {case_id}", "$.id")


class CaseConflict(RequestError):
    http_status = 409
    code = "case_conflict"

    def __init__(self, case_id: int, reason: str) -> None:
        super().__init__(f"case {case_id} stays as it is: {reason}")


class UnknownPath(RequestError):
    http_status = 404
    code = "not_found"

    def __init__(self, path: str) -> None:
        super().__init__(f"not found: {path[:200]}")


class PayloadTooLarge(RequestError):
    http_status = 413
    code = "payload_too_large"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"the body is larger than the {limit_bytes} bytes allowed; send fewer rows a call")


class MethodNotAllowed(RequestError):
    http_status = 405
    code = "method_not_allowed"

    def __init__(self, method: str, allowed: str) -> None:
        super().__init__(f"this path answers {allowed}, not {method}")
        self.allowed = allowed


class UnsupportedMediaType(RequestError):
    http_status = 415
    code = "unsupported_media_type"

    def __init__(self, content_type: str) -> None:
        super().__init__(f"content type {content_type!r} is not read here; send application/json")


class UnsupportedEncoding(UnsupportedMediaType):
    accepted = "gzip, identity"

    def __init__(self, encoding: str) -> None:
        RequestError.__init__(self, f"content encoding {encoding!r} is not read here; send gzip or none")


class BodyTimeout(RequestError):
    http_status = 408
    code = "body_timeout"

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"the body did not arrive within {limit_s:g} s")


class AccessError(FraudError):
    http_status = 401
    code = "unauthenticated"


class Unauthenticated(AccessError):
    pass


class Forbidden(AccessError):
    http_status = 403
    code = "forbidden"


class RateLimited(AccessError):
    http_status = 429
    code = "rate_limited"

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"too many requests for this key; try again in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class Unavailable(FraudError):
    http_status = 503
    code = "unavailable"
    retry_after_s = 1.0


class NotReady(Unavailable):
    code = "not_ready"


class Overloaded(Unavailable):
    code = "overloaded"


class DataError(FraudError):
    http_status = 422
    code = "data"


class BundleError(FraudError):
    code = "bundle"


class RegistryError(FraudError):
    http_status = 404
    code = "registry"


class StoreError(FraudError):
    http_status = 503
    code = "store"
    retry_after_s = 1.0


class StoreDown(StoreError):
    """It cannot be reached, does not answer in time, or refuses what it is there for.

    Parameters
    ----------
    is_permanent : bool
        Whether waiting does not help: an operator has to change a setting or a right.
    """

    def __init__(self, message: str, *, is_permanent: bool = False) -> None:
        super().__init__(message)
        self.is_permanent = is_permanent


class SettingsError(FraudError):
    code = "settings"
