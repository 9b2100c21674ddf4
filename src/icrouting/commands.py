"""What the commands do, once their arguments are parsed."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from icrouting import methods as registry
from icrouting.config import Backbone, FitConfig
from icrouting.decoder.batches import context_length, tokenize
from icrouting.decoder.families import device_of
from icrouting.decoder.identity import fingerprint
from icrouting.decoder.loading import default_dtype, load_model, load_skeleton
from icrouting.evaluation import costs, records, runs
from icrouting.evaluation.evaluate import Evaluation
from icrouting.evaluation.items import within
from icrouting.evaluation.records import BASELINE
from icrouting.fitting import plan
from icrouting.fitting.trunk import TRUNK_FILE
from icrouting.icr import InContextRouter
from icrouting.methods.settings import Settings
from icrouting.report import page, table
from icrouting.report.wording import conclusion
from icrouting.routing import inspection
from icrouting.routing.artifact import with_results
from icrouting.routing.routed import routing_summary
from icrouting.runtime.processes import first_one_first, is_first, wait
from icrouting.runtime.progress import spinner
from icrouting.runtime.storage import load_json, save_json, save_text
from icrouting.tasks.load import load_task
from icrouting.tasks.task import Task, rows_digest

console = Console()


def load(model: Backbone) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns a model and its tokenizer, without the loaders' bars."""
    disable_progress_bar()
    return load_model(model.model, device_map=model.device_map)


def load_tasks(names: Sequence[str], data: str) -> list[Task]:
    """Returns tasks by name, in their order and each once; says which training rows were left out."""
    with spinner("reading tasks"):
        tasks = [load_task(name, data) for name in dict.fromkeys(names)]
    if len({task.name for task in tasks}) < len(tasks):
        raise ValueError(f"two of the tasks {', '.join(names)} have one name: set `name` in a task file")
    if dropped := [f"{task.name} {task.n_dropped}" for task in tasks if task.n_dropped]:
        rows = ", ".join(dropped)
        console.print(f"training rows left out, as they repeat each other or held-back rows: {rows}", markup=False)
    return tasks


def fit(out: Path, model: Backbone, data: str, tasks: Sequence[str], config: FitConfig) -> InContextRouter:
    """Fits a router, saves it to `out` and returns it; or the one that was finished there already."""
    console.quiet = not is_first()
    with first_one_first():  # which may have to download
        sources = load_tasks(tasks, data)
        if not (out / "config.json").exists():  # reckoned before the weights are loaded
            planned = plan.plan_fit(*load_skeleton(model.model), sources, config, default_dtype())
            planned.check(*plan.room_of(out), is_spread=model.device_map is not None)
        base, tokenizer = load(model)
    if (out / "config.json").exists():
        icr = InContextRouter.from_pretrained(out)
        wanted = (config, fingerprint(base), rows_digest(sources))
        if (icr.description.fit, icr.description.fingerprint, icr.description.rows) != wanted:
            raise ValueError(f"{out} holds a router of other settings, model or data: choose another folder with --out")
        said = f"{out} holds this router already"
    else:
        icr = InContextRouter.fit(base, tokenizer, sources, config, folder=out / "fit")
        if is_first():
            icr.save_pretrained(out)
        wait()
        said = f"router saved to {out}"
    (out / "fit" / TRUNK_FILE).unlink(missing_ok=True)  # as large as the tokens are many
    console.print(said, markup=False)
    return icr


def show_plan(model: Backbone, data: str, tasks: Sequence[str], config: FitConfig, tflops: float) -> None:
    """Prints what a fit would take; no weights are read."""
    sources, (skeleton, tokenizer) = load_tasks(tasks, data), load_skeleton(model.model)
    planned = plan.plan_fit(skeleton, tokenizer, sources, config, torch.bfloat16)
    by_task = Table("task", "prompts", "their tokens", "queries", "their tokens", title=f"fit on {model}")
    for task, texts in planned.prompts.items():
        counts = (texts.count, texts.tokens, planned.queries[task].count, planned.queries[task].tokens)
        by_task.add_row(task, *(f"{count:,}" for count in counts))
    console.print(by_task)
    seconds = planned.seconds(tflops * 1e12)
    unknown = "" if "weights" in planned.memory else "; weights not reckoned, being quantised"
    lines = {
        "tokens": "by the model's tokenizer" if tokenizer else f"no tokenizer: {plan.CHARS_PER_TOKEN} characters each",
        "parameters": f"base model {planned.n_parameters:,}, router {planned.n_router:,}",
        "routed layers": f"{len(planned.layers)} from layer {planned.layers[0]} on, rank {config.rank}",
        "memory, in bfloat16 as on accelerators": plan.listed(planned.memory, plan.size) + unknown,
        "disk": plan.listed(planned.disk, plan.size),
        f"time at {tflops:g} TFLOP/s": f"{plan.hours(sum(seconds.values()))}: {plan.listed(seconds, plan.hours)}",
    }
    console.print("\n".join(f"{name}: {said}" for name, said in lines.items()), markup=False, highlight=False)


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
    every, left = zip(*(within(task, tokenizer, context_length(base)) for task in every), strict=True)
    tasks, sources = ([every[names.index(n)] for n in dict.fromkeys(chosen)] for chosen in (task_names, source_names))
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
        evaluation = Evaluation(base, tokenizer, methods, sources, out / "records.jsonl", out / "fits")
        evaluation.run(tasks, seeds, n_test)  # ends when all processes have ended theirs
        if is_first():
            finish(out, evaluation, tasks, seeds[-1], icr)


