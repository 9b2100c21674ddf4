"""In-Context Routing as one method among others."""

from icrouting.config import Settings
from icrouting.icr import InContextRouter
from icrouting.methods.base import Context, Method
from icrouting.tasks import Task


class Icr(Method):
    """The bare prompt on the routed model; its router was fitted before, on the source tasks."""

    name = "icr"
    draws = False

    def __init__(self, settings: Settings):
        super().__init__(settings)
        if settings.router is None:
            raise ValueError("the method 'icr' needs --router, a folder or hub id: fit one with `icr fit`")
        self._router = InContextRouter.from_pretrained(settings.router)

    def applied(self, task: Task) -> Context:
        """Routes the model by each prompt."""
        return self._router.attached(self.model, self.tokenizer)

    def n_cached(self, task: Task) -> int:
        """Returns the size of the PIDs; the paper counts neither router nor sentence encoder."""
        return self._router.pids.query_pids.numel() + self._router.pids.key_pids.numel()
