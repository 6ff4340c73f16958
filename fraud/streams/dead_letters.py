"""Dead letters: records that cannot be decided or applied, as they came, with why and from where in their headers."""

from __future__ import annotations

from confluent_kafka import Message

from fraud.errors import FraudError
from fraud.streams.sink import Headers, Outgoing
from fraud.streams.values import MAX_HEADER_BYTES, carried_bytes, headers_of, key_of, value_bytes

CODE, MESSAGE, PATH = "fraud-error-code", "fraud-error-message", "fraud-error-path"
TOPIC, PARTITION, OFFSET = "fraud-source-topic", "fraud-source-partition", "fraud-source-offset"
TRUNCATED = "fraud-truncated-from-bytes"
"""The length of a value of which a dead letter has only the beginning."""
MAX_MESSAGE = 2_000


def dead_letter(message: Message, error: FraudError, topic: str, max_bytes: int) -> Outgoing:
    """Return a record as a dead letter.

    Parameters
    ----------
    topic : str
        That of the dead letters.
    max_bytes : int
        Beyond it the value is cut off, and key and headers that are too long to be carried on are left out.
    """
    key, value, headers = key_of(message), value_bytes(message), headers_of(message)
    if carried_bytes(message) > MAX_HEADER_BYTES:
        key, headers = None, []
    why: Headers = [
        (CODE, error.code.encode()),
        (MESSAGE, error.message[:MAX_MESSAGE].encode(errors="replace")),
        (PATH, (error.path or "").encode(errors="replace")),
        (TOPIC, (message.topic() or "").encode()),
        (PARTITION, str(message.partition()).encode()),
        (OFFSET, str(message.offset()).encode()),
    ]
    room = max_bytes - 2 * MAX_HEADER_BYTES
    if value is not None and len(value) > room:
        why.append((TRUNCATED, str(len(value)).encode()))
        value = value[:room]
    return Outgoing(topic, key, value, [*headers, *why])
