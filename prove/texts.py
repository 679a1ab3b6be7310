"""The shop whose texts are under fire: a payment settles, and its text is planned as an effect.

It is started as `idemq run prove.texts:app --child` many times, with PROVE_DIRECTORY and PROVE_DATABASE.
"""

from __future__ import annotations

import http.client
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.orm import Session
from tenacity import Retrying, stop_after_attempt, wait_fixed

from idemq import App, Effects, NotSent
from idemq.embedded import Embedded
from prove import controls
from prove.cases import Case
from prove.steps import Steps, shorten_leases

DIRECTORY = Path(os.environ["PROVE_DIRECTORY"])
QUEUE = "payments.settled"

shorten_leases()
broker = Embedded(DIRECTORY / "broker.db")
app = App(os.environ["PROVE_DATABASE"])
serving, resetting, closed = map(int, (DIRECTORY / "ports").read_text().split())
cases = [Case.of(line) for line in (DIRECTORY / "cases").read_text().splitlines()]


def planned() -> bool:
    """Every payment is consumed, its copy too: only the relay has anything to do."""
    assert app.engine is not None
    with app.engine.connect() as connection:
        done = connection.execute(text("SELECT count(*) FROM receipts")).scalar_one()
    return done == len(cases) and broker.depth(QUEUE) == (0, 0)


steps = Steps(cases, DIRECTORY / "kills.log", planned, os.environ.get("PROVE_FREEZE", ""))


@dataclass
class Settled:
    payment: str


def call(payload: Settled, key: str) -> None:
    case = Case.of(payload.payment)
    port = {"reset": resetting, "closed": closed}.get(case.fault, serving)
    elsewhere = port != serving and _first(payload.payment)
    gateway = http.client.HTTPConnection(
        "127.0.0.1", port if elsewhere else serving, timeout=0.3 if case.fault == "hang" else 60.0
    )
    try:
        gateway.connect()
    except ConnectionRefusedError as error:
        raise NotSent("nobody is there") from error
    try:
        steps.at("connected")
        before = _mentions(payload.payment)
        gateway.request("POST", f"/{case.provider}", b"", _headers(payload, key, case.fault))
        while not elsewhere and _mentions(payload.payment) == before:
            time.sleep(0.02)
        steps.at("accepted")
        answer = gateway.getresponse()
        if answer.status != 202:
            raise RuntimeError(f"HTTP {answer.status}")
    finally:
        gateway.close()


def look_up(payload: Settled, key: str) -> bool:
    gateway = http.client.HTTPConnection("127.0.0.1", serving, timeout=60.0)
    try:
        gateway.request("GET", "/look-up", headers=_headers(payload, key))
        return bool(json.loads(gateway.getresponse().read()))
    finally:
        gateway.close()


def _headers(payload: Settled, key: str, fault: str = "") -> dict[str, str]:
    return {"Idempotency-Key": key, "X-Payment": payload.payment, "X-Fault": fault}


def _first(payment: str) -> bool:
    """Whether no process has called for this payment before."""
    try:
        (DIRECTORY / f"called {payment.replace('/', ' ')}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _mentions(payment: str) -> int:
    return f"\n{(DIRECTORY / 'gateway.log').read_text()}".count(f" {payment}\n")


RETRY = Retrying(wait=wait_fixed(0.1), stop=stop_after_attempt(1000))


@app.effect("key", repeat="provider-key", key_lifetime=3600.0, retry=RETRY, concurrency=1000)
def text_by_key(payload: Settled, key: str) -> None:
    call(payload, key)


@app.effect("look-up", repeat=look_up, settle=1.0, retry=RETRY, concurrency=1000)
def text_by_look_up(payload: Settled, key: str) -> None:
    call(payload, key)


@app.effect("none", retry=RETRY, concurrency=1000)
def text_by_nothing(payload: Settled, key: str) -> None:
    call(payload, key)


EFFECTS = {"key": text_by_key, "look-up": text_by_look_up, "none": text_by_nothing}


@app.consumer("receipts", broker.queue(QUEUE))
def receipt(payload: Settled, session: Session, effects: Effects) -> None:
    session.execute(text("INSERT INTO receipts (payment) VALUES (:payment)"), vars(payload))
    effects.plan(EFFECTS[Case.of(payload.payment).provider], payload)


controls.apply(os.environ.get("PROVE_CONTROL", ""))
steps.install()
