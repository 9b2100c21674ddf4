"""Entrants: routers that a run knows by names of their own, each a method like any other."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from icrouting.methods.base import Context
from icrouting.methods.icr import Icr
from icrouting.methods.settings import Entrant, Settings
from icrouting.routing.reader import Gate, Reader
from icrouting.tasks.task import Task


class NamedIcr(Icr):
    """ICR by a router of its own, under its own name."""

    def __init__(self, settings: Settings, entrant: Entrant):
        super().__init__(replace(settings, router=entrant.router))
        self.name = entrant.name
        self._strength = entrant.strength

    def applied(self, task: Task) -> Context:
        """Routes the model by each prompt."""
        return self._router.attached_by(self._reader(), strength=self._strength)

    def fitted_before(self, sources: Sequence[Task]) -> dict[str, Any]:
        """Returns what the fit of its router took."""
        return {**super().fitted_before(sources), "method": self.name}

    def _reader(self, gate: Gate | None = None) -> Reader:
        if self._checked is None or self._checked[0] is not self.decoder:
            reader = self._router.reader(self.decoder, strength=self._strength, gate=gate)
            self._checked = self.decoder, reader
        return self._checked[1]
