"""The settings of methods, in one place."""

from dataclasses import dataclass

import tyro
from pydantic import FiniteFloat, PositiveInt

from icrouting.runtime.checks import check
from icrouting.runtime.showing import changed


@dataclass(frozen=True)
class Entrant:
    """A fitted router that a run knows by a name of its own, as a method beside the others.

    Attributes:
        name: What records, tables and pictures call it.
        router: Folder or hub id.
        strength: Factor on its routing vector.

    Raises:
        ValueError: The name cannot stand in a table or in a pair of methods.
    """

    name: str
    router: str
    strength: FiniteFloat = 1.0

    def __post_init__(self):
        check(self)
        # A slash parts the methods of a pair; a dash begins an option.
        if self.name != self.name.strip() or not self.name.isprintable():
            raise ValueError(
                f"a router's name must be printable, without spaces around it, got {self.name!r}"
            )
        if not self.name or "/" in self.name or self.name.startswith("-"):
            raise ValueError(
                f"a router's name must hold no '/' and not begin with '-', got {self.name!r}"
            )

    def identified_by(self, digest: str) -> str:
        """Returns what identifies it in a run: its router's digest, and how that is attached."""
        return digest if self.strength == 1 else f"{digest} at strength {self.strength:g}"


@dataclass(frozen=True)
class Settings:
    """What a run tells its methods.

    Each field is an option of `icr eval` and part of what a run measures.

    Attributes:
        demos_per_class: Demonstrations per class of few-shot prompts.
        demos_per_source: Demonstrations per source task of multi-task prompts.
        router: Folder or hub id of a fitted router, for "icr" and "icr-gated"; its controls are
            fitted as it was.
        i2cl_epochs: Epochs of I2CL's calibration; the published 100 take minutes per task on a
            CPU.
        tries: Settings that every method may try on validation rows, in the order of its own grid.
        train_rows: Training rows per task of methods that train on many (LIVE, M2IV, soft prompts,
            LoRA with more).
        train_epochs: Epochs of those.
        encoder: Sentence encoder of methods that read prompts by one: hub id, folder or
            "pinned:minilm"; by default the router's, and sentence-transformers/all-MiniLM-L6-v2
            without one.
    """

    demos_per_class: PositiveInt = 5
    demos_per_source: PositiveInt = 3
    # On the command line it is an option of its own, which takes several.
    router: tyro.conf.Suppress[tyro.conf.Fixed[str | None]] = None
    i2cl_epochs: PositiveInt = 100
    tries: PositiveInt = 12
    train_rows: PositiveInt = 1000
    train_epochs: PositiveInt = 10
    encoder: str | None = None

    def __post_init__(self):
        check(self)

    def __repr__(self) -> str:
        return changed(self)


# Those of a comparison: one setting of each, since a dozen validation rows choose none and ten
# minutes are short. I2CL's epochs are those of docs/results.md.
COMPARED = Settings(i2cl_epochs=20, tries=1)
