"""From raw bytes to the payload that a handler asks for: bounded, and never through an unsafe decoder.

Everything that cannot be decoded raises `Unreadable`, with the reason in words.
"""

from __future__ import annotations

import bz2
import zlib
from collections.abc import Callable
from typing import Any

import msgspec

from idemq.errors import Unreadable
from idemq.message import Message

#: The largest body after decompression, in bytes.
MAX_BODY_BYTES = 64 * 1024 * 1024

_STEP = 1024 * 1024

#: Content encodings that say nothing about compression (kombu puts the character set there).
_PLAIN = frozenset({"", "identity", "binary", "utf-8", "utf8", "us-ascii", "ascii"})
#: Names of compressed encodings, kombu's `compression` header included.
_ZLIB = frozenset({"gzip", "x-gzip", "deflate", "zlib", "application/x-gzip"})
_BZIP2 = frozenset({"bzip2", "bzip", "application/x-bz2"})

Decoder = Callable[[bytes], Any]


def decoder_for(kind: Any) -> Decoder:
    """The function that decodes JSON into `kind`: a dataclass, Struct, TypedDict or pydantic model."""
    validate: Decoder | None = getattr(kind, "model_validate_json", None)
    if validate is not None:  # pydantic, which is optional and not imported here
        return validate
    return msgspec.json.Decoder(kind).decode


def decode(message: Message, decoder: Decoder) -> Any:
    """The payload of `message`. Raises `Unreadable`."""
    if message.body is None:
        raise Unreadable("the message has no body (a tombstone); ask for Message to handle those")
    _refuse_other_types(message.content_type)
    body = decompress(message)
    try:
        return decoder(body)
    except (ValueError, RecursionError) as error:  # msgspec's and pydantic's are ValueErrors
        raise Unreadable(f"the body does not fit the payload type: {error}") from error


def decompress(message: Message) -> bytes:
    """The body without its compression, at most `MAX_BODY_BYTES` of it."""
    body = message.body or b""
    for name in (message.content_encoding, message.headers.get("compression")):
        encoding = str(name or "").lower()
        if encoding in _PLAIN:
            continue
        if encoding in _ZLIB:
            body = _bounded(body, _Inflate())
        elif encoding in _BZIP2:
            body = _bounded(body, bz2.BZ2Decompressor())
        else:
            raise Unreadable(f"the content encoding {encoding[:60]!r} is not supported")
    return body


class _Inflate:
    """zlib's decompressor with the interface of bz2's."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=47)  # 47: a gzip or a zlib header

    def decompress(self, data: bytes, limit: int) -> bytes:
        return self._stream.decompress(self._stream.unconsumed_tail or data, limit)

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data


def _bounded(body: bytes, stream: _Inflate | bz2.BZ2Decompressor) -> bytes:
    """In steps, because zlib holds what one call returns twice."""
    parts: list[bytes] = []
    size = 0
    try:
        while not stream.eof:
            part = stream.decompress(body, _STEP)
            body = b""
            if not part and not stream.eof:
                raise EOFError("it ends too early")
            parts.append(part)
            size += len(part)
            if size > MAX_BODY_BYTES:
                raise Unreadable(f"the body is over {MAX_BODY_BYTES} bytes after decompression")
    except (zlib.error, OSError, EOFError, ValueError) as error:
        raise Unreadable(f"the body cannot be decompressed: {error}") from error
    if stream.unused_data:
        raise Unreadable("the body goes on after its compressed part")
    return b"".join(parts)


def _refuse_other_types(content_type: str | None) -> None:
    kind = (content_type or "").partition(";")[0].strip().lower()
    known = ("", "application/json", "text/json", "text/plain", "application/octet-stream")
    if kind not in known and not kind.endswith("+json"):
        raise Unreadable(f"the content type {kind[:60]!r} is not supported; publish application/json")
    charset = (content_type or "").lower().partition("charset=")[2].strip(' "')
    if charset and charset not in _PLAIN:
        raise Unreadable(f"the character set {charset[:60]!r} is not supported; publish UTF-8")
