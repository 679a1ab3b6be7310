"""One request of the HTTP edge: its claim, the response that is held back, and what becomes of both.

Guaranteed: nothing of a response is sent while a block is open. What was held back is sent after the block's
COMMIT, or is dropped for an answer or an error that is nearer to the truth.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from hashlib import blake2b, sha256
from typing import Any, TypeVar
from uuid import uuid4

from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from idemq import http_answers as answers
from idemq.bridge import uninterrupted
from idemq.drivers import is_contention
from idemq.errors import Conflict, InFlight, SetupError
from idemq.message import MAX_ID_BYTES, encoded
from idemq.work import AsyncEngineWork, EngineWork

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)

#: Threads that claim for a sync engine, apart from those of the endpoints: a claim waits for its twin, whose
#: endpoint and commit must find threads meanwhile.
CLAIMS = 32
#: Threads that commit. So many that none is ever waited for, whatever the size of the connection pool: a
#: flush may wait for a row that another request holds until it has committed.
COMMITS = 10_000

#: Ways to send a body that nobody can read here.
_UNREADABLE = {"http.response.pathsend", "http.response.zerocopysend", "http.response.trailers"}


class Answered(HTTPException):
    """The endpoint is not to run. Frameworks make a response of it, in whose place the answer is sent."""


class Undone(Exception):
    """Ends a block without its work."""


class SyncBlock:
    """A `once` block of an Engine, entered and left in threads."""

    def __init__(
        self, block: AbstractContextManager[EngineWork], claims: Executor, commits: Executor
    ) -> None:
        self._block, self._claims, self._commits = block, claims, commits
        self.work: EngineWork

    async def enter(self) -> None:
        self.work = await _in_thread(self._claims, self._block.__enter__)

    async def leave(self, error: BaseException | None) -> None:
        def leave() -> None:
            self._block.__exit__(type(error) if error else None, error, None)

        await _in_thread(self._commits, leave)


class AsyncBlock:
    """A `once` block of an AsyncEngine."""

    def __init__(self, block: AbstractAsyncContextManager[AsyncEngineWork]) -> None:
        self._block = block
        self.work: AsyncEngineWork

    async def enter(self) -> None:
        self.work = await self._block.__aenter__()

    async def leave(self, error: BaseException | None) -> None:
        await self._block.__aexit__(type(error) if error else None, error, None)


Block = SyncBlock | AsyncBlock


@dataclass(frozen=True, slots=True)
class Terms:
    """What an application has settled for its keys."""

    caller: Callable[[Request], str]
    name: str
    required: bool
    docs: str
    #: Consumer, id and body of a request -> its block.
    block: Callable[[str, str, bytes], Block]


class Exchange:
    """A request and its response."""

    def __init__(self, terms: Terms, receive: Receive, send: Send) -> None:
        self._terms, self._receive, self._send = terms, receive, send
        self._digest, self._body_ended = blake2b(digest_size=16), False
        #: Consumer, id and body of the claim.
        self._identity: tuple[str, str, bytes] | None = None
        #: Without a key of the client's there is nobody who could ask for the answer again.
        self._keyed = True
        self._block: Block | None = None
        self._held: list[Message] = []
        self._answer: answers.Answer | None = None
        self._failure: Exception | None = None

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        error: BaseException | None = None
        try:
            await app(scope, self.receive, self.send)
        except BaseException as raised:
            error = raised
        if self._block is not None:
            error = await self._undo(error or RuntimeError("the endpoint has sent no whole response"))
        if error is not None and not isinstance(error, Exception):
            raise error
        if self._failure is not None:
            raise self._failure
        if self._answer is not None:
            for message in self._answer.messages():
                await self._send(message)
        elif error is not None:
            raise error

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._digest.update(message.get("body", b""))
            self._body_ended = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if self._answer is not None or self._failure is not None:
            return  # what a framework makes of `Answered`, or of the error below
        if message["type"] == "http.response.start" and answers.outcome_of(message["status"]) == "undone":
            await self._close(Undone())
        if self._block is None:
            await self._send(message)
            return
        self._held.append(message)
        try:
            if message["type"] in _UNREADABLE or message.get("more_body", False):
                raise SetupError(
                    f"{self._consumer}: a streamed response cannot be kept for a repeat. Answer with a whole "
                    "one; a middleware that streams belongs around keys.middleware, so add it after that"
                )
            if message["type"] == "http.response.body":
                await self._finish(message.get("body", b""))
        except Exception as error:
            # Raised here too, so that no background task runs; but what is raised to the server is decided
            # in `run`, whatever becomes of it on its way.
            self._failure = await self._undo(error) if self._block is not None else error
            raise

    async def begin(self, request: Request) -> Any:
        """The session of the claim. Raises `Answered` when the endpoint is not to run."""
        if self._block is None and self._answer is None:
            if self._identity is not None:
                raise SetupError(
                    f"{self._consumer}: keys.session() was called after the response, when its transaction "
                    "has ended: background tasks need a session of their own"
                )
            await self._identify(request)
        if self._block is None:
            assert self._answer is not None
            raise Answered(self._answer.status, detail="see Idempotency-Key")
        return self._block.work.session

    async def _identify(self, request: Request) -> None:
        caller = self._terms.caller(request)
        if not isinstance(caller, str) or not caller:
            raise SetupError(
                f"caller= returned {caller!r} for {request.url.path}: it must name the client by a text. "
                "Raise HTTPException(401) for those who may not call"
            )
        try:
            key = answers.key_in(request.headers.getlist("idempotency-key"))
        except answers.Malformed as error:
            self._answer = answers.malformed(self._terms.docs, str(error))
            return
        if key is None and self._terms.required:
            self._answer = answers.missing(self._terms.docs)
            return
        if not self._body_ended:
            await request.body()
        self._keyed = key is not None
        consumer, outside = _route(request.scope)
        identifier = json.dumps([key or str(uuid4()), outside, caller])
        if len(identifier) > MAX_ID_BYTES:
            identifier = sha256(identifier.encode()).hexdigest()
        parts = [encoded(request.scope["path"]), request.scope["query_string"], self._digest.digest()]
        self._identity = f"{self._terms.name} {consumer}", identifier, b"\n".join(parts)
        await self._open()

    async def _open(self) -> None:
        """Claim; what the claim finds, unless it is fresh, is the answer."""
        assert self._identity is not None
        try:
            await uninterrupted(self._enter(self._terms.block(*self._identity)))
        except Conflict:
            self._answer = answers.reused(self._terms.docs)
        except InFlight:
            self._answer = answers.in_progress(self._terms.docs)
        except DBAPIError as error:
            if not is_contention(error):
                raise
            self._answer = answers.in_progress(self._terms.docs)

    async def _enter(self, block: Block) -> None:
        # All in one step that is not interrupted, or a cancelled request would leave a block open.
        await block.enter()
        if block.work.fresh:
            self._block = block
            return
        self._answer = answers.replayed(block.work.result)
        await block.leave(None)

    async def _finish(self, body: bytes) -> None:
        """The response is whole: commit, then send it."""
        start = next(each for each in self._held if each["type"] == "http.response.start")
        if answers.outcome_of(start["status"]) == "refused":
            await self._close(Undone())
            if self._keyed:
                await self._open()  # a twin may have been quicker, and then has the answer
        if self._block is not None:
            if self._keyed:
                self._keep(answers.kept(start["status"], start.get("headers", ()), body))
            await self._close(None)
        if self._answer is None:
            for message in self._held:
                await self._send(message)

    def _keep(self, result: dict[str, Any]) -> None:
        assert self._block is not None
        try:
            self._block.work.result = result
        except ValueError as error:
            raise SetupError(
                f"{self._consumer}: the response is too large to be kept for a repeat ({error}). "
                "Answer with the address of what is large"
            ) from None

    async def _undo(self, error: E) -> E | Exception:
        """Roll back for `error`; returns it, or what the block has to add to it."""
        try:
            await self._close(error)
        except Exception as told:
            return told
        return error

    async def _close(self, error: BaseException | None) -> None:
        block, self._block = self._block, None
        if block is not None:
            await uninterrupted(block.leave(error))

    @property
    def _consumer(self) -> str:
        return self._identity[0] if self._identity is not None else ""


async def _in_thread(threads: Executor, work: Callable[[], T]) -> T:
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(threads, context.run, work)


def _route(scope: Scope) -> tuple[str, str]:
    """Method and template of the route, and the path in front of it, where routers and mounts are."""
    template = getattr(scope.get("route"), "path", None)
    if not isinstance(template, str):
        raise SetupError("keys.session() finds no route in the request: it needs Starlette 1.0 or FastAPI")
    slashes = template.count("/") + sum(str(value).count("/") for value in scope["path_params"].values())
    return f"{scope['method']} {template}", scope["path"].rsplit("/", slashes)[0]


def threads() -> tuple[ThreadPoolExecutor, ThreadPoolExecutor]:
    """For claims, and for commits."""
    return (
        ThreadPoolExecutor(CLAIMS, "idemq-http-claims"),
        ThreadPoolExecutor(COMMITS, "idemq-http-commits"),
    )
