"""Triggers: what Airflow's triggerer waits for on a sensor's behalf."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from radloop.errors import RadloopError
from radloop_airflow.core import Core, answer


class RadloopDueTrigger(BaseTrigger):
    """Fires when `radloop engine due PIPELINE` says so.

    Args:
        project, core: see `Core`.
        pipeline: the pipeline asked about.
        poke_s: seconds between two questions; each starts a Python.
    """

    def __init__(self, *, project: str, core: str, pipeline: str, poke_s: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.project, self.core, self.pipeline, self.poke_s = project, core, pipeline, poke_s

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """How the triggerer makes it again."""
        given = {"project": self.project, "core": self.core, "pipeline": self.pipeline, "poke_s": self.poke_s}
        return f"{type(self).__module__}.{type(self).__qualname__}", given

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Ask until it is due; an event with `why`, or with `error` where the question itself failed."""
        said = ""
        while True:
            await asyncio.sleep(self.poke_s)  # the sensor has just asked
            try:
                told = await self._ask()
            except RadloopError as error:
                yield _event(error=str(error))
                return
            if told["due"]:
                yield _event(why=told["why"])
                return
            if told["why"] != said:
                said = told["why"]
                self.log.info("%s is not due: %s", self.pipeline, said)

    async def _ask(self) -> dict[str, Any]:
        arguments = ("engine", "due", self.pipeline)
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *Core(self.project, self.core).command(*arguments), stdout=pipe, stderr=pipe
        )
        try:
            stdout, stderr = await process.communicate()
        finally:
            if process.returncode is None:  # the trigger was cancelled
                process.kill()
        return answer(arguments, process.returncode or 0, stdout, stderr)


def _event(**payload: str) -> TriggerEvent:
    return TriggerEvent(payload)  # type: ignore[no-untyped-call]
