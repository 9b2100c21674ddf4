"""Tasks on which few-shot prompts help small models much: mappings from word to word, which the sources measure too.

    python benchmarks/mappings.py --model pinned:smollm2-135m --out runs/words-unnamed
    python benchmarks/mappings.py --model pinned:smollm2-135m --named --out runs/words-named

Hendel et al. and Todd et al. put their vectors into prompts that do not say what is asked ("Q: France", "A:"): so it
is without `--named`, on the five tasks that everything is fitted on. With it, prompts say what is asked ("Country:
France", "Capital:"), and five more tasks are unseen. As on the twelve tasks, the candidates are a task's own answers.
`mappings.json` has the words. ICR's router is fitted once on the five, by the one of four settings that is right on
most validation rows; "icr-refit" and other controls are fitted as it was. Rivals try four settings at most, but Task
Vectors sweep all layers. Many words of unseen tasks, such as countries, stand in the sources' training rows too.
"""

import argparse
import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from icrouting import commands, runs
from icrouting.config import Backbone, FitConfig, Settings
from icrouting.decoder.identity import fingerprint
from icrouting.evaluate import Evaluation
from icrouting.icr import InContextRouter
from icrouting.methods import make
from icrouting.runtime.storage import save_json
from icrouting.tasks.task import Example, Task, TaskSpec, rows_digest

WORDS = json.loads(Path(__file__).with_name("mappings.json").read_text(encoding="utf-8"))
SOURCES = ["capital", "antonym", "past", "plural", "french"]
GROUPS = dict.fromkeys(SOURCES, "in-domain") | dict.fromkeys(("spanish", "gerund", "comparative"), "near")
N_TRAIN, N_VALIDATION, N_DEMOS, FEWEST_LETTERS = 30, 12, 10, 3
UNNAMED = ["task-vectors", "function-vectors", "icv", "i2cl", "icr", "icr-refit"]
NAMED = ["multi-task-few-shot", "task-vectors", "icr", "icr-constant-once", "task-vectors-once"]
NAMED += ["lora-block-more-once", "prefix-tuning-once"]
# Trained over the vocabulary, as rivals are.
FIT = FitConfig(
    n_prompts=N_TRAIN, demos_per_class=N_DEMOS, n_queries=N_TRAIN, ce_scope="vocabulary", encoder="pinned:minilm"
)
# Thirty queries a task are few steps, so up to ten times the usual epochs and rate.
TRIED = [{"lr": 1e-3, "epochs": 20}, {"lr": 1e-4, "epochs": 20}, {"lr": 3e-4, "epochs": 20}, {"lr": 1e-3, "epochs": 5}]
SETTINGS = Settings(demos_per_class=N_DEMOS, tries=4, train_rows=N_TRAIN, i2cl_epochs=20, encoder="pinned:minilm")


class Mapping(Task):
    """A task whose demonstrations are balanced over nothing, since nearly every pair has an answer of its own."""

    @cached_property
    def train_labels(self) -> np.ndarray:
        """One class for all rows."""
        return np.zeros(len(self.train), dtype=int)


def mappings(tokenizer, *, named: bool) -> list[Task]:
    """Returns a task for each list of pairs, which is split before a tokenizer is asked which answers it tells apart.

    Left out are pairs whose answer begins with the token of an earlier answer of the list, or with less than three
    letters of a longer one: a model that is about to write a space or a single letter has not answered.
    """
    tasks = []
    for number, name in enumerate(WORDS if named else SOURCES):
        pairs = [tuple(pair.split()) for pair in WORDS[name]["pairs"].split(", ")]
        firsts: dict[int, str] = {}
        for answer in dict.fromkeys(answer for _, answer in pairs):
            tokens = tokenizer(f" {answer}", add_special_tokens=False).input_ids
            if len(tokens) == 1 or len(tokenizer.decode(tokens[:1]).strip()) >= FEWEST_LETTERS:
                firsts.setdefault(tokens[0], answer)
        kept = tuple(firsts.values())
        order = np.random.default_rng(number).permutation(len(pairs))
        parts = [[pairs[i] for i in part] for part in np.split(order, (N_TRAIN, N_TRAIN + N_VALIDATION))]
        train, validation, test = (
            tuple(Example({"word": word}, (), kept.index(answer)) for word, answer in part if answer in kept)
            for part in parts
        )
        template = WORDS[name]["template"] if named else "Q: {word}\nA:"
        tasks.append(Mapping(TaskSpec(name, GROUPS.get(name, "far"), template, kept), train, test, validation))
    return tasks


