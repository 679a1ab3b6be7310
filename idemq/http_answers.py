"""What the HTTP edge reads and says: the `Idempotency-Key` field, problem documents, and answers to keep.

The rules are those of draft-ietf-httpapi-idempotency-key-header; problem documents are RFC 9457.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

#: The longest key, in characters.
MAX_KEY = 255
#: What a client is pointed to when the API's own documentation is not given.
DRAFT = "https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/"

#: A String of RFC 8941: printable ASCII in quotes, in which a quote and a backslash are escaped.
_STRING = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"')
#: What many clients send in its place. No quote, comma, semicolon or backslash: these would be a list, a
#: parameter, or a string that was cut.
_BARE = re.compile(r"[!#-+\--:<-\[\]-~]+")

#: These say nothing that a repeat must be told again. 401: come back as somebody. 408, 425 and 429: come
#: back later. The others: the request itself is malformed, which a repeat finds out by itself, and a
#: corrected one may use the key.
_NOT_KEPT = {400, 401, 408, 411, 413, 415, 422, 425, 429}

#: Not part of the answer but of the connection that it went over, or of the moment; a cookie is a secret
#: that a table should not hold.
_DROPPED = {
    b"connection",
    b"content-length",
    b"date",
    b"keep-alive",
    b"proxy-authenticate",
    b"server",
    b"set-cookie",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
}

Headers = Sequence[tuple[bytes, bytes]]
Outcome = Literal["done", "refused", "undone"]


class Malformed(ValueError):
    """The field holds no key; the message says why."""


def key_in(fields: Sequence[str]) -> str | None:
    """The key in the request's `Idempotency-Key` fields; None when there is none. Raises `Malformed`.

    `"abc"` and the bare `abc`, which the draft does not allow, are the same key.
    """
    if not fields:
        return None
    if len(fields) > 1:
        raise Malformed("the field came more than once")
    text = fields[0].strip(" \t")
    if match := _STRING.fullmatch(text):
        key = re.sub(r"\\(.)", r"\1", match[1])
    elif _BARE.fullmatch(text):
        key = text
    else:
        raise Malformed('the value is no quoted string of printable ASCII, like "8e03978e-40d5-43e8"')
    if not 1 <= len(key) <= MAX_KEY:
        raise Malformed(f"the key has {len(key)} characters; 1 to {MAX_KEY} are allowed")
    return key


def outcome_of(status: int) -> Outcome:
    """What becomes of the endpoint's work and of its answer.

    `done`: both are committed. `refused`: the work is undone and the answer kept, because a late copy of a
    request that was refused must not be carried out. `undone`: nothing is kept, and a repeat runs again.
    """
    if status < 400:
        return "done"
    return "refused" if status < 500 and status not in _NOT_KEPT else "undone"


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole response, sent in place of the endpoint's."""

    status: int
    headers: Headers
    body: bytes

    def messages(self) -> list[dict[str, Any]]:
        """As ASGI sends it."""
        headers = list(self.headers)
        if self.status not in (204, 304):
            headers.append((b"content-length", str(len(self.body)).encode()))
        start = {"type": "http.response.start", "status": self.status, "headers": headers}
        return [start, {"type": "http.response.body", "body": self.body}]


def kept(status: int, headers: Headers, body: bytes) -> dict[str, Any]:
    """A response as `work.result`."""
    fields = [
        [name.decode("latin-1"), value.decode("latin-1")]
        for name, value in headers
        if name.lower() not in _DROPPED
    ]
    try:
        return {"status": status, "headers": fields, "text": body.decode()}
    except UnicodeDecodeError:
        return {"status": status, "headers": fields, "base64": b64encode(body).decode()}


def replayed(result: dict[str, Any]) -> Answer:
    """The first response again, with a field that says so."""
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in result["headers"]]
    body = result["text"].encode() if "text" in result else b64decode(result["base64"])
    return Answer(result["status"], [*headers, (b"idempotency-replayed", b"true")], body)


def missing(docs: str) -> Answer:
    return _problem(
        400, docs, "missing", "Idempotency-Key is missing", "Send one, and the same with a retry."
    )


def malformed(docs: str, why: str) -> Answer:
    return _problem(400, docs, "malformed", "Idempotency-Key is malformed", f"Of the key: {why}.")


def reused(docs: str) -> Answer:
    detail = "A retry must be the same request, byte for byte; another request needs a key of its own."
    return _problem(422, docs, "reused", "Idempotency-Key is already used", detail)


def in_progress(docs: str) -> Answer:
    detail = "A request with this key is being processed. Repeat it to get its answer."
    title = "A request is outstanding for this Idempotency-Key"
    return _problem(409, docs, "in-progress", title, detail, (b"retry-after", b"1"))


def _problem(
    status: int, docs: str, kind: str, title: str, detail: str, *more: tuple[bytes, bytes]
) -> Answer:
    content = {"type": f"{docs}#{kind}", "title": title, "status": status, "detail": detail}
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-language", b"en"),
        (b"link", f'<{docs}>; rel="describedby"'.encode()),
        *more,
    ]
    return Answer(status, headers, msgspec.json.encode(content))
