"""A made-up run to test records, metrics and report: seeded answers of a given accuracy."""

import numpy as np

from icrouting.decoder.backbone import Backbone
from icrouting.evaluation.config import EvalConfig
from icrouting.evaluation.records import Record
from icrouting.evaluation.runs import RunConfig
from icrouting.report.run import Run

OPTIONS = {
    "agnews": ["World", "Sports", "Business", "Technology"],
    "mr": ["negative", "positive"],
    "cb": ["A", "B", "C"],
}


def _task(name: str, group: str, role: str) -> dict:
    """What a run's config.json says of a task."""
    options = OPTIONS[name]
    return {
        "name": name,
        "group": group,
        "role": role,
        "n_options": len(options),
        "options": options,
        "n_test_rows": 500,
    }


TASKS = (
    _task("agnews", "in-domain", "source"),
    _task("mr", "near", "unseen"),
    _task("cb", "far", "unseen"),
)
RATIO = {
    "method": "icr",
    "ratio": 1.04,
    "low": 1.01,
    "high": 1.07,
    "n_cached": 540,
    "note": "median of 5 turns on 4 prompts of mr",
}
FIT = {
    "method": "icr",
    "fits": 1,
    "labelled": 3000,
    "trained": 1370,
    "forwards": 6100,
    "backwards": 5000,
    "seconds": None,
}


def record(index: int, is_right: bool = True, **changes) -> Record:
    """A record on two options whose right one is `index % 2`."""
    label = index % 2
    prediction = label if is_right else 1 - label
    values = {
        **{
            "method": "icr",
            "task": "mr",
            "seed": 0,
            "index": index,
            "label": label,
            "prediction": prediction,
        },
        **{"option_logits": (0.25, -1.5), "n_tokens": 17, "seconds": 0.125},
    }
    return Record(**{**values, **changes})


def fake_records(
    accuracies: dict[tuple[str, str], float], n_items: int = 30, seeds=(0, 1)
) -> list[Record]:
    """Records with the given accuracy per method and task."""
    rng = np.random.default_rng(11)
    found = []
    for (method, task), accuracy in accuracies.items():
        n_options = next(known["n_options"] for known in TASKS if known["name"] == task)
        for seed in seeds:
            for index in range(n_items):
                label = index % n_options
                is_right = index < accuracy * n_items
                prediction = label if is_right else (label + 1) % n_options
                logits = tuple(float(logit) for logit in rng.normal(size=n_options))
                changes = {"label": label, "prediction": prediction, "option_logits": logits}
                found.append(record(index, method=method, task=task, seed=seed, **changes))
    return found


def fake_config(methods=("zero-shot", "few-shot", "icr"), **changes) -> dict:
    """The content of a run's config.json over the three tasks."""
    asked = EvalConfig(
        data="pinned:staicc",
        tasks=tuple(task["name"] for task in TASKS),
        sources=("agnews",),
        methods=tuple(methods),
        n_test=30,
        seeds=[0, 1],
        model=Backbone("tiny-llama"),
    )
    measured = RunConfig(
        asked=asked,
        fingerprint="0123456789abcdef",
        dtype="float32",
        rows="0123456789abcdef",
        task_rows="0123456789abcdef",
        router="0123456789abcdef",
        tasks=list(TASKS),
        sources=["agnews"],
        notes=["30 of 500 test items, to fit the time."],
    )
    return {
        **measured.flat(),
        "command": "icr evaluate --model <tiny>",
        "commit": "abc1234",
        "created": "2030-01-02T03:04:05+00:00",
        "refused": [],
        "timing": {"baseline": "zero-shot", "ratios": [RATIO]},
        "fits": [FIT],
        **changes,
    }


def fake_run(methods=("zero-shot", "few-shot", "icr"), **changes) -> Run:
    """A run over the three tasks."""
    return Run.of(fake_config(methods, **changes))


ICR_LOSES_ON_MR = fake_records(
    {
        **{("zero-shot", "agnews"): 0.4, ("zero-shot", "mr"): 0.9, ("zero-shot", "cb"): 0.5},
        **{("few-shot", "agnews"): 0.8, ("few-shot", "mr"): 1.0, ("few-shot", "cb"): 0.5},
        **{("icr", "agnews"): 0.7, ("icr", "mr"): 0.4, ("icr", "cb"): 0.6},
    }
)


def many_methods(n_methods: int) -> tuple[list[Record], Run]:
    """Records of a run, and the run, with more methods than a table has room for."""
    names = ["zero-shot", *(f"method-with-a-long-name-{n}" for n in range(1, n_methods))]
    accuracies = {
        (name, task["name"]): 0.3 + 0.6 * (7 * n % n_methods) / n_methods
        for n, name in enumerate(names)
        for task in TASKS
    }
    return fake_records(accuracies), fake_run(names)
