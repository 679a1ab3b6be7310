"""From a Kafka record to a `Message`; and how to get past a record that aiokafka cannot decode.

aiokafka's record iterator fails at a header name that is not UTF-8, and would do so at the same offset for
ever. `reread` fetches that place again and decodes header names leniently, so that the record is delivered,
marked as unreadable, and the ones after it follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.consumer.fetcher import READ_COMMITTED, PartitionRecords
from aiokafka.errors import NoError, for_code
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.memory_records import _MemoryRecordsPy

from idemq.message import Message

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NO_HEADERS: tuple[dict[str, Any], frozenset[str], str | None] = ({}, frozenset(), None)

#: One fetch of `reread` asks for as much as aiokafka's own (its default for a partition).
FETCH_BYTES = 1024 * 1024


def message_from(record: Any, broker: str, *, redelivered: bool = False) -> Message:
    """The message in an aiokafka `ConsumerRecord` read without deserializers; `broker` is its name here."""
    headers, repeated, unreadable = _headers(record.headers) if record.headers else _NO_HEADERS
    content_type, content_encoding = headers.get("content-type"), headers.get("content-encoding")
    return Message(
        body=record.value,
        key=record.key,
        headers=headers,
        repeated=repeated,
        unreadable=unreadable,
        content_type=content_type if isinstance(content_type, str) else None,
        content_encoding=content_encoding if isinstance(content_encoding, str) else None,
        sent_at=_time(record.timestamp),
        redelivered=redelivered,
        origin={
            "broker": broker,
            "topic": record.topic,
            "partition": record.partition,
            "offset": record.offset,
        },
    )


def _time(milliseconds: int | None) -> datetime | None:
    """None without a timestamp (-1), and for one that no calendar holds."""
    if milliseconds is None or milliseconds < 0:
        return None
    try:
        return _EPOCH + timedelta(milliseconds=milliseconds)
    except OverflowError:
        return None


def _headers(pairs: Any) -> tuple[dict[str, Any], frozenset[str], str | None]:
    headers: dict[str, Any] = {}
    repeated: set[str] = set()
    unreadable = None
    for name, value in pairs:
        if not name.isascii() and not _is_text(name):
            unreadable = f"the header name {name.encode('utf-8', 'surrogateescape')!r} is not UTF-8"
        if name in headers:
            repeated.add(name)
        headers[name] = _text(value)
    return headers, frozenset(repeated), unreadable


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(value: bytes | None) -> str | bytes | None:
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


class _Lenient(bytearray):
    """Bytes whose slices decode to text with surrogates in place of what is not UTF-8."""

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return _Lenient(found) if isinstance(index, slice) else found

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return super().decode(encoding, "surrogateescape")


class _LenientBatch(_DefaultRecordBatchPy):  # type: ignore[misc]  # aiokafka is untyped for mypy here
    """aiokafka's own decoder in Python; its twin in C offers no place to look in."""

    _buffer: bytearray

    def _maybe_uncompress(self) -> None:
        super()._maybe_uncompress()
        self._buffer = _Lenient(self._buffer)


class _LenientRecords(_MemoryRecordsPy):  # type: ignore[misc]  # aiokafka is untyped for mypy here
    def next_batch(self, *args: Any) -> Any:
        place = self._next_slice
        batch = super().next_batch(*args)
        # Formats before 2 have no headers.
        return _LenientBatch(place) if batch is not None and batch.magic >= 2 else batch


async def reread(
    consumer: AIOKafkaConsumer, partition: TopicPartition, position: int, limit: int
) -> tuple[list[Any], int]:
    """Up to `limit` records of `partition` from `position` on, and the position after them.

    Empty when none of them needed leniency: then something else is wrong with the partition, or nothing.
    """
    batches, aborted = await _fetch(consumer, partition, position)
    parsed = PartitionRecords(
        tp=partition,
        records=batches,
        aborted_transactions=aborted,
        fetch_offset=position,
        key_deserializer=None,
        value_deserializer=None,
        check_crcs=True,
        isolation_level=READ_COMMITTED,
    )
    records: list[Any] = []
    for record in parsed:
        records.append(record)
        if len(records) == limit:
            break
    if all(_is_text(name) for record in records for name, _ in record.headers):
        return [], position
    return records, parsed.next_fetch_offset


async def _fetch(consumer: AIOKafkaConsumer, partition: TopicPartition, position: int) -> tuple[Any, Any]:
    """The raw batches from `position` on, and the aborted transactions among them."""
    client = consumer._client
    request = FetchRequest(
        0, 1, FETCH_BYTES, READ_COMMITTED, [(partition.topic, [(partition.partition, position, FETCH_BYTES)])]
    )
    response = await client.send(client.cluster.leader_for_partition(partition), request)
    answer: Mapping[str, Any] | Any = response.topics[0][1][0]
    _, error_code, _, *rest = answer
    error = for_code(error_code)
    if error is not NoError:
        raise error(partition)
    aborted = rest[2] if response.API_VERSION >= 11 else rest[-2]
    return _LenientRecords(rest[-1]), aborted