def chosen_router(model, tokenizer, sources: list[Task], out: Path) -> InContextRouter:
    """Returns the router of the setting that is right on most validation rows; what was tried goes to a file."""
    routers, tried = [], []
    rows = [(task, row) for task in sources for row in task.validation]
    prompts, options = [task.prompt(row) for task, row in rows], [task.options(row) for task, row in rows]
    for setting in TRIED:
        routers.append(InContextRouter.fit(model, tokenizer, sources, replace(FIT, **setting)))
        with routers[-1].attached(model, tokenizer) as routed:
            scores = routed.score(prompts, options)
        hits = scores.argmax(1).numpy() == [row.label for _, row in rows]
        tried.append({**setting, "accuracy": float(hits.mean())})
    save_json(out / "tried-of-icr.json", tried)
    return routers[int(np.argmax([setting["accuracy"] for setting in tried]))]


def run(out: Path, model: str, methods: list[str], seeds: list[int], *, named: bool) -> None:
    """Evaluates the methods into a run folder and prints the table."""
    base, tokenizer = commands.load(Backbone(model))
    tasks, router = mappings(tokenizer, named=named), out / "router"
    sources = tasks[: len(SOURCES)]
    out.mkdir(parents=True, exist_ok=True)
    if not router.exists():
        chosen_router(base, tokenizer, sources, out).save_pretrained(router)
    settings, icr = replace(SETTINGS, router=str(router)), InContextRouter.from_pretrained(router)
    fit = icr.description.fit
    counts = [(len(task.spec.options), len(task.train), len(task.validation)) for task in tasks]
    n_options, n_train, n_held = (", ".join(map(str, column)) for column in zip(*counts, strict=True))
    config = runs.RunConfig(
        model=model,
        fingerprint=fingerprint(base),
        dtype=str(base.dtype).removeprefix("torch."),
        data="benchmarks/mappings.json",
        rows=rows_digest(tasks),
        router=icr.digest(),
        methods=methods,
        tasks=runs.task_entries(tasks, SOURCES),
        sources=SOURCES,
        seeds=seeds,
        n_test=max(len(task.test) for task in tasks),
        settings=settings,
        notes=[
            f"Word pairs; the candidates are a task's own answers ({n_options}). Of {N_TRAIN} training and "
            f"{N_VALIDATION} validation pairs a task those remain that tokens tell apart ({n_train}; {n_held}). "
            f"Few-shot prompts have {N_DEMOS} demonstrations. ICR learned from all training pairs, for {fit.epochs} "
            f"epochs at a rate of {fit.lr}, the best of four settings on validation rows; Task Vectors swept all "
            "layers, others tried four settings at most, controls none."
        ],
    )
    with runs.claimed(out, config):
        evaluation = Evaluation(base, tokenizer, make(methods, settings), sources, out / "records.jsonl", out / "fits")
        evaluation.run(tasks, seeds, config.n_test)
        commands.finish(out, evaluation, tasks, seeds[-1], icr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--named", action="store_true")
    parser.add_argument("--methods", nargs="+", help="beside zero-shot and few-shot")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given = parser.parse_args()
    methods = ["zero-shot", "few-shot", *(given.methods or (NAMED if given.named else UNNAMED))]
    run(given.out, given.model, methods, given.seeds, named=given.named)
