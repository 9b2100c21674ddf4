"""What `icr eval` and `icr report` do, once their arguments are parsed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.panel import Panel
from rich.text import Text

from icrouting import methods as registry
from icrouting.cli.loading import base_of_router, console, load, load_tasks
from icrouting.config import DEFAULT_ENCODER
from icrouting.decoder.backbone import DEFAULT_MODEL
from icrouting.decoder.batches import context_length
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.identity import fingerprint
from icrouting.evaluation import records, runs
from icrouting.evaluation.config import EvalConfig
from icrouting.evaluation.costs import write_tried
from icrouting.evaluation.evaluate import Evaluation
from icrouting.evaluation.folder import RunFolder
from icrouting.evaluation.items import within
from icrouting.evaluation.outcome import outcome_of
from icrouting.evaluation.runs import RunConfig
from icrouting.icr import InContextRouter
from icrouting.report import page, table
from icrouting.report.run import Run
from icrouting.routing.artifact import with_results
from icrouting.routing.features import sentence_encoder
from icrouting.routing.routed import routing_summary
from icrouting.runtime.processes import first_one_first, is_first
from icrouting.runtime.progress import spinner
from icrouting.runtime.storage import save_json, save_text
from icrouting.tasks.task import Task, rows_digest

PAPER_FIT = 5000  # prompts and queries a task


def evaluate(out: Path, config: EvalConfig) -> None:
    """Evaluates methods into a run folder and prints the table."""
    console.quiet = not is_first()
    folder = RunFolder(out)
    router = config.settings.router
    icr = InContextRouter.from_pretrained(router) if router else None
    config = _named(config, icr, folder)
    methods = registry.make(config.methods, config.settings)
    names = list(dict.fromkeys([*config.tasks, *config.sources]))
    with first_one_first():  # which may have to download
        loaded_tasks = load_tasks(names, config.data)
        model, tokenizer = load(config.model)
    # A task may be tested on and a source too, under the one name that the user gave.
    tasks_by_name: dict[str, Task] = {}
    notes = []
    for name, task in zip(names, loaded_tasks, strict=True):
        shortened, note = within(task, tokenizer, context_length(model))
        tasks_by_name[name] = shortened
        notes.append(note)
    tasks = [tasks_by_name[name] for name in dict.fromkeys(config.tasks)]
    sources = [tasks_by_name[name] for name in dict.fromkeys(config.sources)]
    source_names = [task.name for task in sources]
    run_config = RunConfig(
        asked=config,
        fingerprint=fingerprint(model),
        dtype=str(model.dtype).removeprefix("torch."),
        rows=rows_digest(list(tasks_by_name.values())),
        router=icr.digest() if icr else None,
        tasks=runs.task_entries(tasks, source_names),
        sources=source_names,
        notes=[*_router_cuts(icr), *filter(None, notes)],
    )
    with runs.claimed(folder, run_config):
        evaluation = Evaluation(
            Decoder.of(model, tokenizer), methods, sources, folder.records, folder.fits
        )
        # Ends when all processes have ended theirs.
        evaluation.run(tasks, config.seeds, config.n_test)
        if is_first():
            finish(folder, evaluation, tasks, config.seeds[-1], icr)


def _named(config: EvalConfig, icr: InContextRouter | None, folder: RunFolder) -> EvalConfig:
    """Returns what was asked for, with model and sentence encoder by name.

    Where the user names none they are the router's, so that nothing else is looked for.
    """
    encoder = config.settings.encoder
    model = config.model
    if icr is not None:
        model = base_of_router(model, icr)
        encoder = encoder or sentence_encoder(icr.description.fit.encoder)
    # A run that was begun goes on with the encoder that it began with.
    if config.settings.encoder is None and folder.config.exists():
        encoder = folder.read_config().get("encoder", encoder)
    settings = replace(config.settings, encoder=encoder or DEFAULT_ENCODER)
    return replace(config, model=model.or_else(DEFAULT_MODEL), settings=settings)


def _router_cuts(icr: InContextRouter | None) -> list[str]:
    """What a router learned from less than the paper's did."""
    fit = icr.description.fit if icr else None
    if fit is None or min(fit.n_prompts, fit.n_queries) >= PAPER_FIT:
        return []
    learned = f"{fit.n_prompts} prompts, {fit.n_queries} queries a task at most"
    return [f"ICR learned once, from {learned} (paper: {PAPER_FIT:,})."]


def finish(
    folder: RunFolder,
    evaluation: Evaluation,
    tasks: Sequence[Task],
    seed: int,
    icr: InContextRouter | None,
) -> None:
    """Adds to a run what its report shows beside the records, and shows it.

    That is refusals, times, costs, what the router did on each task, and its training curve.
    """
    records.gather(folder.records)
    n_cells = len(evaluation.methods) * len(tasks)
    _say_refused(evaluation.refused, n_cells)
    # The report reads all of this from the folder, so that it can be remade without the model.
    folder.add(outcome_of(evaluation, tasks, seed, folder))
    write_tried(folder.fits, folder.read_config()["methods"], folder.tried)
    if icr is not None:
        with icr.attached_to(evaluation.decoder) as routed:
            save_json(folder.routing, routing_summary(routed, icr.pids.layers, tasks))
        if icr.folder is not None:
            folder.take_training(icr.folder / "fit")
    show(folder.path)


def _say_refused(refused: Mapping[tuple[str, str], str], n_cells: int) -> None:
    """Prints which methods do not fit which tasks; ValueError if none of the cells is left."""
    for (method, task), reason in refused.items():
        console.print(f"{method} does not fit {task}: {reason}", markup=False)
    if len(refused) == n_cells:
        first_reason = next(iter(refused.values()))
        raise ValueError(f"no method fits any task: {first_reason}")


def show(run: Path, card: Path | None = None) -> None:
    """Remakes a run's report and prints its table and its conclusion.

    Both are written to the card in the folder of a router too, if one is named.
    """
    folder = RunFolder(run)
    with spinner("making the report"):
        report = page.write(run)
    if card is not None:
        _write_to_card(card, report.run, folder)
    console.print(table.terminal_table(report.summary))
    console.print(Panel(Text(report.conclusion), title="in short"))
    console.print(f"report: {folder.html}", soft_wrap=True, markup=False)


def _write_to_card(card: Path, run: Run, folder: RunFolder) -> None:
    """Writes a run's report to the card of the router that it measured; ValueError for another."""
    icr = InContextRouter.from_pretrained(card)
    if run.router != icr.digest():
        held = f"{card} holds {icr.digest()}"
        raise ValueError(f"{folder} measured router {run.router}, {held}: nothing is recorded")
    # Writes the card anew where it was deleted, and keeps one that is there.
    icr.save_pretrained(card)
    file = card / "README.md"
    text = file.read_text(encoding="utf-8")
    results = folder.markdown.read_text(encoding="utf-8")
    save_text(file, with_results(text, results))
