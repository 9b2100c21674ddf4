"""What `icr sweep` does, once its arguments are parsed."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich.panel import Panel
from rich.table import Table as RichTable
from rich.text import Text
from transformers import PreTrainedModel

from icrouting.cli import evaluate as evaluating
from icrouting.cli import fit as fitting
from icrouting.cli.loading import console, load, stoppable
from icrouting.config import HIDDEN
from icrouting.decoder.loading import load_skeleton
from icrouting.evaluation import records
from icrouting.evaluation.config import EvalConfig
from icrouting.evaluation.folder import RunFolder
from icrouting.evaluation.runs import command, commit
from icrouting.fitting.reckoning import Sizes
from icrouting.methods import registry
from icrouting.report.run import read_run
from icrouting.routing.encoder import load_encoder
from icrouting.routing.features import sentence_encoder
from icrouting.routing.pids import check_layers, late_third
from icrouting.runtime.pages import render
from icrouting.runtime.processes import first_one_first, is_first, wait
from icrouting.runtime.storage import save_json, save_text
from icrouting.sweeping.asked import Asked
from icrouting.sweeping.axes import Setting
from icrouting.sweeping.folder import SweepFolder
from icrouting.sweeping.grid import Grid
from icrouting.sweeping.once import Stages, in_order
from icrouting.sweeping.picture import picture
from icrouting.sweeping.table import Table
from icrouting.tasks.task import Task


def sweep(
    out: Path,
    asked: Asked,
    evaluation: EvalConfig,
    tasks: Mapping[str, Task],
    *,
    stages: Path | None = None,
    gate: bool = True,
    dry_run: bool = False,
) -> None:
    """Fits every setting, evaluates all in one run, and prints their table.

    Args:
        out: the sweep's folder.
        asked: what is varied.
        evaluation: how settings are evaluated, and on which model; they join its methods.
        tasks: the tasks and sources that these name, by the names they are asked for by.
        stages: where fits share their stages; None is a folder of the sweep's own.
        gate: whether routers are to have a gate.
        dry_run: print the grid and what is computed once, and end.
    """
    folder = SweepFolder(out)
    console.quiet = not is_first()
    with stoppable(lambda: _kept(folder)):
        grid = _checked_grid(folder, asked, evaluation, tasks)
        if dry_run:
            return
        with first_one_first():
            loaded = load(evaluation.model)
        fits = grid.fits
        n_layers = Sizes.of(loaded[0]).n_layers
        for place, name in enumerate(in_order(fits, n_layers), start=1):
            console.print(f"fit {place} of {len(fits)}: {name}", markup=False)
            setting = fits[name]
            fitting.fit(
                folder.router(name),
                evaluation.model,
                [tasks[source] for source in setting.sources],
                setting.fit,
                evaluation.token_budget,
                stages_folder=stages or folder.stages,
                gate=gate,
                loaded=loaded,
            )
        evaluating.evaluate(folder.run, _run(folder, evaluation, grid), tasks, loaded=loaded)
        if is_first():
            _finish(folder, asked, grid)
        wait()


def _checked_grid(
    folder: SweepFolder, asked: Asked, evaluation: EvalConfig, tasks: Mapping[str, Task]
) -> Grid:
    """Returns the grid, which is printed; ValueError for what would fail only after hours."""
    with first_one_first():  # which may have to download
        skeleton, _ = load_skeleton(evaluation.model.name)
        grid = asked.grid(Sizes.of(skeleton).n_layers)
        registry.check(evaluation.methods, _run(folder, evaluation, grid).entrants)
        for setting in grid.settings:
            _check(setting, skeleton, tasks)
        for encoder in {sentence_encoder(setting.fit.encoder) for setting in grid.settings}:
            if encoder is not None:
                load_encoder(encoder, "cpu")
    _show_grid(grid, skeleton)
    return grid


def _check(setting: Setting, skeleton: PreTrainedModel, tasks: Mapping[str, Task]) -> None:
    """Checks what a fit would refuse only later; ValueError names the setting and the field."""
    sizes = Sizes.of(skeleton)
    fit = setting.fit
    try:
        layers = check_layers(fit.layers or late_third(sizes.n_layers), sizes.n_layers)
        if fit.encoder == HIDDEN and layers[0] == 0:
            raise ValueError("encoder hidden: what enters layer 0 has read the last token alone")
        if fit.rank > sizes.key_width:
            raise ValueError(
                f"rank must lie in 1..{sizes.key_width} (the width of the keys), got {fit.rank}"
            )
        rows = [len(tasks[source].train) for source in setting.sources]
        n_prompts = sum(min(fit.n_prompts, n_rows) for n_rows in rows)
        if n_prompts <= fit.rank:
            raise ValueError(
                f"rank {fit.rank} needs more than {fit.rank} prompts, n_prompts gives {n_prompts}"
            )
    except ValueError as error:
        raise ValueError(f"{setting.name}: {error}") from error


def _run(folder: SweepFolder, evaluation: EvalConfig, grid: Grid) -> EvalConfig:
    """Returns the run's settings, in which each setting of the grid is a column."""
    entrants = []
    sources: dict[str, None] = {}
    for column in grid.columns:
        fitted = column.fitted
        entrants.append(fitted.entrant(str(folder.router(fitted.fit_name))))
        sources |= dict.fromkeys(fitted.sources)
    settings = evaluation.settings
    if any(name.startswith("icr") for name in evaluation.methods):
        router = str(folder.router(grid.reference_fit.fit_name))
        settings = replace(settings, router=router)
    return replace(evaluation, entrants=tuple(entrants), sources=tuple(sources), settings=settings)


