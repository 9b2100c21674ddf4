"""What `icr eval` does, once its arguments are parsed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from icrouting import methods as registry
from icrouting.cli.loading import Loaded, base_of_router, console, load, load_tasks, stoppable
from icrouting.cli.reading import check_names
from icrouting.cli.report import show
from icrouting.cli.routers import Routers
from icrouting.config import DEFAULT_ENCODER
from icrouting.decoder.backbone import DEFAULT_MODEL
from icrouting.decoder.batches import context_length
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.identity import fingerprint
from icrouting.evaluation import records, runs
from icrouting.evaluation.config import USUAL_SOURCES, EvalConfig
from icrouting.evaluation.evaluate import Evaluation
from icrouting.evaluation.folder import RunFolder
from icrouting.evaluation.items import within
from icrouting.evaluation.outcome import complete
from icrouting.evaluation.runs import RunConfig
from icrouting.methods import Method
from icrouting.methods.named_prompts import ALL, named_prompts, prompt_digests
from icrouting.report.calibrated import Way
from icrouting.routing.features import sentence_encoder
from icrouting.routing.sources import as_learned
from icrouting.runtime.processes import first_one_first, is_first
from icrouting.tasks.task import Task, rows_digest, template_digest


def evaluate(
    out: Path,
    config: EvalConfig,
    tasks: Mapping[str, Task],
    calibration: Way | None = None,
    *,
    loaded: Loaded | None = None,
) -> None:
    """Evaluates methods into a run folder and prints the table.

    Args:
        out: the folder.
        config: what to evaluate.
        tasks: the tasks and sources that it names, by these names, which may be files'.
        calibration: how answers are calibrated for a second table; None makes none.
        loaded: the model, where it is there already.
    """
    with stoppable(lambda: _kept(RunFolder(out))):
        _evaluate(out, config, tasks, calibration, loaded)


def _kept(folder: RunFolder) -> str:
    """What a run that is stopped has kept."""
    n_answers = len(records.read(folder.records))
    n_fits = len(list(folder.fits.glob("*.safetensors")))
    if not n_answers and not n_fits:
        return f"no answer was computed yet that {folder} could keep, the same command begins anew"
    kept = f"{n_answers:,} answers and {n_fits:,} fits"
    return f"{folder} keeps {kept}; the same command goes on from there"


def _evaluate(
    out: Path,
    config: EvalConfig,
    read_tasks: Mapping[str, Task],
    calibration: Way | None,
    loaded: Loaded | None,
) -> None:
    console.quiet = not is_first()
    folder = RunFolder(out)
    routers = Routers.of(config)
    config = _named(replace(config, methods=config.columns), routers, folder)
    # Those that are known before the tasks are: a mistake in a name stops the command at once.
    methods = _made(config, [name for name in config.methods if name != ALL])
    reads_sources = any(method.reads_sources for method in methods)
    with first_one_first():  # which may have to download
        tasks, sources = _load_tasks(config, read_tasks, routers, reads_sources)
        source_names = _source_names(config, routers, sources)
        for line in routers.read_otherwise(tasks):
            advice = "what routing does to another prompt was not learned and may do harm"
            console.print(f"{line}: {advice}", markup=False)
        config = replace(config, methods=_with_prompts(config.methods, tasks))
        model, tokenizer = loaded or load(config.model)
    methods = _in_order(methods, config)
    tasks_by_name: dict[str, Task] = {}
    notes = []
    # A task may be tested on and a source too.
    for task in (*tasks, *sources):
        if task.name not in tasks_by_name:
            bound_task = task.bound_to(tokenizer)
            tasks_by_name[task.name], note = within(bound_task, tokenizer, context_length(model))
            notes.append(note)
    tasks = [tasks_by_name[task.name] for task in tasks]
    sources = [tasks_by_name[task.name] for task in sources]
    run_config = RunConfig(
        asked=config,
        fingerprint=fingerprint(model),
        dtype=str(model.dtype).removeprefix("torch."),
        rows=rows_digest(list(tasks_by_name.values())),
        task_rows=rows_digest(tasks),
        router=routers.unnamed.digest() if routers.unnamed else None,
        routers=routers.identities,
        chat_template=template_digest(list(tasks_by_name.values())),
        prompts=prompt_digests(config.methods, tasks, tokenizer),
        tasks=runs.task_entries(tasks, source_names),
        sources=source_names,
        notes=[*routers.notes(tasks), *filter(None, notes)],
    )
    with runs.claimed(folder, run_config):
        evaluation = Evaluation(
            Decoder.of(model, tokenizer, config.token_budget),
            methods,
            sources,
            folder.records,
            folder.fits,
            skip_nan=config.skip_nan,
        )
        # Ends when all processes have ended theirs.
        evaluation.run(tasks, config.seeds, config.n_test)
        if is_first():
            finish(folder, evaluation, tasks, config.seeds[-1], routers, calibration)


def _load_tasks(
    config: EvalConfig,
    read_tasks: Mapping[str, Task],
    routers: Routers,
    reads_sources: bool,
) -> tuple[list[Task], list[Task]]:
    """Returns the tasks to test on, and the sources; none of these where nobody reads their rows.

    ValueError where a source that the router names cannot be found by that name.
    """
    task_names = list(dict.fromkeys(config.tasks))
    source_names = [] if config.sources is None else list(dict.fromkeys(config.sources))
    if config.sources is None and routers.any is None and reads_sources:
        source_names = list(USUAL_SOURCES)
    # By the name that the user gave, which may be a file's.
    task_of = dict(read_tasks)
    others = [name for name in source_names if name not in task_of]
    if others:
        loaded = load_tasks(others, config.data, chat=config.chat)
        task_of |= dict(zip(others, loaded, strict=True))
        check_names(list(task_of.values()), list(task_of))
    tasks = [task_of[name] for name in task_names]
    sources = [task_of[name] for name in source_names]
    if config.sources is None and routers.any is not None and reads_sources:
        sources = _sources_of_routers(routers, tasks, config)
    return tasks, sources


def _with_prompts(methods: Sequence[str], tasks: Sequence[Task]) -> tuple[str, ...]:
    """Returns names of methods, with the tasks' own prompts in the place of "prompts"."""
    names = tuple(named_prompts(methods, tasks))
    if not names:
        raise ValueError(
            f"none of the tasks {', '.join(task.name for task in tasks)} has prompts of its own: "
            "write them under [[prompts]] in a task file"
        )
    return names


