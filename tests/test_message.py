from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idemq.errors import NoId
from idemq.message import Message, encoded, fingerprint_of, key_of, message_id

texts = st.text(st.characters(codec=None))


@pytest.mark.hazard("H5")
@given(texts, texts)
def test_different_ids_have_different_keys(first: str, second: str) -> None:
    assert (key_of(first) == key_of(second)) == (first == second)


@pytest.mark.hazard("H5")
@given(st.binary(), st.binary())
def test_different_raw_ids_are_different_texts(first: bytes, second: bytes) -> None:
    texts = [message_id(Message(body=b"", headers={"id": each}), ("id",)) for each in (first, second) if each]
    if len(texts) == 2:
        assert (encoded(texts[0]) == encoded(texts[1])) == (first == second)


@given(st.uuids())
def test_a_canonical_uuid_is_its_own_key_and_no_other_spelling_is(value: UUID) -> None:
    if value.version == 8:
        assert key_of(str(value)) != value.bytes
    else:
        assert key_of(str(value)) == value.bytes
    assert len({key_of(each) for each in (str(value), value.hex, f"{{{value}}}")}) == 3


@pytest.mark.hazard("H25")
def test_an_id_is_never_guessed() -> None:
    for headers in ({}, {"message-id": ""}, {"message-id": None}, {"message-id": 1.5}, {"message-id": True}):
        with pytest.raises(NoId):
            message_id(Message(body=b"", headers=headers), None)
    with pytest.raises(NoId, match="more than once"):
        message_id(Message(body=b"", headers={"id": "1"}, repeated=frozenset({"id"})), ("id",))


def test_a_missing_id_is_told_with_the_places_where_it_was_looked_for() -> None:
    message = Message(body=b"")
    with pytest.raises(NoId, match=r"idempotency-key; id= names another place"):
        message_id(message, None)
    with pytest.raises(NoId, match="none of the headers that id= names: payment-id, id"):
        message_id(message, ("payment-id", "id"))
    with pytest.raises(NoId, match="the function id= found None"):
        message_id(message, lambda _: None)


def test_a_cloud_event_is_known_by_source_and_id_together() -> None:
    for prefix in ("cloudEvents:", "cloudEvents_", "ce_", "ce-"):
        event = Message(body=b"", headers={prefix + "source": "/shop", prefix + "id": "1"})
        assert message_id(event, None) == "/shop 1"


def test_a_tombstone_has_a_fingerprint_of_its_own() -> None:
    assert fingerprint_of(None) != fingerprint_of(b"")
    assert -(2**31) <= fingerprint_of(b"any") < 2**31
