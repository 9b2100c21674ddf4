"""What the commands do, once their arguments are parsed."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from icrouting import methods as registry
from icrouting import report, runs
from icrouting.batches import context_length, tokenize
from icrouting.conclusion import conclusion
from icrouting.config import FitConfig
from icrouting.evaluate import evaluate as evaluate_methods
from icrouting.evaluate import fit_all, time_ratios
from icrouting.icr import InContextRouter
from icrouting.models import fingerprint, load_model
from icrouting.progress import spinner
from icrouting.storage import load_json, save_json
from icrouting.tasks import Task, load_task, rows_digest

console = Console()


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns a model and its tokenizer, without the loaders' bars."""
    disable_progress_bar()
    return load_model(name)


def load_tasks(names: Sequence[str], data: str) -> list[Task]:
    """Returns tasks by name, in their order and each once."""
    with spinner("reading tasks"):
        return [load_task(name, data) for name in dict.fromkeys(names)]


def fit(out: Path, model: str, data: str, tasks: Sequence[str], config: FitConfig) -> InContextRouter:
    """Fits a router, saves it to `out` and returns it."""
    sources = load_tasks(tasks, data)
    base, tokenizer = load(model)
    return fit_and_save(out, base, tokenizer, sources, config)


def fit_and_save(
    out: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Task],
    config: FitConfig,
) -> InContextRouter:
    """Fits a router on a loaded model, or returns the one that was finished in `out` already."""
    if (out / "config.json").exists():
        icr = InContextRouter.from_pretrained(out)
        wanted = (config, fingerprint(model), rows_digest(sources))
        if (icr.description.fit, icr.description.fingerprint, icr.description.rows) == wanted:
            console.print(f"{out} holds this router already", markup=False)
            return icr
        raise ValueError(f"{out} holds a router of other settings, model or data: choose another folder with --out")
    icr = InContextRouter.fit(model, tokenizer, sources, config, folder=out / "fit")
    icr.save_pretrained(out)
    console.print(f"router saved to {out}", markup=False)
    return icr


def evaluate(
    out: Path,
    model: str,
    router: str | None,
    data: str,
    task_names: Sequence[str],
    source_names: Sequence[str],
    method_names: Sequence[str],
    n_test: int,
    seeds: Sequence[int],
    demos_per_class: int,
) -> None:
    """Evaluates methods into a run folder and prints the table."""
    methods = registry.make(method_names, registry.Settings(demos_per_class, router))
    every = load_tasks([*task_names, *source_names], data)
    tasks = [task for task in every if task.name in task_names]
    sources = [task for task in every if task.name in source_names]
    base, tokenizer = load(model)
    icr = InContextRouter.from_pretrained(router) if router else None
    config = runs.RunConfig(
        model=model,
        data=data,
        rows=rows_digest(tasks),
        router=icr.digest() if icr else None,
        methods=[method.name for method in methods],
        tasks=runs.task_entries(tasks, source_names),
        seeds=list(seeds),
        n_test=n_test,
        demos_per_class=demos_per_class,
        notes=[]
        if len(seeds) >= 3 and n_test >= 500
        else [f"{len(seeds)} seed(s), {n_test} test items (paper: 3, 500)"],
    )
    runs.claim(out, config)
    evaluate_methods(base, tokenizer, methods, sources, tasks, seeds, n_test, out / "records.jsonl")
    finish(out, base, tokenizer, methods, sources, tasks, icr, Path(router) / "fit" if router else None)
    show(out)


def finish(
    out: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    methods: Sequence[registry.Method],
    sources: Sequence[Task],
    tasks: Sequence[Task],
    icr: InContextRouter | None,
    fit_folder: Path | None,
) -> None:
    """Adds to a run what its report shows beside the records: times, routing, the training curve."""
    timing = load_json(out / "config.json").get("timing", {})
    is_comparable = timing.get("baseline") == methods[0].name
    timed = {row["method"]: row for row in timing["ratios"]} if is_comparable else {}
    if not timed.keys() >= {method.name for method in methods[1:]}:
        fit_all(model, tokenizer, methods, sources, seed=0)
        shortest = min(tasks, key=lambda task: sum(len(task.prompt(example)) for example in task.test[:20]))
        timed |= {row["method"]: row for row in time_ratios(model, tokenizer, methods, shortest)}
        runs.add_to_config(out, timing={"baseline": methods[0].name, "ratios": list(timed.values())})
    if icr is not None:
        save_json(out / "routing.json", runs.routing_summary(icr, tasks))
    if fit_folder is not None and (fit_folder / "training.jsonl").exists():
        shutil.copyfile(fit_folder / "training.jsonl", out / "training.jsonl")


def show(run: Path) -> None:
    """Remakes a run's report and prints its table and its conclusion."""
    with spinner("making the report"):
        summary = report.write(run)
    console.print(report.terminal_table(summary))
    console.print(Panel(Text(conclusion(summary)), title="in short"))
    console.print(f"report: {run / 'report.html'}", soft_wrap=True, markup=False)


def generate(prompt: str, router: str, model: str, strength: float, max_new_tokens: int) -> None:
    """Prints a prompt's continuation with and without routing."""
    icr = InContextRouter.from_pretrained(router)
    base, tokenizer = load(model)
    (tokens,) = tokenize(tokenizer, [prompt], context_length(base))
    inputs = {"input_ids": torch.tensor([tokens], device=base.device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])

    def go_on() -> Text:
        output = base.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)  # pyright: ignore[reportCallIssue]
        return Text(str(tokenizer.decode(output[0, len(tokens) :], skip_special_tokens=True)))

    with icr.attached(base, tokenizer, strength=strength):
        routed = go_on()
    console.print(Panel(go_on(), title="zero-shot"))
    console.print(Panel(routed, title=f"routed, strength {strength:g}"))
