"""Budget: what a method is expected to take, held against the minutes that are left.

The unit is the reading of one zero-shot prompt. A method's work in it is reckoned from the numbers
of rows and its settings; a backward pass counts as two. What a unit takes is what those so far
took, the first being zero-shot itself. This is rough: a factor of two either way is no surprise.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from icrouting.comparing.ladder import FEW_SHOT, ICR
from icrouting.evaluation.records import BASELINE
from icrouting.methods.batch_calibration import N_PROMPTS
from icrouting.methods.named_prompts import PREFIX
from icrouting.methods.settings import Settings
from icrouting.runtime.storage import load_json, save_json
from icrouting.tasks.prompts import balanced_demos
from icrouting.tasks.task import Task

# Prompts that the timing in turns runs of every method, at the end.
TIMED = 24
# A pass forwards and one backwards.
STEP = 3
# A sentence encoder beside a decoder.
ENCODER = 0.2


@dataclass(frozen=True)
class Sizes:
    """The numbers that the work of methods is reckoned from.

    Attributes:
        n_train: rows to train on.
        n_validation: rows to choose on.
        n_test: rows to answer.
        n_demos: demonstrations of a few-shot prompt.
        router: work of the router's fit.
    """

    n_train: int
    n_validation: int
    n_test: int
    n_demos: int
    router: float


def sizes_of(task: Task, settings: Settings, router: float) -> Sizes:
    """Returns the sizes of a task; `router` is the work of the router's fit on it."""
    n_test = len(task.test)
    n_train = len(task.train)
    return Sizes(n_train, len(task.validation), n_test, n_demos(task, settings), router)


def n_demos(task: Task, settings: Settings) -> int:
    """Returns how many demonstrations a few-shot prompt of a task has."""
    return len(balanced_demos(task, settings.demos_per_class, np.random.default_rng(0)))


def work_of(method: str, sizes: Sizes, settings: Settings) -> float:
    """Returns the work of fitting a method and answering by it, in readings of a prompt."""
    n_rows = min(sizes.n_train, settings.train_rows)
    n_validation = sizes.n_validation
    # Each setting is trained, and scored on the validation rows.
    n_trials = settings.tries
    context = sizes.n_demos
    fit_work = {
        BASELINE: 0,
        "calibration": STEP,
        "batch-calibration": min(sizes.n_train, N_PROMPTS),
        # The demonstrations are read once.
        FEW_SHOT: context,
        "probe-encoder": ENCODER * (n_rows + n_validation),
        "probe-hidden": n_rows + n_validation,
        # Rows and the prior's prompts are read for their scores, and again for their states.
        "probe-residual": 2 * (n_rows + n_validation + min(sizes.n_train, N_PROMPTS)),
        "task-vectors": 2 * context + STEP * n_validation,
        "i2cl": n_trials * (settings.i2cl_epochs * context * STEP + n_validation),
        ICR: sizes.router,
        "prefix-tuning": n_trials * (settings.train_epochs * n_rows * STEP + n_validation),
        # One block alone runs in its steps.
        "lora-block-more": n_trials * settings.train_epochs * (n_rows + n_validation),
    }
    # A prompt of the user's own is taken to be as long as a few-shot one, and of a method that is
    # not known here, as much as of one that trains on all rows.
    unknown = context if _has_context(method) else settings.train_epochs * n_rows * STEP
    return sizes.n_test + fit_work.get(method, unknown)


def timing_of(method: str, sizes: Sizes) -> float:
    """Returns the work of timing a method in turns, at the end."""
    # Few-shot prompts are timed whole, too.
    n_read = 1 + sizes.n_demos if _has_context(method) else 1
    return TIMED * n_read


def _has_context(method: str) -> bool:
    return method == FEW_SHOT or method.startswith(PREFIX)


class Budget:
    """The minutes of one command, and what every method took so far, kept in a file.

    `clock` gives seconds. What earlier commands took says how fast the machine is, and counts for
    nothing else: every command has its minutes.
    """

    def __init__(self, minutes: float, file: Path, clock: Callable[[], float] = time.monotonic):
        self.seconds = 60 * minutes
        self.file = file
        self._clock = clock
        self._started = clock()
        # By method: seconds, and the work that they went to.
        self.spent: dict[str, dict[str, float]] = load_json(file) if file.exists() else {}

    @property
    def elapsed(self) -> float:
        """Seconds since the command began."""
        return self._clock() - self._started

    def expected(self, work: float) -> float | None:
        """Returns the seconds that work is expected to take; None where nothing was timed yet."""
        whole = [entry for entry in self.spent.values() if entry.get("work")]
        if not whole:
            return None
        seconds_so_far = sum(entry["seconds"] for entry in whole)
        return work * seconds_so_far / sum(entry["work"] for entry in whole)

    def has_room(self, work: float) -> bool:
        """Returns whether work is expected to end in time; what nothing is known of is begun."""
        expected_seconds = self.expected(work) or 0.0
        return self.elapsed + expected_seconds <= self.seconds

    def note(self, method: str, seconds: float, **entries: float) -> None:
        """Adds to what a method took; `entries` are kept beside, the last of each name."""
        before = self.spent.get(method, {})
        total = before.get("seconds", 0.0) + seconds
        self.spent[method] = {**before, **entries, "seconds": total}
        save_json(self.file, self.spent)
