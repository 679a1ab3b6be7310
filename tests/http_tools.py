"""One small payment service behind the HTTP edge, written for FastAPI and for Starlette, sync and async.

Given the environment variable PAYMENTS_URL, `uvicorn --factory tests.http_tools:service` serves it.
"""

# Annotations are evaluated here, because FastAPI could not find the `keys` of a function in their text.
import asyncio
import json
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import anyio.from_thread
import httpx
from fastapi import BackgroundTasks, Body, Depends, FastAPI
from sqlalchemy import URL, Engine, create_engine, func, make_url, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from idemq import schema
from idemq.http import IdempotencyKeys
from tests.once_tools import Effect, effects

T = TypeVar("T")

#: Framework and kind of endpoint -> the driver for each database.
SYNC = {"sqlite": "pysqlite", "postgres": "psycopg", "mariadb": "pymysql"}
ASYNC = {"sqlite": "aiosqlite", "postgres": "asyncpg", "mariadb": "asyncmy"}
STYLES = {"fastapi-def": SYNC, "fastapi-async": ASYNC, "starlette-async": ASYNC, "starlette-def": SYNC}


@dataclass
class Gate:
    """Holds an endpoint that asks for it, until `leave`."""

    inside: threading.Event = field(default_factory=threading.Event)
    leave: threading.Event = field(default_factory=threading.Event)

    def __call__(self) -> None:
        self.inside.set()
        assert self.leave.wait(90)


def who(request: Request) -> str:
    caller = request.headers.get("authorization", "alice")
    if caller == "nobody":
        raise HTTPException(401)
    return caller


def pay(session: Session, order: dict[str, Any]) -> Response:
    """What every endpoint does: write one effect, then answer as the order says."""
    if touched := order.get("touch"):
        session.get_one(Effect, touched).mark = order["mark"]
    else:
        session.add(Effect(mark=order["mark"]))
    if not order.get("late"):
        session.flush()
    number = session.scalar(select(func.max(effects.c.seq))) if not order.get("late") else 0
    status = order.get("status", 201)
    match order.get("answer"):
        case "error":
            raise OSError("the endpoint fails")
        case "raised":
            raise HTTPException(status, detail=f"refused {number}")
        case "stream":
            return StreamingResponse(iter([b"a", b"b"]), status)
        case "bytes":
            return Response(b"\xff\x00" + order["mark"].encode(), status, media_type="image/png")
        case "empty":
            return Response(status_code=204)
        case "text":
            return Response("x" * order["length"], status)
        case "commit":
            session.connection().commit()
    headers = {"Location": f"/payments/{number}", "Set-Cookie": "secret=1", "X-Shop": "ä"}
    return JSONResponse({"payment": number, "mark": order["mark"]}, status, headers)


def fastapi_def(keys: IdempotencyKeys[Session], gate: Gate) -> FastAPI:
    app = FastAPI()

    @app.post("/payments")
    @app.post("/shops/{shop}/payments")
    def endpoint(
        order: Annotated[dict[str, Any], Body()],
        session: Annotated[Session, Depends(keys.session)],
        tasks: BackgroundTasks,
    ) -> Response:
        response = pay(session, order)
        if order.get("hold"):
            gate()
        if order.get("task"):
            tasks.add_task(gate.inside.set)
        return response

    return app


def fastapi_async(keys: IdempotencyKeys[AsyncSession], gate: Gate) -> FastAPI:
    app = FastAPI()

    @app.post("/payments")
    @app.post("/shops/{shop}/payments")
    async def endpoint(
        order: Annotated[dict[str, Any], Body()],
        session: Annotated[AsyncSession, Depends(keys.session)],
        tasks: BackgroundTasks,
    ) -> Response:
        response = await session.run_sync(pay, order)
        if order.get("hold"):
            await asyncio.to_thread(gate)
        if order.get("task"):
            tasks.add_task(gate.inside.set)
        return response

    return app


def starlette_async(keys: IdempotencyKeys[AsyncSession], gate: Gate) -> Starlette:
    async def endpoint(request: Request) -> Response:
        session = await keys.session(request)
        order = await request.json()
        response = await session.run_sync(pay, order)
        if order.get("hold"):
            await asyncio.to_thread(gate)
        return response

    paths = ["/payments", "/shops/{shop}/payments"]
    return Starlette(routes=[Route(path, endpoint, methods=["POST"]) for path in paths])


