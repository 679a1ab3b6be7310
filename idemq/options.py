"""The options of a consumer: each is checked when it is declared, and named when it is wrong."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Sequence
from typing import Any

from idemq.errors import SetupError

#: Whole numbers and seconds, with their smallest and largest value.
_WHOLE = {
    "concurrency": (1, 10_000),
    "prefetch": (1, 1000),
    "max_crashes": (1, 1_000_000),
    "max_kept": (1024, 2**30),
}
_SECONDS = {"wait": (0.001, 3600.0), "deadline": (0.01, 7 * 86_400.0)}


def check(name: str, unknown: Collection[str], given: dict[str, Any]) -> None:
    """Raise `SetupError` naming consumer, option and remedy; None for a number means the default."""
    _check_name(name)
    for option in unknown:
        close = difflib.get_close_matches(option, given, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(given)}"
        raise SetupError(f"consumer {name!r}: unknown option {option!r}; {hint}")
    for option, (least, most) in _WHOLE.items():
        value = given.get(option)
        if value is not None and type(value) is not int:
            raise SetupError(f"consumer {name!r}: {option}={value!r} must be a whole number")
        if value is not None and not least <= value <= most:
            raise SetupError(f"consumer {name!r}: {option}={value} must be from {least} to {most}")
    for option, (shortest, longest) in _SECONDS.items():
        value = given.get(option)
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not shortest <= value <= longest:
            raise SetupError(
                f"consumer {name!r}: {option}={value!r} must be from {shortest} to {longest} seconds"
            )
    if given.get("undated", "run") not in ("run", "park"):
        raise SetupError(f"consumer {name!r}: undated={given['undated']!r} must be 'run' or 'park'")
    _check_rule(name, given.get("id"))
    for option in ("id", "fingerprint", "key"):
        if inspect.iscoroutinefunction(given.get(option)):
            raise SetupError(f"consumer {name!r}: {option}= takes plain functions, not async ones")
    for option in ("strict", "ordered", "hold_dead", "answer"):
        if not isinstance(given.get(option), bool | None):
            raise SetupError(f"consumer {name!r}: {option}={given[option]!r} must be True or False")
    for option in ("key", "hold_dead"):
        if given.get(option) and not given.get("ordered"):
            raise SetupError(f"consumer {name!r}: {option}= says something about order: add ordered=True")


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name or len(name.encode("utf-8", "replace")) > 200:
        raise SetupError(f"consumer {name!r}: a name is a text of 1 to 200 bytes")


def _check_rule(name: str, rule: object) -> None:
    if rule is None or callable(rule):
        return
    names = (rule,) if isinstance(rule, str) else rule
    if not isinstance(names, Sequence) or not names or not all(isinstance(n, str) and n for n in names):
        raise SetupError(f"consumer {name!r}: id={rule!r} names no header")
