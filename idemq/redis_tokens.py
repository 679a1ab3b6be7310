"""One-time tokens in Redis: like `idemq.tokens`, but *outside the database's transaction*.

    tokens = RedisTokens(redis.Redis(...))
    token = tokens.issue("checkout 7", lifetime=900)
    ...
    if not tokens.redeem("checkout 7", token):
        return "this form was sent already"

The token is gone once it is redeemed, also when the work that follows is rolled back, the process dies before
it, or the reply of `redeem` is lost: issue a new one then. A failover of Redis to a replica that is behind
forgets tokens, or knows again those that were redeemed just before: what must hold through that belongs into
`idemq.tokens`.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from idemq.tokens import RANDOM, check_lifetime, digest, scope_bytes

if TYPE_CHECKING:
    import redis
    import redis.asyncio

#: What the keys in Redis begin with, if nothing else is said.
PREFIX = "idemq:token:"


class RedisTokens:
    """Tokens in the Redis of a sync client; `prefix` begins all keys. Errors are those of redis-py."""

    def __init__(self, client: redis.Redis, prefix: str = PREFIX) -> None:
        self._client, self._prefix = client, prefix

    def issue(self, scope: str, *, lifetime: float | None = None) -> str:
        """A new token for `scope`, to be redeemed once within `lifetime` seconds (None: ever)."""
        token = secrets.token_urlsafe(RANDOM)
        self._client.set(_key(self._prefix, scope, token), b"", px=_milliseconds(lifetime))
        return token

    def redeem(self, scope: str, token: str | None) -> bool:
        """True for one caller, False for every other: one DEL, whose count decides."""
        key = _key(self._prefix, scope, token or "")
        return self._client.delete(key) == 1


class AsyncRedisTokens:
    """`RedisTokens` for a client of `redis.asyncio`."""

    def __init__(self, client: redis.asyncio.Redis, prefix: str = PREFIX) -> None:
        self._client, self._prefix = client, prefix

    async def issue(self, scope: str, *, lifetime: float | None = None) -> str:
        """See `RedisTokens.issue`."""
        token = secrets.token_urlsafe(RANDOM)
        await self._client.set(_key(self._prefix, scope, token), b"", px=_milliseconds(lifetime))
        return token

    async def redeem(self, scope: str, token: str | None) -> bool:
        """See `RedisTokens.redeem`."""
        key = _key(self._prefix, scope, token or "")
        return await self._client.delete(key) == 1


def _key(prefix: str, scope: str, token: str) -> str:
    """Scope and token in one key: a token of another scope is another key, so that DEL compares both."""
    return f"{prefix}{digest(scope_bytes(scope).hex() + ' ' + token).hex()}"


def _milliseconds(lifetime: float | None) -> int | None:
    check_lifetime(lifetime)
    return None if lifetime is None else max(1, round(lifetime * 1000))