def _show_grid(grid: Grid, skeleton: PreTrainedModel) -> None:
    """Prints every setting, and how often each stage is computed."""
    names = [axis.name for axis in grid.axes]
    table = RichTable("setting", *names, title=f"{len(grid.settings)} settings")
    for setting in grid.settings:
        name = setting.name
        if setting == grid.reference:
            name += " (reference)"
        values = [Text(setting.values.get(axis, "")) for axis in names]
        table.add_row(Text(name), *values)
    console.print(table)
    for line in Stages.of(grid.fits, Sizes.of(skeleton).n_layers).in_words(len(grid.settings)):
        console.print(line, markup=False, highlight=False)


def _finish(folder: SweepFolder, asked: Asked, grid: Grid) -> None:
    """Writes a sweep's table and picture, and prints them."""
    run_folder = RunFolder(folder.run)
    run = read_run(run_folder)
    names = [setting.name for setting in grid.settings]
    fits = {}
    for column in grid.columns:
        if column.seed is not None:
            fits[column.fitted.name] = (column.setting, column.seed)
    run_records = records.read(run_folder.records)
    table = Table.of(run, run_records, names, grid.reference.name, fits or None)
    origin = {"command": command(), "commit": commit(), "model": run.model, "dtype": run.dtype}
    content = {
        **origin,
        "axes": {axis.name: list(axis.values) for axis in grid.axes},
        "one_by_one": asked.one_by_one,
        "reference": table.reference,
        "settings": {setting.name: dict(setting.values) for setting in grid.settings},
        "seeds": list(grid.seeds),
        "groups": {name: list(tasks) for name, tasks in table.groups.items()},
        "n_test": run.n_test,
        "notes": run.notes,
        "found": asked.found,
        "conclusion": table.conclusion(),
        "lines": table.objects(),
    }
    page = render(
        "sweeping/templates/sweep.md.j2",
        {},
        table=table,
        axes=", ".join(content["axes"]),
        run=run,
        found=asked.found,
        picture=folder.svg.name,
        origin=origin,
    )
    save_text(folder.svg, picture(table))
    save_text(folder.csv, table.csv())
    save_text(folder.markdown, page)
    # Last, so that who finds it finds the others.
    save_json(folder.json, content)
    _show(folder, asked, table)


def _show(folder: SweepFolder, asked: Asked, table: Table) -> None:
    heading, *lines = table.grid()
    shown = RichTable(title="Accuracy, % (± half of the 95 % interval), and points over reference")
    for place, name in enumerate(heading):
        shown.add_column(Text(name), justify="right" if place else "left", overflow="fold")
    for line in lines:
        shown.add_row(*map(Text, line))
    console.print(shown)
    sentences = [table.conclusion()]
    if asked.found:
        sentences.append(f"The paper: {asked.found}")
    console.print(Panel(Text(" ".join(filter(None, sentences))), title="in short"))
    for name, file in (("table", folder.markdown), ("picture", folder.svg)):
        console.print(f"{name}: {file}", soft_wrap=True, markup=False)


def _kept(folder: SweepFolder) -> str:
    """What a sweep that is stopped has kept."""
    n_routers = len(list(folder.path.glob("fits/*/config.json")))
    n_answers = len(records.read(RunFolder(folder.run).records)) if folder.run.exists() else 0
    return (
        f"{folder} keeps {n_routers} finished fits, what another one had computed, and "
        f"{n_answers:,} answers; the same command goes on from there"
    )
