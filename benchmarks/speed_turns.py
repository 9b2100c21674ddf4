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
SHORTEST, LONG = 0.2, 2.0  # seconds; shorter calls than the one are repeated within a turn


@dataclass(frozen=True)
class Stopwatch:
    """How turns are timed.

    `clock` is "wall", or "cpu" for the processor time of this process, which other work on the machine does not
    lengthen; `turns` and `seconds` bound a row: as many turns as fit into the seconds, three at least.
    """

    clock: str
    turns: int
    seconds: float

    def now(self) -> float:
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

        The first round warms up and is not kept, unless calls are so long that warmth does not matter.
        """
        first = {name: self.timed(call, 1) for name, call in calls.items()}
        n_calls = {
            name: max(1, math.ceil(SHORTEST / max(seconds, 1e-6)))
            for name, seconds in first.items()
        }
        n_turns = int(self.seconds / sum(max(seconds, SHORTEST) for seconds in first.values()))
        found = {
            name: [seconds] if min(first.values()) > LONG else [] for name, seconds in first.items()
        }
        for turn in range(len(found[next(iter(calls))]), min(self.turns, max(3, n_turns))):
            for name in list(calls)[:: -1 if turn % 2 else 1]:
                found[name].append(self.timed(calls[name], n_calls[name]))
        return found


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"


class Rows:
    """The rows of one model, written as soon as they are measured; a row that is there is not measured again."""

    def __init__(self, file: Path, stopwatch: Stopwatch, about: dict[str, Any]):
        self.file, self.stopwatch = file, stopwatch
        self.content = load_json(file) if file.exists() else {**about, "rows": {}}
        if different := [key for key in about if self.content[key] != about[key]]:
            raise SystemExit(
                f"{file} was measured with another {', '.join(different)}: choose another --out"
            )
        file.parent.mkdir(parents=True, exist_ok=True)

    def measure(
        self, part: str, where: str, calls: Calls, more: Callable[[], dict[str, Any]] = dict
    ) -> None:
        """Adds one row for every call but the first, which is what the others are divided by; `more` joins each."""
        base, *others = calls
        names = {other: f"{part}: {other} / {base}, {where}" for other in others}
        if all(name in self.content["rows"] for name in names.values()):
            return
        seconds = self.stopwatch.in_turns(calls)
        added = more()
        for other, name in names.items():
            ratios = [own / of for own, of in zip(seconds[other], seconds[base], strict=True)]
            low, _, high = quantiles(ratios, n=4, method="inclusive")
            row = {
                "part": part,
                "ratio": median(ratios),
                "low": low,
                "high": high,
                "turns": len(ratios),
            }
            row |= {"seconds": median(seconds[other]), "base_seconds": median(seconds[base])}
            row = {
                key: float(f"{value:.4g}") if isinstance(value, float) else value
                for key, value in row.items()
            }
            about = {"clock": self.stopwatch.clock, "device": device_name(), "commit": commit()}
            self.content["rows"][name] = {**row, **about, **added}
            print(
                f"{name}  {row['ratio']:.4g}  ({low:.4g} to {high:.4g}, {row['turns']} turns)  {added}",
                flush=True,
            )
        save_json(self.file, self.content)


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
    """Every row as a dot, its middle half of turns as a bar; 1 is the line to be near or far from."""
    rows = content["rows"]
    parts = list(dict.fromkeys(row["part"] for row in rows.values()))
    chosen = [[(name, row) for name, row in rows.items() if row["part"] == part] for part in parts]
    with style.context("icrouting.report.report"):
        figure = Figure(figsize=(9.0, 0.5 + 0.19 * len(rows) + 0.55 * len(parts)))
        panels = figure.subplots(
            len(parts), squeeze=False, height_ratios=[len(part) + 1 for part in chosen]
        )[:, 0]
        for part, panel, named in zip(parts, panels, chosen, strict=True):
            for place, (_, row) in enumerate(named):
                panel.plot(
                    [row["low"], row["high"]], [place] * 2, color="#0072B2", linewidth=3, alpha=0.4
                )
                panel.plot(row["ratio"], place, "o", color="#0072B2", ms=4)
                panel.annotate(
                    f" {row['ratio']:.3g}", (row["high"], place), va="center", fontsize=7
                )
            panel.axvline(1, color="black", linewidth=0.8, zorder=0)
            panel.set(title=part, xscale="log", ylim=(len(named) - 0.3, -0.7))
            panel.set_yticks(
                range(len(named)), [name.partition(": ")[2] for name, _ in named], fontsize=7
            )
            figures = FuncFormatter(lambda ratio, _: f"{ratio:.3g}")
            is_wide = max(row["high"] for _, row in named) > 10 * min(
                row["low"] for _, row in named
            )
            panel.xaxis.set_major_formatter(figures)
            panel.xaxis.set_minor_formatter(NullFormatter() if is_wide else figures)
            panel.tick_params(axis="x", which="both", labelsize=7)
            panel.margins(x=0.12)
        figure.suptitle(
            f"{content['model']}, {content['dtype']}: ratios, median and middle half of the turns"
        )
        figure.savefig(file, metadata={"Date": None})
