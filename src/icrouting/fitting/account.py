"""Account: what a training took and why it ended, as its checkpoint has it."""

import json
from dataclasses import dataclass
from pathlib import Path

from icrouting.fitting.training import CHECKPOINT_FILE
from icrouting.fitting.validation import Look
from icrouting.runtime.storage import load_metadata


@dataclass(frozen=True)
class Account:
    """What a training took.

    Attributes:
        step: steps that were taken.
        n_steps: steps that were planned.
        n_held: validation rows that the router was judged on.
        kept: how the router that was kept did on them; None where nothing chose one.
        last: how the last router did on them.
        chosen: what cross-validation found at the step where it ended training; None where it was
            not asked.
        n_queries: rows that were learned from.
    """

    step: int
    n_steps: int
    n_held: int
    kept: Look | None
    last: Look | None
    chosen: Look | None = None
    n_queries: int = 0

    @classmethod
    def of(cls, folder: Path) -> "Account | None":
        """Returns the account of the training that a folder keeps; None where it keeps none."""
        metadata = load_metadata(folder / CHECKPOINT_FILE)
        # Checkpoints of earlier versions do not say how much was planned.
        if metadata is None or "n_steps" not in metadata:
            return None
        looks = [Look(**look) for look in json.loads(metadata["looks"])]
        chosen = json.loads(metadata["chosen"])
        kept_step = json.loads(metadata["kept"])
        kept = next((look for look in looks if look.step == kept_step), None)
        return cls(
            step=int(metadata["step"]),
            n_steps=int(metadata["n_steps"]),
            n_held=int(metadata["n_held"]),
            kept=kept,
            last=looks[-1] if looks else None,
            chosen=None if chosen is None else Look(**chosen),
            n_queries=int(metadata["n_queries"]),
        )

    def in_words(self) -> str:
        """Returns the steps, why there are no more, and which router was kept, in a line."""
        if self.chosen is not None:
            return (
                f"trained for {self.step:,} of at most {self.n_steps:,} steps, which did best in "
                f"cross-validation: loss {self.chosen.loss:.3f}, accuracy "
                f"{self.chosen.accuracy:.0%} of {self.chosen.n_rows or self.n_queries} rows"
            )
        if self.step < self.n_steps:
            steps = f"{self.step:,} of at most {self.n_steps:,} steps: the validation loss had "
            steps += "not fallen for a while"
        else:
            steps = f"all {self.n_steps:,} steps"
        look = self.kept or self.last
        if look is None:
            return f"trained for {steps}; too few validation rows to judge it on"
        which = "the last router is kept"
        if self.kept is not None:
            which = f"the router of step {self.kept.step:,} is kept"
        return (
            f"trained for {steps}; {which}, validation loss {look.loss:.3f}, accuracy "
            f"{look.accuracy:.0%} of {self.n_held} rows"
        )
