"""Does a router learn the answer's format? The source tasks in three formats each, at the same number of queries.

    python benchmarks/formats.py --against runs/smollm2-135m --out runs/formats

Every source task is also asked by another template and other label words, and by letters in an order drawn for each
row (tasks that have letters: by two other templates). The router is fitted on all fifteen with a third of the prompts
and queries each, then measured on the twelve tasks as the paper asks them; zero-shot and the router of one format come
from the finished run `--against`, on the same items and seed. Killed and started again, it goes on.
"""

import argparse
import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
from novelty import gain

from icrouting import records
from icrouting.decoder.loading import load_model
from icrouting.icr import InContextRouter
from icrouting.runs import commit
from icrouting.runtime.storage import load_json, save_json
from icrouting.tasks.load import load_task
from icrouting.tasks.task import Example, Task

MODEL, ONE_FORMAT, SEED = "pinned:smollm2-135m", "routers/smollm2-135m", 0
OTHER_WORDS = {
    "agnews": ("Article: {text}\nTopic of the article:", ("Politics", "Games", "Money", "Science")),
    "sst2": ("{text}\nDid they like the film?", ("No", "Yes")),
    "trec": ("Q: {text}\nWhat is asked for:", ("Acronym", "Thing", "Meaning", "Human", "Place", "Amount")),
}
LETTERED = {
    "agnews": "News: {text}\n{choices}\nWhich type? ({letters})",
    "sst2": "Review: {text}\n{choices}\nSentiment ({letters}):",
    "trec": "Question: {text}\n{choices}\nThe answer is of type:",
    "csqa": "{question}\n{choices}\nCorrect option:",
    "piqa": "{question}\n{choices}\nBetter way ({letters}):",
}
CHOICES_FIRST = {
    "csqa": "Choices:\n{choices}\nFor the question: {question}\nChoice:",
    "piqa": "Ways:\n{choices}\nTo reach: {question}\nThe best way is",
}


def shuffled(task: Task, name: str, template: str) -> Task:
    """The task with its options as letters, in an order drawn for every row."""
    rng = np.random.default_rng(SEED)

    def row(example: Example) -> Example:
        choices = task.spec.options or example.choices
        order = rng.permutation(len(choices)).tolist()
        return Example(example.fields, tuple(choices[i] for i in order), order.index(example.label))

    spec = dataclasses.replace(task.spec, name=f"{task.name}-{name}", template=template, options=())
    return Task(spec, *(tuple(map(row, rows)) for rows in (task.train, task.test, task.validation)))


def formats_of(task: Task) -> list[Task]:
    """A source task as it is and in two other formats."""
    if task.name in OTHER_WORDS:
        template, options = OTHER_WORDS[task.name]
        spec = dataclasses.replace(task.spec, name=f"{task.name}-words", template=template, options=options)
        other = dataclasses.replace(task, spec=spec)
    else:
        other = shuffled(task, "first", CHOICES_FIRST[task.name])
    return [task, other, shuffled(task, "letters", LETTERED[task.name])]


def fit(out: Path, sources: list[Task]) -> None:
    """Fits the router of three formats, with the settings of the one of one format."""
    if (out / "config.json").exists():
        return
    one = InContextRouter.from_pretrained(ONE_FORMAT).description.fit
    every = [form for task in sources for form in formats_of(task)]
    ratio = len(every) / len(sources)
    config = dataclasses.replace(
        one, n_prompts=math.ceil(one.n_prompts / ratio), n_queries=math.ceil(one.n_queries / ratio)
    )
    router = InContextRouter.fit(*load_model(MODEL), every, config, folder=out / "fit")
    router.save_pretrained(out)


def run(against: Path, data: str, out: Path, n_test: int) -> None:
    """Fits, evaluates by the command line and writes the leads."""
    config = load_json(against / "config.json")
    sources, names = config["sources"], [task["name"] for task in config["tasks"]]
    fit(out / "router", [load_task(name, data) for name in sources])
    where = ["--model", MODEL, "--router", str(out / "router"), "--data", data, "--out", str(out / "run")]
    asked = f"--methods icr --tasks {' '.join(names)} --sources {' '.join(sources)} --n-test {n_test} --seeds {SEED}"
    subprocess.run([sys.executable, "-m", "icrouting.cli", "eval", *where, *asked.split()], check=True)
    three = {(r.task, r.index): r for r in records.read(out / "run" / "records.jsonl")}
    found = [r for r in records.read(against / "records.jsonl") if r.seed == SEED and (r.task, r.index) in three]
    sides = {method: [r for r in found if r.method == method] for method in ("zero-shot", "icr")}
    groups = {task["name"]: "source" if task["role"] == "source" else task["group"] for task in config["tasks"]}
    chosen = {group: [name for name in names if groups[name] == group] for group in ("source", "near", "far")}
    chosen |= {"unseen": chosen["near"] + chosen["far"], "all": names} | {name: [name] for name in names}
    pairs = {"three formats over zero-shot": ([*three.values()], sides["zero-shot"])}
    pairs |= {"one format over zero-shot": (sides["icr"], sides["zero-shot"])}
    pairs |= {"three formats over one": ([*three.values()], sides["icr"])}
    leads = {said: {group: gain(*pair, of) for group, of in chosen.items()} for said, pair in pairs.items()}
    save_json(out / "table.json", {"command": " ".join(sys.argv), "commit": commit(), "n_test": n_test, "leads": leads})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="a finished run of zero-shot and icr")
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n-test", type=int, default=500)
    chosen = parser.parse_args()
    run(chosen.against, chosen.data, chosen.out, chosen.n_test)
