from __future__ import annotations

import bz2
import gzip
import pickle
import resource
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from idemq.errors import Unreadable
from idemq.message import Message
from idemq.payload import MAX_BODY_BYTES, decode, decoder_for


@dataclass
class Payment:
    id: Any


DECODER = decoder_for(Payment)
GOOD = b'{"id": 1}'


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "deflate", "zlib", "bzip2", "application/x-gzip"])
def test_compressed_bodies_are_read_by_header_or_encoding(encoding: str) -> None:
    compress = bz2.compress if "bz" in encoding else gzip.compress if "gzip" in encoding else zlib.compress
    body = compress(GOOD)
    assert decode(Message(body=body, content_encoding=encoding), DECODER) == Payment(1)
    assert decode(Message(body=body, headers={"compression": encoding}), DECODER) == Payment(1)


@pytest.mark.hazard("H11")
@pytest.mark.parametrize(
    ("body", "values"),
    [
        (b"{", {}),
        (b"", {}),
        (None, {}),
        (b"[]", {}),
        ('{"id": "é"}'.encode("latin-1"), {}),
        ('{"id": 1}'.encode("utf-16"), {"content_type": "application/json; charset=utf-16"}),
        (GOOD, {"content_type": "application/xml"}),
        (GOOD, {"headers": {"compression": "nope"}}),
        (GOOD, {"content_encoding": "gzip"}),
        (gzip.compress(GOOD, mtime=0)[:-9], {"content_encoding": "gzip"}),
        (gzip.compress(GOOD, mtime=0) + gzip.compress(b" ", mtime=0), {"content_encoding": "gzip"}),
        (bz2.compress(GOOD)[:-4], {"content_encoding": "bzip2"}),
        (b"", {"content_encoding": "gzip"}),
    ],
)
def test_what_cannot_be_read_whole_is_unreadable(body: bytes | None, values: dict[str, Any]) -> None:
    with pytest.raises(Unreadable):
        decode(Message(body=body, **values), DECODER)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.hazard("S1")
@pytest.mark.parametrize("content_type", ["application/x-python-serialize", "application/x-yaml", "", None])
def test_a_pickle_is_unreadable_and_runs_nothing(tmp_path: Path, content_type: str | None) -> None:
    proof = tmp_path / "ran"
    body = pickle.dumps(Evil(proof))
    with pytest.raises(Unreadable):
        decode(Message(body=body, content_type=content_type), DECODER)
    assert not proof.exists()


@pytest.mark.hazard("S2")
@pytest.mark.parametrize("encoding", ["gzip", "zlib", "bzip2"])
def test_a_bomb_is_unreadable_and_bounded(encoding: str) -> None:
    zeros = b"0" * 1024 * 1024
    maker: Any = (
        bz2.BZ2Compressor()
        if encoding == "bzip2"
        else zlib.compressobj(wbits=31 if encoding == "gzip" else 15)
    )
    bomb = b"".join(maker.compress(zeros) for _ in range(200)) + maker.flush()
    assert len(bomb) < 300_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Unreadable, match=str(MAX_BODY_BYTES)):
        decode(Message(body=bomb, content_encoding=encoding), DECODER)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 80 * 1024


@pytest.mark.hazard("S4")
@pytest.mark.parametrize("kind", ["dataclass", "pydantic"])
@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_json_that_is_nested_too_deep_is_unreadable(kind: str, opening: bytes) -> None:
    import pydantic

    class Order(pydantic.BaseModel):
        id: Any

    decoder = DECODER if kind == "dataclass" else decoder_for(Order)
    for depth in (1_000, 100_000):
        deep = opening * depth + b"1" + (b"]" if opening == b"[" else b"}") * depth
        try:
            decode(Message(body=b'{"id": ' + deep + b"}"), decoder)
        except Unreadable:
            continue
        assert depth == 1_000
