"""The `Idempotency-Key` header for Starlette and FastAPI endpoints.

    keys = IdempotencyKeys(engine, caller=lambda request: request.user.identity)
    app = FastAPI()
    app.add_middleware(keys.middleware)

    @app.post("/payments", status_code=201)
    def pay(payment: Payment, session: Annotated[Session, Depends(keys.session)]) -> Receipt: ...

Guaranteed: for each caller, route and key, what endpoints write through `session` is committed at most once,
together with the answer; an answer that says so is sent only after that COMMIT, and every repeat gets it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Generic, TypeVar, cast, overload

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from idemq import options
from idemq import schema as tables
from idemq.errors import SetupError
from idemq.http_answers import DRAFT
from idemq.once import once
from idemq.scopes import refuse_shared

try:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send
except ImportError:
    raise SetupError('The HTTP edge needs Starlette: pip install "idemq[http]"') from None

from idemq.http_exchange import AsyncBlock, Block, Exchange, SyncBlock, Terms, threads

S = TypeVar("S", Session, AsyncSession)

Caller = Callable[[Request], str]


class IdempotencyKeys(Generic[S]):
    """Keys that clients send with requests, recorded in the database of `engine`."""

    @overload
    def __init__(
        self: IdempotencyKeys[Session],
        engine: Engine,
        *,
        caller: Caller,
        name: str = ...,
        required: bool = ...,
        wait: float = ...,
        docs: str = ...,
        schema: str | None = ...,
    ) -> None: ...
    @overload
    def __init__(
        self: IdempotencyKeys[AsyncSession],
        engine: AsyncEngine,
        *,
        caller: Caller,
        name: str = ...,
        required: bool = ...,
        wait: float = ...,
        docs: str = ...,
        schema: str | None = ...,
    ) -> None: ...
    def __init__(
        self,
        engine: Engine | AsyncEngine,
        *,
        caller: Caller | None = None,
        name: str = "http",
        required: bool = True,
        wait: float = 1.0,
        docs: str = DRAFT,
        schema: str | None = None,
    ) -> None:
        """`caller` says whose key it is: a text for each authenticated client, from the request.

        `name` is the service's, where several have routes alike and one database. With `required=False`
        a request without a key is run like any other. A request with the key of one that still runs waits for
        it for `wait` seconds (SQLite: the connection's busy timeout) before it is told so. `docs` is
        the address of your documentation of the keys, for problem documents. Raises `SetupError`.
        """
        if not isinstance(engine, Engine | AsyncEngine):
            raise SetupError(f"IdempotencyKeys(): {type(engine).__name__} is no Engine or AsyncEngine")
        if not callable(caller) or inspect.iscoroutinefunction(caller):
            raise SetupError(
                "IdempotencyKeys(): caller= is a plain function from the request to a text that names the "
                "authenticated client. Without it one client could read the answers of another by its keys; "
                "if there is only one, write caller=lambda request: 'everybody'"
            )
        options.check(name, (), {"wait": wait})
        refuse_shared(engine.sync_engine if isinstance(engine, AsyncEngine) else engine)
        tables.tables(schema)  # refuses a name that is no plain identifier
        self._terms = Terms(caller, name, required, docs, _blocks(engine, wait, schema))
        #: Where in the ASGI scope a request's exchange is.
        self._place = f"idemq.http.{id(self):x}"

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """For `app.add_middleware`, before all others: what is added later stays around it."""

        async def edge(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            exchange = Exchange(self._terms, receive, send)
            scope[self._place] = exchange
            await exchange.run(app, scope)

        return edge

    async def session(self, request: Request) -> S:
        """The session of the transaction in which this request's key is claimed: `Depends(keys.session)`, or
        `await keys.session(request)` in an endpoint without FastAPI.

        Raises when the endpoint is not to run: the middleware then sends the answer.
        """
        exchange = request.scope.get(self._place)
        if not isinstance(exchange, Exchange):
            raise SetupError("keys.session() finds no keys.middleware: app.add_middleware(keys.middleware)")
        return cast(S, await exchange.begin(request))


def _blocks(
    engine: Engine | AsyncEngine, wait: float, schema: str | None
) -> Callable[[str, str, bytes], Block]:
    if isinstance(engine, AsyncEngine):
        return lambda consumer, identifier, body: AsyncBlock(
            once(engine, consumer, identifier, body=body, wait=wait, schema=schema)
        )
    claims, commits = threads()
    return lambda consumer, identifier, body: SyncBlock(
        once(engine, consumer, identifier, body=body, wait=wait, schema=schema), claims, commits
    )