def _in_order(methods: Sequence[Method], config: EvalConfig) -> list[Method]:
    """Returns the methods that a run asks for, those among them that were made already."""
    made = {method.name: method for method in methods}
    new_names = [name for name in config.methods if name not in made]
    made |= {method.name: method for method in _made(config, new_names)}
    return [made[name] for name in dict.fromkeys(config.methods)]


def _made(config: EvalConfig, names: Sequence[str]) -> list[Method]:
    return registry.make(names, config.settings, config.entrants)


def _sources_of_routers(routers: Routers, tasks: Sequence[Task], config: EvalConfig) -> list[Task]:
    """Returns the tasks that routers were fitted on, those that are loaded already as they are."""
    tasks_by_name = {task.name: task for task in tasks}
    names = routers.task_names
    others = [name for name in names if name not in tasks_by_name]
    try:
        loaded = load_tasks(others, config.data, chat=config.chat)
        loaded = [as_learned(task, routers.sources) for task in loaded]
    except ValueError as error:
        raise ValueError(
            f"the router was fitted on {', '.join(names)}, and a method here reads their rows "
            f"({error}): say with --sources where these tasks are"
        ) from error
    tasks_by_name |= {task.name: task for task in loaded}
    return [tasks_by_name[name] for name in names]


def _source_names(config: EvalConfig, routers: Routers, sources: Sequence[Task]) -> list[str]:
    """Returns the names of the tasks that were learned from.

    A router says itself what it was fitted on; ValueError where --sources says otherwise. Tasks are
    the same by name, whatever their rows.
    """
    asked = None if config.sources is None else [task.name for task in sources]
    if routers.any is None:
        return list(USUAL_SOURCES) if asked is None else asked
    if asked is None:
        return routers.task_names
    # A router that does not say what it was fitted on is taken at the user's word.
    says_all = all(icr.description.tasks for icr in routers.by_name.values())
    fitted = routers.task_names if says_all else []
    if fitted and set(asked) != set(fitted):
        raise ValueError(
            f"the router was fitted on {', '.join(fitted)}, and --sources names "
            f"{', '.join(asked) or 'none'}: leave --sources out, or name the router's own"
        )
    return asked


def _named(config: EvalConfig, routers: Routers, folder: RunFolder) -> EvalConfig:
    """Returns what was asked for, with model and sentence encoder by name.

    Where the user names none they are the router's, so that nothing else is looked for.
    """
    encoder = config.settings.encoder
    model = config.model
    icr = routers.any
    if icr is not None:
        model = base_of_router(model, icr)
        encoder = encoder or sentence_encoder(icr.description.fit.encoder)
    # A run that was begun goes on with the encoder that it began with.
    if config.settings.encoder is None and folder.config.exists():
        encoder = folder.read_config().get("encoder", encoder)
    settings = replace(config.settings, encoder=encoder or DEFAULT_ENCODER)
    return replace(config, model=model.or_else(DEFAULT_MODEL), settings=settings)


def finish(
    folder: RunFolder,
    evaluation: Evaluation,
    tasks: Sequence[Task],
    seed: int,
    routers: Routers,
    calibration: Way | None = None,
) -> None:
    """Adds to a run what its report shows beside the records, and shows it."""
    n_cells = len(evaluation.methods) * len(tasks)
    _say_refused(evaluation.refused, n_cells)
    complete(folder, evaluation, tasks, seed, routers.unnamed, routers.named)
    show(folder.path, calibration=calibration)


def _say_refused(refused: Mapping[tuple[str, str], str], n_cells: int) -> None:
    """Prints which methods do not fit which tasks; ValueError if none of the cells is left."""
    for (method, task), reason in refused.items():
        console.print(f"{method} does not fit {task}: {reason}", markup=False)
    if len(refused) == n_cells:
        first_reason = next(iter(refused.values()))
        raise ValueError(f"no method fits any task: {first_reason}")
