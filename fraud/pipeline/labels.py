"""Labels on their way in, whatever brings them: one is read, checked, and applied in a store with others."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from fraud.decisions.labels import Label, LabelOutcome
from fraud.errors import RequestError
from fraud.forms import as_flag, as_id, as_it_is, as_moment, checked_id, fields_of, in_other_forms, time_ms
from fraud.refusals import explained, refuse_controls
from fraud.schema import Id, Moment
from fraud.stores.protocol import Store

AT_ONCE = 50
"""Labels in one call of the store: no score waits long for them, and no call exceeds its time budget."""


class LabelRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The label of one transaction. A transaction without a label counts as legitimate."""

    transaction_id: Annotated[Id, Meta(description="as it was scored")]
    is_fraud: Annotated[bool | None, Meta(description="fraud or legitimate; null withdraws the earlier labels")]
    label_time: Annotated[
        Moment | None, Meta(description="since when it is known, RFC 3339 with a zone; now by default")
    ] = None
    model: Annotated[
        Id | None, Meta(description="the features model that decided; none for transactions with a history")
    ] = None


_decode = msgspec.json.Decoder(LabelRequest).decode
_FORMS = {"transaction_id": as_id, "is_fraud": as_flag, "label_time": as_moment, "model": as_it_is}
_REQUIRED = ("transaction_id", "is_fraud")


def read_label(
    raw: bytes | msgspec.Raw, path: str, now_ms: int, max_ahead_ms: int, *, source: str = "http", actor: str = ""
) -> Label | RequestError:
    """Return a label, or the error that refuses it.

    Parameters
    ----------
    raw : bytes
        The label as JSON.
    path : str
        Its path in the request, such as ``$.labels[2]``, for errors.
    now_ms : int
        When the label arrived, ms since the epoch; also its label time if it has none.
    max_ahead_ms : int
        How far a label's time may be ahead of the clock, ms.
    source, actor : str
        See `fraud.decisions.labels.Label`.
    """
    try:
        said = bytes(raw)
        fields = fields_of(said, path, "a label")
        try:
            label = _decode(said)
        except msgspec.ValidationError:
            if unknown := fields.keys() - _FORMS.keys():
                reason = f"Object contains unknown field `{min(unknown)}`"
                return explained(fields, path, reason, _REQUIRED, _FORMS.keys(), "a label")
            label = in_other_forms(LabelRequest, _FORMS, fields, path, _REQUIRED, "a label")
        transaction_id = checked_id(label.transaction_id, f"{path}.transaction_id")
        if label.model is not None:
            refuse_controls(label.model, f"{path}.model")
        moment = label.label_time
        at_ms = now_ms if moment is None else time_ms(moment, "label_time", path, now_ms, max_ahead_ms)
        return Label(transaction_id, label.is_fraud, at_ms, now_ms, source, actor, label.model)
    except RequestError as error:
        return error.kept()


async def apply_labels(
    store: Store, labels: Sequence[Label]
) -> AsyncIterator[tuple[Sequence[Label], list[LabelOutcome]]]:
    """Apply labels in a store, `AT_ONCE` at a time; yields these with the outcome of each.

    Raises
    ------
    StoreError
        The store does not take them now. The labels yielded before are applied; sending all of them again is safe.
    """
    for start in range(0, len(labels), AT_ONCE):
        some = labels[start : start + AT_ONCE]
        yield some, await store.apply_labels(some)
