"""What `icr fit --from` goes on from, and the rows that it asks for beside the new ones."""

from collections.abc import Sequence
from dataclasses import dataclass

from icrouting.cli.loading import base_of_router, load_tasks
from icrouting.config import FitConfig
from icrouting.decoder.backbone import Backbone
from icrouting.fitting.warm import Start
from icrouting.icr import InContextRouter
from icrouting.tasks.task import Task, rows_digest


@dataclass(frozen=True)
class Beginning:
    """What a fit begins with: nothing, or a router that it goes on from.

    Attributes:
        router: folder or hub id of the router; None where there is none.
        icr: the router.
        start: what the fit takes of it.
    """

    router: str | None = None
    icr: InContextRouter | None = None
    start: Start | None = None

    @classmethod
    def of(cls, router: str | None, keep: int) -> "Beginning":
        """Returns the beginning that `--from` and `--keep` name."""
        if router is None:
            return cls()
        icr = InContextRouter.from_pretrained(router)
        return cls(router, icr, icr.as_start(keep))

    @property
    def keep(self) -> int:
        """Rows of each known task that are trained on again."""
        return 0 if self.start is None else self.start.keep

    def model(self, model: Backbone) -> Backbone:
        """Returns the model that was asked for, or else the router's."""
        return model if self.icr is None else base_of_router(model, self.icr)

    def settings(self, config: FitConfig) -> FitConfig:
        """Returns a fit's settings, with what the router decides."""
        return config if self.start is None else self.start.settings(config)

    def with_known(self, tasks: Sequence[Task], data: str) -> list[Task]:
        """Returns the tasks of a fit, with those that are to be rehearsed.

        Raises:
            ValueError: the rows of a task that is to be rehearsed are not there.
        """
        tasks = list(tasks)
        if not self.keep or self.icr is None:
            return tasks
        loaded = {task.name for task in tasks}
        chats = {source.name for source in self.icr.description.sources or () if source.chat}
        for name in self.icr.description.tasks:
            if name in loaded:
                continue
            try:
                tasks += load_tasks([name], data, chat=name in chats)
            except ValueError as error:
                raise ValueError(
                    f"--keep needs the rows of {name!r}, which {self.router} was fitted on: "
                    f"{error}. Put them into --data, name its task file among --tasks, or leave "
                    "--keep out"
                ) from error
        return tasks

    def trained_tasks(self, tasks: Sequence[Task], seed: int) -> list[Task]:
        """Returns the tasks as they are trained on: known ones cut to what is kept of them."""
        return list(tasks) if self.start is None else self.start.trained_tasks(tasks, seed)

    def is_of(self, icr: InContextRouter, trained: Sequence[Task]) -> bool:
        """Whether a finished router came of this beginning, and of these tasks."""
        origin = icr.description.origin
        if self.start is None:
            return origin is None and icr.description.rows == rows_digest(trained)
        if origin is None or origin.weights != self.start.digest:
            return False
        return icr.description.rows == self.start.rows_digest(trained)

    def words(self, trained: Sequence[Task]) -> list[str]:
        """Returns a line on what is taken of the router, none where there is no router."""
        if self.icr is None:
            return []
        known = self.icr.description.tasks
        new = [task.name for task in trained if task.name not in known]
        again = [
            f"{len(task.train):,} rows of {task.name}" for task in trained if task.name in known
        ]
        layers = self.icr.pids.layers
        return [
            f"goes on from {self.router}: its PIDs are kept (layers {layers[0]} to {layers[-1]}, "
            f"rank {self.icr.pids.rank}), nothing is extracted; "
            f"new: {', '.join(new) or 'no task'}; trained on again: {', '.join(again) or 'nothing'}"
        ]
