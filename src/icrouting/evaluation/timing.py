"""Timing: what methods take beside the untouched model, measured in turns."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from icrouting.decoder.decoder import Decoder
from icrouting.decoder.passes import KeptContext
from icrouting.decoder.scoring import score
from icrouting.evaluation.items import draw_items
from icrouting.evaluation.records import BASELINE
from icrouting.methods import Method
from icrouting.methods.settings import Settings
from icrouting.runtime.progress import track
from icrouting.tasks.prompts import Prompt
from icrouting.tasks.task import Task


@dataclass(frozen=True)
class _Way:
    """One way to run a method: prompts read from the first token on, or behind a kept context."""

    name: str
    method: Method
    prompts: Sequence[str | Prompt]
    kept: dict[str, KeptContext] | None

    def n_cached(self, task: Task) -> int:
        """The numbers that lie beside the model between two prompts."""
        kept_contexts = self.kept or {}
        n_context = sum(context.n_numbers for context in kept_contexts.values())
        return self.method.n_cached(task) + n_context


def time_ratios(
    decoder: Decoder,
    methods: Sequence[Method],
    task: Task,
    *,
    n_items: int = 4,
    n_rounds: int = 5,
) -> list[dict[str, object]]:
    """Returns each method's time over zero-shot's, measured in turns on the same items.

    Prompts run as they would arrive at a server, alone in their context. Where a method's prompts
    have a context in common, it is timed once more with that context kept from before. The methods
    are fitted.
    """
    examples = [task.test[index] for index in draw_items(task, n_items)]
    options = [task.options(example) for example in examples]
    timed_methods = [_untouched(methods[0].settings)]
    for method in methods:
        if method.name != BASELINE:
            timed_methods.append(method.on(task))
    # The baseline comes first, and has one way: it has no context to keep.
    ways = []
    for method in timed_methods:
        ways += _ways(method, [method.prompt(task, example) for example in examples])

    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    n_turns = n_rounds + 1  # the first warms up and reads the contexts that are kept
    for _ in track(range(n_turns), "timing, in turns", [1] * n_turns, "turns"):
        for way in ways:
            with way.method.applied(task):
                started = time.monotonic()
                scores = score(
                    decoder,
                    way.prompts,
                    options,
                    label_scoring=task.spec.label_scoring,
                    kept=way.kept,
                    finite_only=False,
                )
                way.method.adjusted(task, examples, scores)
                seconds[way.name].append(time.monotonic() - started)

    note = f"median of {n_rounds} turns on {len(examples)} prompts of {task.name}"
    # Ratios within a turn: what slows the machine for a while slows both sides of them.
    baseline_seconds = np.array(seconds[BASELINE][1:])
    rows: list[dict[str, object]] = []
    for way in ways[1:]:
        ratios = np.array(seconds[way.name][1:]) / baseline_seconds
        low, middle, high = np.percentile(ratios, [0, 50, 100]).tolist()
        row = {"method": way.name, "ratio": middle, "low": low, "high": high}
        rows.append({**row, "n_cached": way.n_cached(task), "note": note})
    return rows


def _untouched(settings: Settings) -> Method:
    """The baseline, also where a run does without it."""
    baseline = Method(settings)
    baseline.name = BASELINE
    return baseline


def _ways(method: Method, prompts: Sequence[Prompt]) -> list[_Way]:
    # Without a context, prompts that have a context in common do not share the reading of it.
    alone = [Prompt("", prompt.text, prompt.joint) for prompt in prompts]
    ways = [_Way(method.name, method, alone, None)]
    if prompts[0].context:
        ways.append(_Way(f"{method.name}, context kept", method, prompts, {}))
    return ways
