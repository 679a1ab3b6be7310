"""The HTTP edge: every rule of the draft, on every database, in FastAPI and Starlette, sync and async."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from sqlalchemy import URL, Engine, StaticPool, create_engine, delete, select, text
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from idemq import SetupError, once, schema
from idemq.http import IdempotencyKeys
from idemq.http_answers import Malformed, key_in
from tests.http_tools import STYLES, Api, Gate, make, make_engine, problem, replayed
from tests.once_tools import databases, effects
from tests.proxy import proxy
from tests.servers import eventually, free_port

__all__ = ["databases"]

Databases = Callable[[str], tuple[URL, Engine]]
KINDS = ["sqlite", "postgres", "mariadb"]
EVERY = [(kind, style) for style in STYLES for kind in KINDS]


def on(*pairs: tuple[str, str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("kind", "style"), pairs or EVERY)


@pytest.fixture
def database(databases: Databases, kind: str) -> tuple[URL, Engine]:
    url, engine = databases(kind)
    with engine.begin() as connection:
        connection.execute(delete(effects))
        connection.execute(delete(schema.table("idemq_processed")))
    return url, engine


@pytest.fixture
def options() -> dict[str, Any]:
    """Of the keys; a test that wants others parametrizes it."""
    return {}


@pytest.fixture
def api(database: tuple[URL, Engine], kind: str, style: str, options: dict[str, Any]) -> Iterator[Api]:
    url, watch = database
    options = {"wait": 30.0, **options}
    engine = make_engine(url, STYLES[style][kind], options["wait"])
    gate = Gate()
    made = Api(make(style, engine, gate, **options), gate, engine, watch, asyncio.Runner())
    try:
        yield made
    finally:
        made.close()


@dataclass(frozen=True)
class Ask:
    """A request, and what the draft wants to be answered."""

    status: int
    key: str | list[str] | None = '"k1"'
    path: str = "/payments"
    kind: str | None = None
    replayed: bool = False
    more: dict[str, Any] = field(default_factory=dict)


#: Section of the draft and what it says -> requests with their answers, and how many payments are then made.
RULES: dict[str, tuple[list[Ask], int]] = {
    "2.1 a key is a quoted string": ([Ask(201, '"8e03978e-40d5-43e8-bc93-6894a57f9324"')], 1),
    "2.1 quotes and backslashes in it are escaped": (
        [
            Ask(201, r'"a\"b\\c"'),
            Ask(201, r'"a\"b\\c"', replayed=True),
            Ask(201, '"abc"', more={"mark": "b"}),
        ],
        2,
    ),
    "2.1 lenient: a bare word is the same key as the quoted one": (
        [Ask(201, "8e03978e"), Ask(201, '"8e03978e"', replayed=True)],
        1,
    ),
    "2.1 more than one field is refused": ([Ask(400, ['"a"', '"a"'], kind="malformed")], 0),
    "2.1 a list is refused": ([Ask(400, '"a", "b"', kind="malformed"), Ask(400, "a,b", kind="malformed")], 0),
    "2.1 a parameter is refused": ([Ask(400, '"a";b=1', kind="malformed")], 0),
    "2.1 what is no string is refused": (
        [Ask(400, each, kind="malformed") for each in ['"cut', 'cut"', "two words", r'"\a"', '"ä"', "ä"]],
        0,
    ),
    "2.2 another payload under the same key is refused, and the first one's answer stays": (
        [
            Ask(201),
            Ask(422, kind="reused", more={"mark": "other"}),
            Ask(201, replayed=True),
            Ask(201, '"k2"', more={"mark": "other"}),
        ],
        2,
    ),
    "2.4 the fingerprint covers the query and the path's parameters": (
        [
            Ask(201, path="/shops/1/payments"),
            Ask(422, path="/shops/2/payments", kind="reused"),
            Ask(422, path="/shops/1/payments?express=1", kind="reused"),
            Ask(201, path="/shops/1/payments", replayed=True),
        ],
        1,
    ),
    "2.6 a first request is processed, and a retry gets its result": (
        [Ask(201), Ask(201, replayed=True), Ask(201, replayed=True)],
        1,
    ),
    "2.6 that result may be an error": (
        [
            Ask(402, more={"answer": "raised", "status": 402}),
            Ask(402, replayed=True, more={"answer": "raised", "status": 402}),
        ],
        0,
    ),
    "2.7 a missing key is refused": ([Ask(400, None, kind="missing")], 0),
    "6 a key is validated before anything is done": (
        [Ask(400, each, kind="malformed") for each in ["", '""', '"' + "x" * 256 + '"', "x" * 256]],
        0,
    ),
    "6 a key is looked up together with who sent it": (
        [
            Ask(201, more={"caller": "alice"}),
            Ask(201, more={"caller": "bob", "mark": "b"}),
            Ask(201, more={"caller": "bob", "mark": "b"}, replayed=True),
            Ask(401, more={"caller": "nobody"}),
        ],
        2,
    ),
    "keys of one route say nothing about another": (
        [Ask(201), Ask(201, path="/shops/1/payments", more={"mark": "b"}), Ask(201, replayed=True)],
        2,
    ),
}


@pytest.mark.hazard("H30")
@pytest.mark.pattern("reject-at-edge")
@on(("sqlite", "fastapi-def"), ("postgres", "fastapi-async"), ("mariadb", "starlette-async"))
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_of_the_draft(api: Api, rule: str) -> None:
    asks, payments = RULES[rule]
    for ask in asks:
        response = api.post(ask.key, ask.path, **ask.more)
        assert response.status_code == ask.status, response.text
        assert replayed(response) == ask.replayed
        if ask.kind is not None:
            assert problem(response) == ask.kind
    assert len(api.marks()) == payments


@pytest.mark.situation(1)
@pytest.mark.situation(3)
@pytest.mark.pattern("result-cache")
@pytest.mark.pattern("global-id")
@on()
def test_a_retry_gets_the_first_answer_and_the_money_is_taken_once(api: Api) -> None:
    first, second = api.post(), api.post()
    assert (first.status_code, second.status_code) == (201, 201)
    assert (replayed(first), replayed(second)) == (False, True)
    assert first.content == second.content
    for name in ("content-type", "location", "x-shop", "content-length"):
        assert first.headers[name] == second.headers[name]
    assert "set-cookie" in first.headers
    assert "set-cookie" not in second.headers
    assert (api.marks(), api.claims(), api.busy()) == (["paid"], 1, 0)


@pytest.mark.pattern("reject-at-edge")
@on(*[pair for pair in EVERY if pair[0] != "sqlite"])
@pytest.mark.parametrize("options", [{"wait": 0.05}])
def test_while_the_first_request_runs_its_twin_is_told_so_and_later_gets_its_answer(api: Api) -> None:
    async def play() -> tuple[httpx.Response, httpx.Response]:
        first = asyncio.create_task(api.asked(hold=True))
        await asyncio.to_thread(api.gate.inside.wait, 90)
        second = await api.asked(hold=True)
        assert api.marks() == []
        api.gate.leave.set()
        return await first, second

    first, second = api.run(play())
    assert (first.status_code, second.status_code) == (201, 409)
    assert problem(second) == "in-progress"
    assert second.headers["retry-after"] == "1"
    third = api.post(hold=True)
    assert replayed(third)
    assert third.content == first.content
    assert api.marks() == ["paid"]


@on(("sqlite", "fastapi-def"), ("sqlite", "fastapi-async"))
@pytest.mark.parametrize("options", [{"wait": 0.05}])
def test_on_sqlite_any_writer_may_be_the_twin(api: Api) -> None:
    with once(api.watch, "somebody", "else") as work:
        assert work.fresh
        assert problem(api.post()) == "in-progress"
    assert api.post().status_code == 201


@on()
@pytest.mark.parametrize("order", [{"answer": "error"}, {"status": 503}, {"answer": "raised", "status": 500}])
def test_after_an_exception_or_a_5xx_nothing_is_kept_and_the_retry_runs(
    api: Api, order: dict[str, Any]
) -> None:
    for _ in range(2):
        response = api.post(**order)
        assert response.status_code == order.get("status", 500)
        assert not replayed(response)
    assert (api.marks(), api.claims(), api.busy()) == ([], 0, 0)
    assert api.post().status_code == 201


@on()
@pytest.mark.parametrize("status", [402, 403, 404, 409, 410])
@pytest.mark.parametrize("answer", [None, "raised"])
def test_a_refusal_undoes_the_work_and_is_told_again(api: Api, status: int, answer: str | None) -> None:
    first, second = (api.post(status=status, answer=answer) for _ in range(2))
    assert (first.status_code, second.status_code) == (status, status)
    assert first.content == second.content
    assert (replayed(first), replayed(second)) == (False, True)
    assert (api.marks(), api.claims()) == ([], 1)


@on(("sqlite", "fastapi-def"), ("postgres", "fastapi-async"))
@pytest.mark.parametrize("status", [400, 401, 408, 413, 415, 422, 425, 429])
def test_what_a_corrected_or_a_later_request_may_change_is_not_kept(api: Api, status: int) -> None:
    for mark in ("wrong", "wrong again"):
        response = api.post(status=status, mark=mark)
        assert (response.status_code, replayed(response)) == (status, False)
    assert (api.marks(), api.claims()) == ([], 0)
    assert api.post().status_code == 201


@on(("sqlite", "fastapi-def"), ("postgres", "fastapi-async"))
def test_a_body_that_fastapi_refuses_may_be_corrected_under_the_same_key(api: Api) -> None:
    assert api.post(content=b"[1]").status_code == 422
    assert api.post(content=b"{").status_code == 422
    assert (api.claims(), api.busy()) == (0, 0)
    assert api.post().status_code == 201


@on(("postgres", "fastapi-def"), ("postgres", "fastapi-async"), ("sqlite", "starlette-async"))
@pytest.mark.parametrize("order", [{"answer": "bytes"}, {"answer": "empty"}, {"answer": "text", "length": 0}])
def test_answers_that_are_no_text_or_empty_are_told_again_as_they_were(
    api: Api, order: dict[str, Any]
) -> None:
    first, second = api.post(**order), api.post(**order)
    assert first.status_code == second.status_code < 300
    assert first.content == second.content
    assert first.headers.get("content-length") == second.headers.get("content-length")
    assert replayed(second)


@on()
@pytest.mark.parametrize("order", [{"answer": "stream"}, {"answer": "text", "length": 70_000}])
def test_an_answer_that_cannot_be_kept_is_refused_before_the_commit(api: Api, order: dict[str, Any]) -> None:
    assert api.post(**order).status_code == 500
    assert (api.marks(), api.claims(), api.busy()) == ([], 0, 0)

    async def call() -> None:
        transport = httpx.ASGITransport(api.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            await client.post("/payments", json={"mark": "x", **order}, headers={"Idempotency-Key": "k1"})

    with pytest.raises(SetupError, match="kept for a repeat"):
        api.run(call())
    assert api.post().status_code == 201


@on(("postgres", "fastapi-def"), ("postgres", "fastapi-async"), ("sqlite", "fastapi-def"))
def test_a_commit_in_the_endpoint_is_refused_and_undone(api: Api) -> None:
    assert api.post(answer="commit").status_code == 500
    assert (api.marks(), api.claims(), api.busy()) == ([], 0, 0)


@on()
def test_work_that_fails_at_the_commit_is_no_success_and_runs_no_background_task(api: Api) -> None:
    assert api.post(mark="same").status_code == 201
    response = api.post('"k2"', mark="same", late=True, task=True)  # violates a unique index when flushed
    assert response.status_code == 500
    assert (api.marks(), api.claims(), api.busy()) == (["same"], 1, 0)
    assert not api.gate.inside.is_set()


@on(("sqlite", "fastapi-def"), ("postgres", "fastapi-async"))
def test_background_tasks_run_after_the_commit_and_only_for_the_first_request(api: Api) -> None:
    assert api.post(task=True).status_code == 201
    assert api.gate.inside.is_set()
    api.gate.inside.clear()
    assert replayed(api.post(task=True))
    assert not api.gate.inside.is_set()


@on(("sqlite", "fastapi-def"), ("postgres", "fastapi-async"))
@pytest.mark.parametrize("options", [{"required": False}])
def test_where_keys_are_optional_a_request_without_one_is_run_each_time(api: Api) -> None:
    assert [api.post(None, mark=mark).status_code for mark in ("a", "b")] == [201, 201]
    assert api.post(None, mark="c", answer="raised", status=402).status_code == 402
    assert api.post(mark="d").status_code == 201
    assert replayed(api.post(mark="d"))
    assert problem(api.post("two words")) == "malformed"
    assert api.marks() == ["a", "b", "d"]


@on(("postgres", "fastapi-def"))
def test_a_key_that_retention_has_forgotten_is_new(api: Api) -> None:
    api.post()
    with api.watch.begin() as connection:
        connection.execute(delete(schema.table("idemq_processed")))
    assert not replayed(api.post(mark="again"))
    assert api.marks() == ["paid", "again"]


@on(("postgres", "fastapi-def"), ("postgres", "fastapi-async"), ("mariadb", "fastapi-def"))
def test_a_request_that_is_cancelled_in_the_endpoint_leaves_nothing(api: Api) -> None:
    async def play() -> None:
        first = asyncio.create_task(api.asked(hold=True))
        await asyncio.to_thread(api.gate.inside.wait, 90)
        first.cancel()
        api.gate.leave.set()
        with pytest.raises(asyncio.CancelledError):
            await first

    api.run(play())
    assert (api.marks(), api.claims(), api.busy()) == ([], 0, 0)
    assert api.post(hold=True).status_code == 201


@on(("postgres", "fastapi-def"), ("postgres", "fastapi-async"), ("mariadb", "fastapi-def"))
def test_a_request_that_is_cancelled_while_it_waits_for_its_twin_holds_no_claim(api: Api) -> None:
    """The twin fails, so that the wait ends with a fresh claim of a request that nobody wants any more."""

    async def play() -> None:
        first = asyncio.create_task(api.asked(hold=True))
        await asyncio.to_thread(api.gate.inside.wait, 90)
        second = asyncio.create_task(api.asked(hold=True))
        await asyncio.to_thread(eventually, lambda: api.busy() == 2)
        first.cancel()
        second.cancel()
        api.gate.leave.set()
        await asyncio.gather(first, second, return_exceptions=True)

    api.run(play())
    assert (api.marks(), api.claims(), api.busy()) == ([], 0, 0)
    assert api.post(hold=True).status_code == 201


@on(("postgres", "fastapi-def"), ("postgres", "starlette-def"), ("mariadb", "fastapi-def"))
def test_twins_that_wait_take_no_thread_from_the_endpoint_that_they_wait_for(api: Api) -> None:
    async def play() -> list[httpx.Response]:
        first = asyncio.create_task(api.asked(hold=True))
        await asyncio.to_thread(api.gate.inside.wait, 90)
        others = [asyncio.create_task(api.asked(hold=True)) for _ in range(10)]
        await asyncio.to_thread(eventually, lambda: api.busy() == 11)
        api.gate.leave.set()
        return await asyncio.gather(first, *others)

    responses = api.run(play())
    assert [each.status_code for each in responses] == [201] * 11  # none had to wait until it was told 409
    assert api.marks() == ["paid"]


@on(("postgres", "fastapi-def"), ("mariadb", "fastapi-async"), ("mariadb", "fastapi-def"))
@pytest.mark.parametrize("status", [402, 503])
def test_twins_of_a_request_that_does_nothing_agree(api: Api, status: int) -> None:
    """The claim that they wait for is undone, and each may be the next to run."""

    async def play() -> list[httpx.Response]:
        first = asyncio.create_task(api.asked(hold=True, status=status))
        await asyncio.to_thread(api.gate.inside.wait, 90)
        others = [api.asked(hold=True, status=status) for _ in range(6)]
        tasks = [asyncio.create_task(each) for each in others]
        await asyncio.to_thread(eventually, lambda: api.busy() == 7)
        api.gate.leave.set()
        return await asyncio.gather(first, *tasks)

    responses = api.run(play())
    assert {each.status_code for each in responses} <= {status, 409}  # 409: a deadlock between twins, too
    assert (api.marks(), api.claims()) == ([], int(status == 402))
    if status == 402:
        told = [each for each in responses if each.status_code == 402]
        assert sum(not replayed(each) for each in told) == 1
        assert len({each.content for each in told}) == 1


@on(("postgres", "fastapi-def"))
def test_commits_that_wait_for_a_row_take_no_thread_from_the_one_that_holds_it(api: Api) -> None:
    api.post('"row"', mark="row")
    with api.watch.connect() as connection:
        row = connection.scalar(select(effects.c.seq))
    waiting = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = :name")

    def blocked() -> int:
        with api.watch.connect() as connection:
            return int(connection.execute(waiting, {"name": api.watch.url.database}).scalar_one())

    async def play() -> list[httpx.Response]:
        holder = asyncio.create_task(api.asked('"0"', touch=row, mark="0", hold=True))
        await asyncio.to_thread(api.gate.inside.wait, 90)
        others = [api.asked(f'"{number}"', touch=row, mark=str(number), late=True) for number in range(1, 13)]
        tasks = [asyncio.create_task(each) for each in others]
        await asyncio.to_thread(eventually, lambda: blocked() >= 8)
        api.gate.leave.set()
        return await asyncio.gather(holder, *tasks)

    assert [each.status_code for each in api.run(play())] == [201] * 13


class _Server:
    """uvicorn in a thread, for real HTTP."""

    def __init__(self, api: Api) -> None:
        self.port = free_port()
        config = uvicorn.Config(api.app, port=self.port, log_level="critical", lifespan="off", ws="none")
        self._server, self._engine = uvicorn.Server(config), api.engine
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        await self._server.serve()
        if isinstance(self._engine, AsyncEngine):  # whose connections belong to this loop
            await self._engine.dispose()

    def __enter__(self) -> str:
        self._thread.start()
        eventually(lambda: self._server.started, "uvicorn has started")
        return f"http://127.0.0.1:{self.port}"

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()


@pytest.mark.situation(1)
@pytest.mark.situation(3)
@pytest.mark.pattern("reject-at-edge")
@pytest.mark.parametrize("options", [{"wait": 1.0}])
@on(*[(kind, style) for kind in KINDS for style in ("fastapi-def", "fastapi-async")])
def test_fifty_identical_requests_at_the_same_time_have_one_effect(
    database: tuple[URL, Engine], kind: str, style: str, options: dict[str, Any]
) -> None:
    url, watch = database
    engine = make_engine(url, STYLES[style][kind], 30)
    api = Api(make(style, engine, Gate(), **options), Gate(), engine, watch, asyncio.Runner())

    async def play(address: str) -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(base_url=address, timeout=90, limits=limits) as client:
            headers = {"Idempotency-Key": '"one"'}
            asked = [client.post("/payments", json={"mark": "paid"}, headers=headers) for _ in range(50)]
            return await asyncio.gather(*asked)

    with _Server(api) as address:
        responses = api.run(play(address))
    assert {each.status_code for each in responses} <= {201, 409}
    done = [each for each in responses if each.status_code == 201]
    assert sum(not replayed(each) for each in done) == 1
    assert len({each.content for each in done}) == 1
    assert {problem(each) for each in responses if each.status_code == 409} <= {"in-progress"}
    assert (api.marks(), api.claims()) == (["paid"], 1)
    api.close()


@pytest.mark.situation(3)
@on(("postgres", "fastapi-def"), ("postgres", "fastapi-async"))
def test_a_client_that_goes_away_finds_the_answer_when_it_asks_again(api: Api) -> None:
    body = b'{"mark": "paid", "hold": true}'
    request = (
        b"POST /payments HTTP/1.1\r\nHost: shop\r\nAuthorization: alice\r\nContent-Type: application/json\r\n"
        b'Idempotency-Key: "k1"\r\nContent-Length: %d\r\n\r\n%s' % (len(body), body)
    )
    with _Server(api) as address:
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as client:
            client.sendall(request)
            assert api.gate.inside.wait(90)
        api.gate.leave.set()
        eventually(lambda: api.marks() == ["paid"], "the payment is committed")
        headers = {"Idempotency-Key": '"k1"', "Authorization": "alice", "Content-Type": "application/json"}
        assert replayed(httpx.post(f"{address}/payments", content=body, headers=headers))
    assert api.marks() == ["paid"]


@pytest.mark.situation(3)
@pytest.mark.parametrize("lost", ["request", "reply"])
@on(("postgres", "fastapi-def"), ("postgres", "fastapi-async"))
def test_when_the_reply_to_commit_is_lost_the_retry_finds_out(
    database: tuple[URL, Engine], kind: str, style: str, lost: Any
) -> None:
    url, watch = database
    with proxy(url.host or "", url.port or 5432) as between:
        through = url.set(host="127.0.0.1", port=between.port).update_query_dict({"sslmode": "disable"})
        if style == "fastapi-async":
            through = through.difference_update_query(["sslmode"]).update_query_dict({"ssl": "disable"})
        engine = make_engine(through, STYLES[style][kind], 30)
        api = Api(make(style, engine, Gate(), wait=30), Gate(), engine, watch, asyncio.Runner())
        try:
            assert api.post('"warm"', mark="warm").status_code == 201
            between.cut(b"COMMIT", lost)
            assert api.post().status_code == 500
            assert between.cut_done.wait(90)
            second = api.post()
        finally:
            api.close()
    assert second.status_code == 201
    assert replayed(second) == (lost == "reply")
    assert api.marks() == ["warm", "paid"]


@contextmanager
def _process(
    url: URL, driver: str, style: str, directory: Path
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    port = free_port()
    environment = os.environ | {
        "PAYMENTS_URL": url.render_as_string(hide_password=False),
        "DRIVER": driver,
        "STYLE": style,
        "DIRECTORY": str(directory),
    }
    command = [sys.executable, "-m", "uvicorn", "--factory", "tests.http_tools:service", f"--port={port}"]
    root = Path(__file__).parent.parent
    with (directory / "log").open("ab") as log:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, (directory / "log").read_text()
        try:
            return httpx.get(address).status_code == 404
        except httpx.TransportError:
            return False

    try:
        eventually(answers, "uvicorn answers")
        yield address, process
    finally:
        process.kill()
        process.wait()


@pytest.mark.situation(1)
@pytest.mark.situation(3)
@pytest.mark.parametrize("killed", ["in the endpoint", "before the response"])
@on(("sqlite", "fastapi-def"), ("postgres", "fastapi-async"), ("mariadb", "fastapi-def"))
def test_after_a_killed_server_the_retry_has_one_effect(
    database: tuple[URL, Engine], kind: str, style: str, killed: str, tmp_path: Path
) -> None:
    url, watch = database
    api = Api(lambda *_: asyncio.sleep(0), Gate(), watch, watch, asyncio.Runner())
    in_endpoint = killed == "in the endpoint"
    order = {"mark": "paid", "hold": True} if in_endpoint else {"mark": "paid"}
    headers = {"Idempotency-Key": '"k1"'}

    def pay(address: str) -> httpx.Response:
        return httpx.post(f"{address}/payments", json=order, headers=headers, timeout=90)

    with _process(url, STYLES[style][kind], style, tmp_path) as (address, process):
        lost: list[BaseException] = []

        def ask() -> None:
            with pytest.raises(httpx.TransportError) as caught:
                pay(address)
            lost.append(caught.value)

        if not in_endpoint:
            (tmp_path / "die").touch()
        client = threading.Thread(target=ask)
        client.start()
        if in_endpoint:
            eventually((tmp_path / "inside").exists, "the endpoint is at work")
            process.kill()
        process.wait()
        client.join()
        assert lost
    assert api.marks() == ([] if in_endpoint else ["paid"])
    (tmp_path / "die").unlink(missing_ok=True)
    (tmp_path / "go").touch()
    with _process(url, STYLES[style][kind], style, tmp_path) as (address, _):
        answers: list[httpx.Response] = []

        def answered() -> bool:
            answers.append(pay(address))
            return answers[-1].status_code != 409  # the server may still hold the dead one's transaction

        eventually(answered, "the retry is answered")
        answers.append(pay(address))
    assert [each.status_code for each in answers[-2:]] == [201, 201]
    assert replayed(answers[-2]) == (not in_endpoint)
    assert replayed(answers[-1])
    assert (api.marks(), api.claims()) == (["paid"], 1)
    api.runner.close()


PYTHON_KEYS = {
    '"abc"': "abc",
    "abc": "abc",
    ' "a b" ': "a b",
    "8e03978e-40d5-43e8-bc93-6894a57f9324": "8e03978e-40d5-43e8-bc93-6894a57f9324",
    "order_1:retry/2=": "order_1:retry/2=",
}


@pytest.mark.parametrize(("field", "key"), PYTHON_KEYS.items())
def test_a_key_is_read_from_its_field(field: str, key: str) -> None:
    assert key_in([field]) == key
    assert key_in([]) is None


@pytest.mark.parametrize(
    "field", ['"', "a b", "a;b=1", '"a";b=1', "a,b", "", '"\x01"', "\x7f", "a\\", '"a\\']
)
def test_what_is_no_key_is_malformed(field: str) -> None:
    with pytest.raises(Malformed):
        key_in([field])


def test_wrong_settings_are_refused_where_they_are_made() -> None:
    engine = create_engine("sqlite:///never.db")

    async def later(_: Request) -> str:
        return "alice"

    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (engine, {}, "caller="),
        (engine, {"caller": None}, "caller="),
        (engine, {"caller": later}, "plain function"),
        ("sqlite://", {"caller": str}, "no Engine"),
        (create_engine("sqlite://", poolclass=StaticPool), {"caller": str}, "StaticPool"),
        (engine, {"caller": str, "wait": 0}, "wait=0"),
        (engine, {"caller": str, "schema": "a b"}, "identifier"),
        (engine, {"caller": str, "name": ""}, "name"),
    ]
    for target, options, said in wrong:
        with pytest.raises(SetupError, match=said):
            IdempotencyKeys(target, **options)


@dataclass
class Bare:
    """A Starlette application around one endpoint, called with errors raised."""

    keys: IdempotencyKeys[Any]
    edge: bool = True

    def post(self, path: str = "/payments", **headers: str) -> httpx.Response:
        async def endpoint(request: Request) -> Response:
            await self.keys.session(request)
            return Response("done")

        routes = [Mount("/v{version}", routes=[Route("/payments", endpoint, methods=["POST"])])]
        app = Starlette(routes=[*routes, Route("/payments", endpoint, methods=["POST"])])
        if self.edge:
            app.add_middleware(self.keys.middleware)

        async def call() -> httpx.Response:
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(app), base_url="http://shop"
            ) as client:
                return await client.post(path, headers={"Idempotency-Key": "k1", **headers})

        return asyncio.run(call())


@pytest.fixture
def engine(databases: Databases) -> Iterator[Engine]:
    url, watch = databases("sqlite")
    with watch.begin() as connection:
        connection.execute(delete(schema.table("idemq_processed")))
    engine = create_engine(url)
    yield engine
    engine.dispose()


def test_without_the_middleware_nothing_runs(engine: Engine) -> None:
    keys = IdempotencyKeys(engine, caller=lambda _: "alice")
    with pytest.raises(SetupError, match="add_middleware"):
        Bare(keys, edge=False).post()


@pytest.mark.parametrize("caller", [lambda _: None, lambda _: "", lambda _: 7])
def test_a_caller_without_a_name_is_refused(engine: Engine, caller: Any) -> None:
    with pytest.raises(SetupError, match=r"HTTPException\(401\)"):
        Bare(IdempotencyKeys(engine, caller=caller)).post()


def test_a_route_that_is_mounted_twice_is_two_routes_to_keys(engine: Engine) -> None:
    bare = Bare(IdempotencyKeys(engine, caller=lambda _: "alice"))
    for path in ("/payments", "/v1/payments", "/v2/payments"):
        assert not replayed(bare.post(path))
        assert replayed(bare.post(path))


def test_services_with_one_database_tell_their_keys_apart_by_name(engine: Engine) -> None:
    for name in ("http", "ledger"):
        assert not replayed(Bare(IdempotencyKeys(engine, caller=lambda _: "alice", name=name)).post())


def test_callers_and_keys_cannot_be_put_together_so_that_they_meet(engine: Engine) -> None:
    """The key "a" of "b,c" is not the key "a,b" of "c", however they are joined."""
    bare = Bare(IdempotencyKeys(engine, caller=lambda request: request.headers["who"]))
    pairs = [('"a"', 'b", "c'), ('"a\\", \\"b"', "c"), ('"a"', "bc"), ('"ab"', "c"), ('"a"', "x" * 2000)]
    for key, who in pairs:
        assert not replayed(bare.post(**{"Idempotency-Key": key, "who": who}))
        assert replayed(bare.post(**{"Idempotency-Key": key, "who": who}))


def test_the_documentation_of_the_service_is_linked(engine: Engine) -> None:
    keys = IdempotencyKeys(engine, caller=lambda _: "alice", docs="https://shop.example/keys")
    response = Bare(keys).post(**{"Idempotency-Key": "two words"})
    assert response.json()["type"] == "https://shop.example/keys#malformed"
    assert response.headers["link"] == '<https://shop.example/keys>; rel="describedby"'


def test_without_starlette_the_extra_is_named() -> None:
    code = "import sys; sys.modules['starlette'] = None; import idemq.http"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'pip install "idemq[http]"' in found.stderr
