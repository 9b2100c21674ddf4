"""Ratios of calls that take turns, kept row by row in a JSON file, and the picture of them."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from icrouting.evaluation.runs import commit
from icrouting.runtime.storage import load_json, save_json

Calls = Mapping[str, Callable[[], object]]
# Seconds. A shorter call is repeated within a turn, until it takes as long.
SHORTEST = 0.2
# Seconds. Calls that are longer are kept from the first round on.
LONG = 2.0


@dataclass(frozen=True)
class Stopwatch:
    """How turns are timed.

    `clock` is "wall", or "cpu" for the processor time of this process, which other work on the
    machine does not lengthen; `turns` and `seconds` bound a row: as many turns as fit into the
    seconds, three at least.
    """

    clock: str
    turns: int
    seconds: float

    def now(self) -> float:
        # An accelerator works on after a call has returned.
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.process_time() if self.clock == "cpu" else time.perf_counter()

    def timed(self, call: Callable[[], object], n_calls: int) -> float:
        started = self.now()
        for _ in range(n_calls):
            call()
        return (self.now() - started) / n_calls

    def in_turns(self, calls: Calls) -> dict[str, list[float]]:
        """Seconds of each call in each turn; every other turn goes backwards.

        The first round warms up and is not kept, unless calls are so long that warmth does not
        matter.
        """
        first = {name: self.timed(call, 1) for name, call in calls.items()}
        n_calls = {}
        for name, seconds in first.items():
            n_calls[name] = max(1, math.ceil(SHORTEST / max(seconds, 1e-6)))
        seconds_of_turn = sum(max(seconds, SHORTEST) for seconds in first.values())
        n_turns = min(self.turns, max(3, int(self.seconds / seconds_of_turn)))
        is_first_kept = min(first.values()) > LONG
        seconds_by_name: dict[str, list[float]] = {}
        for name, seconds in first.items():
            seconds_by_name[name] = [seconds] if is_first_kept else []
        for turn in range(int(is_first_kept), n_turns):
            names = reversed(list(calls)) if turn % 2 else calls
            for name in names:
                seconds_by_name[name].append(self.timed(calls[name], n_calls[name]))
        return seconds_by_name


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"


class Rows:
    """The rows of one model, written as soon as measured; a row that is there is not done again."""

    def __init__(self, file: Path, stopwatch: Stopwatch, about: dict[str, Any]):
        self.file = file
        self.stopwatch = stopwatch
        self.content = load_json(file) if file.exists() else {**about, "rows": {}}
        different = [key for key in about if self.content[key] != about[key]]
        if different:
            raise SystemExit(
                f"{file} was measured with another {', '.join(different)}: choose another --out"
            )
        file.parent.mkdir(parents=True, exist_ok=True)

    def measure(
        self, part: str, where: str, calls: Calls, more: Callable[[], dict[str, Any]] = dict
    ) -> None:
        """Adds a row for every call but the first, which the others are divided by.

        What `more` returns, after the turns, joins every row.
        """
        base, *others = calls
        names = {other: f"{part}: {other} / {base}, {where}" for other in others}
        if all(name in self.content["rows"] for name in names.values()):
            return
        seconds = self.stopwatch.in_turns(calls)
        added = more()
        for other, name in names.items():
            ratios = []
            for numerator, denominator in zip(seconds[other], seconds[base], strict=True):
                ratios.append(numerator / denominator)
            low, _, high = quantiles(ratios, n=4, method="inclusive")
            row = {
                "part": part,
                "ratio": four_digits(median(ratios)),
                "low": four_digits(low),
                "high": four_digits(high),
                "turns": len(ratios),
                "seconds": four_digits(median(seconds[other])),
                "base_seconds": four_digits(median(seconds[base])),
                "clock": self.stopwatch.clock,
                "device": device_name(),
                "commit": commit(),
            }
            self.content["rows"][name] = {**row, **added}
            scatter = f"({row['low']:.4g} to {row['high']:.4g}, {row['turns']} turns)"
            print(f"{name}  {row['ratio']:.4g}  {scatter}  {added}", flush=True)
        save_json(self.file, self.content)


def four_digits(number: float) -> float:
    return float(f"{number:.4g}")


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that a call's tensors take at a time, on top of what is there before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        call()
    now = peak = 0
    results = profiler.profiler and profiler.profiler.kineto_results
    assert results is not None, "the profiler has run"
    for event in results.events():
        if event.name() == "[memory]":
            now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            peak = max(peak, now)
    return peak


def draw(content: dict[str, Any], file: Path) -> None:
    """Every row as a dot, its middle half of turns as a bar; 1 is the line to compare with."""
    rows_by_part: dict[str, dict[str, dict[str, Any]]] = {}
    for name, row in content["rows"].items():
        rows_by_part.setdefault(row["part"], {})[name] = row
    height = 0.5 + 0.19 * len(content["rows"]) + 0.55 * len(rows_by_part)
    heights = [len(rows) + 1 for rows in rows_by_part.values()]
    with style.context("icrouting.report.report"):
        figure = Figure(figsize=(9.0, height))
        panels = figure.subplots(len(rows_by_part), squeeze=False, height_ratios=heights)[:, 0]
        for panel, (part, rows) in zip(panels, rows_by_part.items(), strict=True):
            draw_part(panel, part, rows)
        title = "ratios, median and middle half of the turns"
        figure.suptitle(f"{content['model']}, {content['dtype']}: {title}")
        figure.savefig(file, metadata={"Date": None})


def draw_part(panel, part: str, rows: dict[str, dict[str, Any]]) -> None:
    """One panel: the rows of a part, by name."""
    for place, row in enumerate(rows.values()):
        ends = [row["low"], row["high"]]
        panel.plot(ends, [place] * 2, color="#0072B2", linewidth=3, alpha=0.4)
        panel.plot(row["ratio"], place, "o", color="#0072B2", ms=4)
        panel.annotate(f" {row['ratio']:.3g}", (row["high"], place), va="center", fontsize=7)
    panel.axvline(1, color="black", linewidth=0.8, zorder=0)
    panel.set(title=part, xscale="log", ylim=(len(rows) - 0.3, -0.7))
    labels = [name.partition(": ")[2] for name in rows]
    panel.set_yticks(range(len(rows)), labels, fontsize=7)
    lowest = min(row["low"] for row in rows.values())
    highest = max(row["high"] for row in rows.values())
    figures = FuncFormatter(lambda ratio, _: f"{ratio:.3g}")
    panel.xaxis.set_major_formatter(figures)
    # Over more than a decade the minor ticks' figures would overlap.
    is_wide = highest > 10 * lowest
    panel.xaxis.set_minor_formatter(NullFormatter() if is_wide else figures)
    panel.tick_params(axis="x", which="both", labelsize=7)
    panel.margins(x=0.12)
