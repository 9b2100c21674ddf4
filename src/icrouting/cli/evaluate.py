"""What `icr eval` and `icr report` do, once their arguments are parsed."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.panel import Panel
from rich.text import Text

from icrouting import methods as registry
from icrouting.cli.loading import console, load, load_tasks
from icrouting.cli.options import Backbone
from icrouting.decoder.batches import context_length
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.identity import fingerprint
from icrouting.evaluation import costs, records, runs
from icrouting.evaluation.evaluate import Evaluation
from icrouting.evaluation.items import within
from icrouting.evaluation.records import BASELINE
from icrouting.icr import InContextRouter
from icrouting.methods.settings import Settings
from icrouting.report import page, table
from icrouting.report.wording import conclusion
from icrouting.routing.artifact import with_results
from icrouting.routing.routed import routing_summary
from icrouting.runtime.processes import first_one_first, is_first
from icrouting.runtime.progress import spinner
from icrouting.runtime.storage import load_json, save_json, save_text
from icrouting.tasks.task import Task, rows_digest


def evaluate(
    out: Path,
    model: Backbone,
    data: str,
    task_names: Sequence[str],
    source_names: Sequence[str],
    method_names: Sequence[str],
    n_test: int,
    seeds: Sequence[int],
    settings: Settings,
) -> None:
    """Evaluates methods into a run folder and prints the table."""
    console.quiet = not is_first()
    methods = registry.make(method_names, settings)
    names = list(dict.fromkeys([*task_names, *source_names]))
    with first_one_first():  # which may have to download
        every = load_tasks(names, data)
        base, tokenizer = load(model)
    every, left = zip(
        *(within(task, tokenizer, context_length(base)) for task in every), strict=True
    )
    tasks, sources = (
        [every[names.index(n)] for n in dict.fromkeys(chosen)]
        for chosen in (task_names, source_names)
    )
    icr = InContextRouter.from_pretrained(settings.router) if settings.router else None
    config = runs.RunConfig(
        model=str(model),
        fingerprint=fingerprint(base),
        dtype=str(base.dtype).removeprefix("torch."),
        data=data,
        rows=rows_digest(every),
        router=icr.digest() if icr else None,
        methods=[method.name for method in methods],
        tasks=runs.task_entries(tasks, [task.name for task in sources]),
        sources=[task.name for task in sources],
        seeds=list(dict.fromkeys(seeds)),
        n_test=n_test,
        settings=settings,
        notes=[*_router_cuts(icr), *filter(None, left)],
    )
    with runs.claimed(out, config):
        evaluation = Evaluation(
            Decoder.of(base, tokenizer), methods, sources, out / "records.jsonl", out / "fits"
        )
        evaluation.run(tasks, seeds, n_test)  # ends when all processes have ended theirs
        if is_first():
            finish(out, evaluation, tasks, seeds[-1], icr)


def _router_cuts(icr: InContextRouter | None) -> list[str]:
    """What a router learned from less than the paper's did."""
    fit = icr.description.fit if icr else None
    if fit is None or min(fit.n_prompts, fit.n_queries) >= 5000:
        return []
    return [
        f"ICR learned once, from {fit.n_prompts} prompts, {fit.n_queries} queries a task at most (paper: 5,000)."
    ]


def finish(
    out: Path, evaluation: Evaluation, tasks: Sequence[Task], seed: int, icr: InContextRouter | None
) -> None:
    """Adds to a run what its report shows beside the records: times, routing, the training curve; and shows it."""
    records.gather(out / "records.jsonl")
    methods, config = evaluation.methods, load_json(out / "config.json")
    refused = [[*cell, said] for cell, said in evaluation.refused.items()]
    for method, task, said in refused:
        console.print(f"{method} does not fit {task}: {said}", markup=False)
    if len(refused) == len(methods) * len(tasks):
        raise ValueError(f"no method fits any task: {refused[0][-1]}")
    asked = {(method.name, task.name) for method in methods for task in tasks}
    earlier = [entry for entry in config.get("refused", []) if tuple(entry[:2]) not in asked]
    runs.add_to_config(out, refused=[*earlier, *refused])
    timed = {row["method"]: row for row in config.get("timing", {}).get("ratios", [])}
    able = [
        method
        for method in methods
        if not all((method.name, task.name) in evaluation.refused for task in tasks)
    ]
    unrefused = [
        task
        for task in tasks
        if all((method.name, task.name) not in evaluation.refused for method in able)
    ]
    if unrefused and not timed.keys() >= {method.name for method in able} - {BASELINE}:
        evaluation.methods = able
        evaluation.fit(seed)
        shortest = min(
            unrefused, key=lambda task: sum(len(task.prompt(example)) for example in task.test[:20])
        )
        timed |= {row["method"]: row for row in evaluation.time_ratios(shortest)}
        runs.add_to_config(out, timing={"baseline": BASELINE, "ratios": list(timed.values())})
    runs.add_to_config(out, fits=costs.fit_costs(out / "fits", config["methods"]))
    costs.write_tried(out / "fits", config["methods"], out / "tried.csv")
    if icr is not None:
        with icr.attached(evaluation.decoder.model, evaluation.decoder.tokenizer) as routed:
            save_json(out / "routing.json", routing_summary(routed, icr.pids.layers, tasks))
        if icr.folder is not None and (curve := icr.folder / "fit" / "training.jsonl").exists():
            shutil.copyfile(curve, out / "training.jsonl")
    show(out)


def show(run: Path, card: Path | None = None) -> None:
    """Remakes a run's report, prints its table and its conclusion, and writes both to the card of a router's folder."""
    with spinner("making the report"):
        summary = page.write(run)
    if card is not None:
        icr, measured = (
            InContextRouter.from_pretrained(card),
            load_json(run / "config.json").get("router"),
        )
        if measured != icr.digest():
            raise ValueError(
                f"{run} measured router {measured}, {card} holds {icr.digest()}: nothing is recorded"
            )
        icr.save_pretrained(card)
        file = card / "README.md"
        save_text(
            file,
            with_results(file.read_text(encoding="utf-8"), (run / "report.md").read_text("utf-8")),
        )
    console.print(table.terminal_table(summary))
    console.print(Panel(Text(conclusion(summary)), title="in short"))
    console.print(f"report: {run / 'report.html'}", soft_wrap=True, markup=False)
