"""The settings of methods, in one place."""

from dataclasses import dataclass

from pydantic import PositiveInt

from icrouting.runtime.checks import check
from icrouting.runtime.showing import changed


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
    router: str | None = None
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