def starlette_def(keys: IdempotencyKeys[Session], gate: Gate) -> Starlette:
    def endpoint(request: Request) -> Response:
        session = anyio.from_thread.run(keys.session, request)
        order = json.loads(anyio.from_thread.run(request.body))
        response = pay(session, order)
        if order.get("hold"):
            gate()
        return response

    paths = ["/payments", "/shops/{shop}/payments"]
    return Starlette(routes=[Route(path, endpoint, methods=["POST"]) for path in paths])


MAKERS: dict[str, Callable[[Any, Gate], Any]] = {
    "fastapi-def": fastapi_def,
    "fastapi-async": fastapi_async,
    "starlette-async": starlette_async,
    "starlette-def": starlette_def,
}


def make(style: str, engine: Engine | AsyncEngine, gate: Gate, **options: Any) -> Any:
    """The service, with the edge around it."""
    keys: IdempotencyKeys[Any] = IdempotencyKeys(engine, **{"caller": who, **options})
    app = MAKERS[style](keys, gate)
    app.add_middleware(keys.middleware)
    return app


def make_engine(url: URL, driver: str, seconds: float, **options: Any) -> Engine | AsyncEngine:
    """`seconds`: how long SQLite waits for its lock."""
    full = url.set(drivername=f"{url.get_backend_name()}+{driver}")
    if url.get_backend_name() == "sqlite":
        options["connect_args"] = {"timeout": seconds}
    if driver in ASYNC.values():
        return create_async_engine(full, **options)
    return create_engine(full, **options)


@dataclass
class Api:
    """Calls the service in this process."""

    app: ASGIApp
    gate: Gate
    engine: Engine | AsyncEngine
    #: Apart from the service, to look at what it did.
    watch: Engine
    runner: asyncio.Runner

    async def asked(
        self,
        key: str | Sequence[str] | None = '"k1"',
        path: str = "/payments",
        *,
        caller: str = "alice",
        content: bytes | None = None,
        **order: Any,
    ) -> httpx.Response:
        keys = [] if key is None else [key] if isinstance(key, str) else key
        headers = [(b"Idempotency-Key", each.encode()) for each in keys]
        headers += [(b"Authorization", caller.encode()), (b"Content-Type", b"application/json")]
        body = content if content is not None else json.dumps({"mark": "paid", **order}).encode()
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            response: httpx.Response = await client.post(path, content=body, headers=headers)
            return response

    def post(self, *given: Any, **more: Any) -> httpx.Response:
        return self.run(self.asked(*given, **more))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def marks(self) -> list[str]:
        with self.watch.connect() as connection:
            return list(connection.scalars(select(effects.c.mark).order_by(effects.c.seq)))

    def claims(self) -> int:
        with self.watch.connect() as connection:
            return connection.scalar(select(func.count()).select_from(schema.table("idemq_processed"))) or 0

    def busy(self) -> int:
        """Connections that the service holds."""
        pool: Any = (self.engine.sync_engine if isinstance(self.engine, AsyncEngine) else self.engine).pool
        return int(pool.checkedout())

    def close(self) -> None:
        self.gate.leave.set()
        if isinstance(self.engine, AsyncEngine):
            self.runner.run(self.engine.dispose())
        else:
            self.engine.dispose()
        self.runner.close()


def problem(response: httpx.Response) -> str:
    """The kind of a problem document, whose form is checked."""
    assert response.headers["content-type"] == "application/problem+json"
    document = response.json()
    assert document["status"] == response.status_code
    assert document["title"]
    assert document["detail"]
    address, _, kind = document["type"].partition("#")
    assert response.headers["link"] == f'<{address}>; rel="describedby"'
    return str(kind)


def replayed(response: httpx.Response) -> bool:
    return bool(response.headers.get("idempotency-replayed") == "true")


class FileGate(Gate):
    """For a process of its own: an endpoint that is held makes a file, and stays until it is killed; unless
    there is a file that lets it go."""

    def __call__(self) -> None:
        directory = Path(os.environ["DIRECTORY"])
        (directory / "inside").touch()
        if not (directory / "go").exists():
            self.leave.wait()


def service() -> ASGIApp:
    """For uvicorn: database, driver, style and directory are in the environment. A file `die` in that
    directory means: be killed when the COMMIT is done and the response is about to leave."""
    engine = make_engine(make_url(os.environ["PAYMENTS_URL"]), os.environ["DRIVER"], 30)
    app: ASGIApp = make(os.environ["STYLE"], engine, FileGate())
    die = Path(os.environ["DIRECTORY"]) / "die"

    async def dies(scope: Scope, receive: Receive, send: Send) -> None:
        async def deadly(message: Message) -> None:
            if message["type"] == "http.response.start" and die.exists():
                os.kill(os.getpid(), signal.SIGKILL)
            await send(message)

        await app(scope, receive, deadly)

    return dies
