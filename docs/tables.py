"""Writes the tables of the README and of who-wins.md from the records under benchmarks/results.

python docs/tables.py
"""

import re
from pathlib import Path

import pandas as pd

from icrouting.runtime.pages import MINUS
from icrouting.runtime.storage import load_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MODELS = {
    "smollm2-135m": "SmolLM2-135M",
    "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B",
    "qwen2.5-coder-1.5b": "Qwen2.5-Coder-1.5B",
}
# The name of a run's reference row, which has no gain.
ZERO_SHOT = "zero-shot"
NOT_MEASURED = "–"  # noqa: RUF001


def signed(value: float) -> str:
    """Returns a number with one decimal and its sign."""
    # "+ 0.0" makes zero of minus zero.
    text = f"{round(value, 1) + 0.0:+.1f}"
    return text.replace("-", MINUS)


def number(value: float) -> str:
    """Returns a number with one decimal, with a sign where it is negative."""
    return f"{round(value, 1) + 0.0:.1f}".replace("-", MINUS)


def interval(value: float, low: float, high: float) -> str:
    """Returns a gain in points with its 95 % interval."""
    return f"{signed(value)} ({number(low)} to {number(high)})"


def mean_of(run: str, method: str, group: str) -> pd.Series:
    """Returns the line of a run's report that is a method's mean over a group of tasks."""
    lines = pd.read_csv(RESULTS / run / "report.csv")
    chosen = lines[(lines.kind == "mean") & (lines.name == group) & (lines.method == method)]
    assert len(chosen) == 1, (run, method, group)
    return chosen.iloc[0]


def gain(run: str, method: str, group: str) -> str:
    """Returns a method's mean gain over zero-shot, in points."""
    line = mean_of(run, method, group)
    return interval(100 * line.gain, 100 * line.gain_low, 100 * line.gain_high)


def accuracy(run: str, group: str) -> str:
    """Returns zero-shot's mean accuracy in %."""
    return f"{100 * mean_of(run, ZERO_SHOT, group).accuracy:.1f} %"


def calibrated(model: str) -> str:
    """Returns what a prior from 64 unlabelled prompts gains, and over how many tasks."""
    content = load_json(RESULTS / "calibrating" / f"{model}.json")
    for record in content["records"]:
        setting = (record["labels"], record["prompts"], record["way"])
        if setting == ("natural", 64, "guarded"):
            figures = (100 * record[name] for name in ("gain", "low", "high"))
            return f"{interval(*figures)}, {len(content['tasks'])} tasks"
    raise ValueError(f"{model} has no record of 64 prompts")


def few_labels(model: str, way: str, kind: str) -> str:
    """Returns what a few labels of a task itself gain over zero-shot, on a kind of tasks."""
    summary = load_json(RESULTS / "few-labels" / f"{model}.json")["summary"]
    gap = summary[kind][way]["over zero-shot"]
    return interval(gap["value"], gap["low"], gap["high"])


def cost(run: str, method: str) -> str:
    """Returns a method's time per example as a multiple of zero-shot's, measured in turns."""
    report = (RESULTS / run / "report.md").read_text(encoding="utf-8")
    (times,) = re.findall(
        rf"^\| {re.escape(method)} \| ([\d.]+) \| [\d.]+ to", report, re.MULTILINE
    )
    return f"{float(times):.2f}"


