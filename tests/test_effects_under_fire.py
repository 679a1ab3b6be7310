"""Effects under fire: a gateway with faults, and a worker that dies at every step of the relay."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rich.console import Console
from sqlalchemy import URL, make_url

from prove.cases import AGAIN, FIRST, LOOK_UP, PROVIDERS, TELLING, Case, every, sample
from prove.controls import EFFECT_CONTROLS
from prove.fire import Fire, table
from prove.gateway import FAULTS

#: Both together: each step, fault and provider is among them.
CASES = 40


@pytest.mark.hazard("H47")
@pytest.mark.hazard("H52")
@pytest.mark.situation(5)
@pytest.mark.parametrize("database_url", ["sqlite", "postgres"], indirect=True)
def test_one_text_each_or_none_and_a_person_is_asked(database_url: URL, tmp_path: Path) -> None:
    cases = every() if os.environ.get("LONG") == "1" else sample(CASES, seed=1)
    fire = Fire(cases, database_url, tmp_path)
    outcomes = fire.run()
    kills = f"{len(outcomes)} payments, {fire.kills} kills"
    Console(width=120).print(table(outcomes, f"Effects under fire: {kills}"))
    assert [outcome for outcome in outcomes if not outcome.right] == []


@pytest.mark.hazard("H47")
@pytest.mark.parametrize("control", EFFECT_CONTROLS)
def test_a_relay_that_sends_again_what_is_in_doubt_is_noticed(control: str, tmp_path: Path) -> None:
    fire = Fire(TELLING, make_url(f"sqlite:///{tmp_path / 'shop.db'}"), tmp_path, control)
    assert [outcome.texts for outcome in fire.run() if not outcome.right] == [2]


@pytest.mark.hazard("H52")
@pytest.mark.parametrize(
    ("provider", "step"), [("key", "connected"), ("look-up", "picked"), ("none", "connected")]
)
def test_a_worker_that_freezes_for_longer_than_its_lease_sends_no_second_text(
    provider: str, step: str, postgres_url: URL, tmp_path: Path
) -> None:
    """Also with a look-up, if it froze before the call: another worker has asked and sent meanwhile."""
    fire = Fire([Case(provider, "no fault", ())], postgres_url, tmp_path)
    (outcome,) = fire.freeze(step)
    assert (outcome.texts, outcome.in_doubt, outcome.stuck) == (1, False, False)


def test_the_sample_has_every_step_fault_and_provider() -> None:
    chosen = sample(CASES, seed=1)
    assert len(chosen) == CASES
    assert {case.fault for case in chosen} == set(FAULTS)
    assert {step for case in every() for step in case.steps} >= {*FIRST, *AGAIN, *LOOK_UP}
    for provider in PROVIDERS:
        assert {step for case in chosen if case.provider == provider for step in case.steps} == {
            step for case in every() if case.provider == provider for step in case.steps
        }