def _router_cuts(icr: InContextRouter | None) -> list[str]:
    """What a router learned from less than the paper's did."""
    fit = icr.description.fit if icr else None
    if fit is None or min(fit.n_prompts, fit.n_queries) >= 5000:
        return []
    return [f"ICR learned once, from {fit.n_prompts} prompts, {fit.n_queries} queries a task at most (paper: 5,000)."]


def finish(out: Path, evaluation: Evaluation, tasks: Sequence[Task], seed: int, icr: InContextRouter | None) -> None:
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
    able = [method for method in methods if not all((method.name, task.name) in evaluation.refused for task in tasks)]
    unrefused = [task for task in tasks if all((method.name, task.name) not in evaluation.refused for method in able)]
    if unrefused and not timed.keys() >= {method.name for method in able} - {BASELINE}:
        evaluation.methods = able
        evaluation.fit(seed)
        shortest = min(unrefused, key=lambda task: sum(len(task.prompt(example)) for example in task.test[:20]))
        timed |= {row["method"]: row for row in evaluation.time_ratios(shortest)}
        runs.add_to_config(out, timing={"baseline": BASELINE, "ratios": list(timed.values())})
    runs.add_to_config(out, fits=costs.fit_costs(out / "fits", config["methods"]))
    costs.write_tried(out / "fits", config["methods"], out / "tried.csv")
    if icr is not None:
        with icr.attached(evaluation.model, evaluation.tokenizer) as routed:
            save_json(out / "routing.json", routing_summary(routed, icr.pids.layers, tasks))
        if icr.folder is not None and (curve := icr.folder / "fit" / "training.jsonl").exists():
            shutil.copyfile(curve, out / "training.jsonl")
    show(out)


def show(run: Path, card: Path | None = None) -> None:
    """Remakes a run's report, prints its table and its conclusion, and writes both to the card of a router's folder."""
    with spinner("making the report"):
        summary = page.write(run)
    if card is not None:
        icr, measured = InContextRouter.from_pretrained(card), load_json(run / "config.json").get("router")
        if measured != icr.digest():
            raise ValueError(f"{run} measured router {measured}, {card} holds {icr.digest()}: nothing is recorded")
        icr.save_pretrained(card)
        file = card / "README.md"
        save_text(file, with_results(file.read_text(encoding="utf-8"), (run / "report.md").read_text("utf-8")))
    console.print(table.terminal_table(summary))
    console.print(Panel(Text(conclusion(summary)), title="in short"))
    console.print(f"report: {run / 'report.html'}", soft_wrap=True, markup=False)


def generate(prompt: str, router: str, model: Backbone, strength: float, max_new_tokens: int) -> None:
    """Prints a prompt's continuation with and without routing."""
    icr = InContextRouter.from_pretrained(router)
    base, tokenizer = load(model)
    (tokens,) = tokenize(tokenizer, [prompt], context_length(base))
    inputs = {"input_ids": torch.tensor([tokens], device=device_of(base))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])

    def go_on(title: str) -> Panel:
        base.generate(**inputs, max_new_tokens=1)  # pyright: ignore[reportCallIssue]  # warms up, so that times compare
        started = time.monotonic()
        output = base.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)  # pyright: ignore[reportCallIssue]
        seconds, new = time.monotonic() - started, output[0, len(tokens) :]
        text = Text(str(tokenizer.decode(new, skip_special_tokens=True)))
        return Panel(text, title=f"{title}: {len(new)} tokens in {seconds:.1f} s")

    plain = go_on("zero-shot")
    with icr.attached(base, tokenizer, strength=strength) as routed:
        beside = Table.grid(Column(ratio=1), Column(ratio=1), expand=True)
        beside.add_row(plain, go_on(f"routed, strength {strength:g}"))
        console.print(beside)
        console.print(routed.effect([prompt]), markup=False, highlight=False)


def inspect(
    prompt: str, router: str, model: Backbone, options: Sequence[str] | None, strength: float, out: Path
) -> None:
    """Prints what a router does to one prompt and writes it as a page."""
    icr = InContextRouter.from_pretrained(router)
    with icr.attached(*load(model), strength=strength) as routed:
        seen = inspection.inspect_prompt(routed, prompt, options)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_text(out, inspection.html(seen, f"{model}, router {router} ({icr.digest()})"))
    console.print(f"{inspection.text(seen)}\npage: {out}", soft_wrap=True, markup=False, highlight=False)