def readme_table() -> str:
    """Returns what each kind of data gives on two models."""
    lines = [
        "| you have | model | best method measured | gain on tasks fitted "
        "| gain on tasks never seen | time |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for run in ("smollm2-135m", "qwen2.5-coder-1.5b"):
        seen = f"({accuracy(run, 'source')} right)"
        unseen = f"({accuracy(run, 'unseen')} right)"
        lines.append(f"| nothing | {MODELS[run]} | zero-shot | {seen} | {unseen} | 1 |")
    small = cost("smollm2-135m-safe", "batch-calibration")
    for run in ("smollm2-135m", "qwen2.5-coder-1.5b"):
        time = small if run == "smollm2-135m" else NOT_MEASURED
        lines.append(
            f"| 64 prompts, no label | {MODELS[run]} | calibration (`guarded`) | "
            f"{NOT_MEASURED} | {calibrated(run)} | {time} |"
        )
    for run in ("smollm2-135m", "qwen2.5-coder-1.5b"):
        time = f"{cost(run, 'few-shot')}; kept {cost(run, 'few-shot, context kept')}"
        lines.append(
            f"| 5 labels a class of the task itself | {MODELS[run]} | few-shot prompts "
            f"| {gain(run, 'few-shot', 'source')} | {gain(run, 'few-shot', 'unseen')} | {time} |"
        )
    rungs = {
        "distilled": "5 labels a class of the task itself, 256 prompts",
        "residual 16": "16 labels a class of the task itself",
    }
    for way, have in rungs.items():
        method = "`probe-distilled`" if way == "distilled" else "`probe-residual`"
        # Few-shot prompts teach nothing on the small model, where they are below zero-shot.
        runs = ("smollm2-135m", "qwen2.5-coder-1.5b")
        for run in runs if way != "distilled" else runs[1:]:
            gains = [
                few_labels(run, way, kind)
                for kind in ("the paper's sources", "the paper's unseen ones")
            ]
            lines.append(f"| {have} | {MODELS[run]} | {method} | {' | '.join(gains)} | 2 passes |")
    once = "smollm2-135m-rivals-once"
    lines.append(
        f"| 30 labels of each of five tasks | SmolLM2-135M | prefix tuning, fitted once "
        f"| {gain(once, 'prefix-tuning-once', 'source')} "
        f"| {gain(once, 'prefix-tuning-once', 'unseen')} | {cost(once, 'prefix-tuning-once')} |"
    )
    for run, rows in {"smollm2-135m": "1,000", "qwen2.5-coder-1.5b": "200"}.items():
        lines.append(
            f"| {rows} labels of each of five tasks | {MODELS[run]} | ICR, fitted once "
            f"| {gain(run, 'icr', 'source')} | {gain(run, 'icr', 'unseen')} "
            f"| {cost(run, 'ICR')} |"
        )
    probes = "smollm2-135m-probes"
    lines.append(
        f"| 1,000 labels of the task itself | SmolLM2-135M | linear probe, hidden state "
        f"| {gain(probes, 'probe-hidden', 'source')} | cannot answer | "
        f"{cost(probes, 'probe-hidden')} |"
    )
    return "\n".join(lines)


ONCE = {
    "icr": "ICR",
    "prefix-tuning-once": "prefix tuning",
    "lora-block-once": "LoRA, last block",
    "elicit-once": "ELICIT",
    "i2cl-once": "I2CL",
    "icv-once": "In-Context Vectors",
    "live-once": "LIVE",
    "iterative-vectors-once": "Iterative Vectors",
    "function-vectors-once": "Function Vectors",
    "calibration": "contextual calibration",
}


def once_table() -> str:
    """Returns the gains of methods that are fitted once on the five source tasks."""
    lines = ["| method | source tasks | unseen tasks |", "| --- | ---: | ---: |"]
    run = "smollm2-135m-rivals-once"
    for method, name in ONCE.items():
        lines.append(f"| {name} | {gain(run, method, 'source')} | {gain(run, method, 'unseen')} |")
    return "\n".join(lines)


EACH = {
    "icr": ("ICR, one router for all", "smollm2-135m-rivals-in-domain-sources", "1,000 queries"),
    "prefix-tuning": ("prefix tuning", "smollm2-135m-rivals-in-domain-sources", "19 to 141"),
    "i2cl": ("I2CL", "smollm2-135m-rivals-in-domain-sources", "19 to 141"),
    "lora-block": ("LoRA, last block", "smollm2-135m-rivals-in-domain-sources", "19 to 141"),
    "task-vectors": ("Task Vectors", "smollm2-135m-rivals-in-domain-sources", "19 to 141"),
    "function-vectors": ("Function Vectors", "smollm2-135m-rivals-in-domain-sources", "1,634"),
    "probe-hidden": ("linear probe, hidden state", "smollm2-135m-probes", "up to 1,000"),
    "probe-encoder": ("linear probe, ICR's encoder", "smollm2-135m-probes", "up to 1,000"),
}


def each_table() -> str:
    """Returns the gains of methods that are fitted on each source task by itself."""
    lines = ["| method | rows of a task | source tasks |", "| --- | --- | ---: |"]
    for method, (name, run, rows) in EACH.items():
        lines.append(f"| {name} | {rows} | {gain(run, method, 'source')} |")
    return "\n".join(lines)


def models_table() -> str:
    """Returns ICR and few-shot prompts on three models."""
    lines = ["| model | method | source tasks | unseen tasks |", "| --- | --- | ---: | ---: |"]
    rows = [
        ("smollm2-135m", "smollm2-135m", "few-shot", "few-shot prompts"),
        ("smollm2-135m", "smollm2-135m", "icr", "ICR"),
        ("qwen2.5-coder-0.5b", "qwen2.5-coder-0.5b-shots", "few-shot", "few-shot prompts"),
        ("qwen2.5-coder-0.5b", "qwen2.5-coder-0.5b", "icr", "ICR"),
        ("qwen2.5-coder-0.5b", "qwen2.5-coder-0.5b", "task-vectors", "Task Vectors, each task"),
        (
            "qwen2.5-coder-0.5b",
            "qwen2.5-coder-0.5b-rivals-once",
            "prefix-tuning-once",
            "prefix tuning, once",
        ),
        ("qwen2.5-coder-1.5b", "qwen2.5-coder-1.5b", "few-shot", "few-shot prompts"),
        ("qwen2.5-coder-1.5b", "qwen2.5-coder-1.5b", "icr", "ICR"),
    ]
    for model, run, method, name in rows:
        gains = f"{gain(run, method, 'source')} | {gain(run, method, 'unseen')}"
        lines.append(f"| {MODELS[model]} | {name} | {gains} |")
    return "\n".join(lines)


# Of each page: what a sentence says around its number, and the lead that the number is.
CITED = {
    "README.md": [
        ("ICR gains {} points on fitted", "qwen2.5-coder-0.5b", "icr over zero-shot, source tasks"),
        ("and loses {} on the others", "qwen2.5-coder-0.5b", "icr over zero-shot, unseen tasks"),
    ],
    "docs/who-wins.md": [
        ("ICR gains {} points", "smollm2-135m-rivals-once", "icr over zero-shot, source tasks"),
        ("it loses {}, so", "smollm2-135m-rivals-once", "icr over zero-shot, unseen tasks"),
        ("leads by {}", "smollm2-135m-rivals-once", "prefix-tuning-once over icr, all tasks"),
        (
            "is {} points ahead on the source",
            "smollm2-135m-controls-once",
            "prefix-tuning-once over icr-refit-once, source tasks",
        ),
        (
            "is {} points ahead of ICR over",
            "qwen2.5-coder-0.5b-rivals-once",
            "prefix-tuning-once over icr, all tasks",
        ),
        (
            "is {} points ahead on ICR's own",
            "smollm2-135m-probes",
            "probe-hidden over icr, source tasks",
        ),
        ("nearest with {}", "smollm2-135m-rivals-once", "live-once over zero-shot, unseen tasks"),
        (
            "loses {} there",
            "smollm2-135m-rivals-once",
            "lora-block-once over zero-shot, unseen tasks",
        ),
        ("much: {} points", "qwen2.5-coder-1.5b", "few-shot over zero-shot, all tasks"),
        ("and {} points behind", "qwen2.5-coder-1.5b", "icr over few-shot, unseen tasks"),
    ],
}


def cited(page: str) -> list[str]:
    """Returns what the sentences of a page have to say of the leads that they name."""
    texts = []
    for text, run, lead in CITED[page]:
        value = load_json(RESULTS / run / "leads.json")["leads"][lead]["value"]
        texts.append(text.format(f"{abs(value):.1f}"))
    return texts


TABLES = {
    "README.md": {"gains": readme_table},
    "docs/who-wins.md": {"once": once_table, "each": each_table, "models": models_table},
}


def with_tables(text: str, tables: dict) -> str:
    """Returns a page with the tables between its marks made anew."""
    for name, table in tables.items():
        start = f"<!-- table: {name} -->\n"
        end = f"<!-- end of table: {name} -->"
        before, rest = text.split(start)
        _, after = rest.split(end)
        text = f"{before}{start}{table()}\n{end}{after}"
    return text


if __name__ == "__main__":
    for page, tables in TABLES.items():
        file = ROOT / page
        file.write_text(with_tables(file.read_text(encoding="utf-8"), tables), encoding="utf-8")
