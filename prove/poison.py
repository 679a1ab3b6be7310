"""Messages that end the process that works on them, among good ones; nothing else is killed."""

from __future__ import annotations

from typing import Any

from prove.stage import Stage


class Poison(Stage):
    """Under `idemq run`, which starts again what dies."""

    def play(self) -> dict[str, Any]:
        with self.publisher() as publish:
            publish(self.plan.messages)
            self.staff()
        self.settle_down()
        log = (self.directory / "workers.log").read_text(errors="replace")
        return {"deaths": log.count("a worker process ended"), "alone": log.count("that ran suspects ended")}
