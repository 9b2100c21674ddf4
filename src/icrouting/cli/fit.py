"""What `icr fit` does, once its arguments are parsed."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from icrouting.cli import ending
from icrouting.cli.loading import Loaded, console, load, stoppable
from icrouting.cli.warm import Beginning
from icrouting.config import FitConfig
from icrouting.decoder.backbone import Backbone
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.loading import default_dtype, dtype_of, load_skeleton
from icrouting.fitting import plan, stages
from icrouting.fitting.lengths import Texts
from icrouting.fitting.shelf import delete_trunks
from icrouting.icr import InContextRouter
from icrouting.routing.encoder import check_name
from icrouting.routing.features import sentence_encoder
from icrouting.routing.ownership import check_place
from icrouting.runtime.processes import first_one_first, is_first, wait
from icrouting.tasks.task import Task

# Without a router to go on from.
ANEW = Beginning()


def fit(
    out: Path,
    model: Backbone,
    sources: Sequence[Task],
    config: FitConfig,
    token_budget: int | None = None,
    *,
    stages_folder: Path | None = None,
    beginning: Beginning = ANEW,
    gate: bool = True,
    n_check: int = 0,
    asked: Sequence[str] = (),
    loaded: Loaded | None = None,
) -> InContextRouter:
    """Returns a router that is fitted and saved to `out`, or was finished there already.

    One that was not is asked `n_check` held-back rows of each task. `asked` are the words of the
    command that name data and tasks, for the command that is said to be next. `loaded` is the
    model where it is there already.
    """
    if n_check < 0:
        raise ValueError(f"check must be a number of rows, 0 or more, got {n_check}")
    with stoppable(lambda: _kept(out)):
        return _fit(
            out,
            model,
            sources,
            config,
            token_budget,
            stages_folder,
            beginning,
            gate,
            n_check,
            asked,
            loaded,
        )


def _kept(out: Path) -> str:
    """What a fit that is stopped has kept."""
    if _is_saved(out):
        return f"the router is saved in {out}"
    phrases = stages.progress_in(out / "fit")
    if not phrases:
        return f"nothing was computed yet that {out} could keep, the same command begins anew"
    return f"{out} keeps {', '.join(phrases)}; the same command goes on from there"


def _fit(
    out: Path,
    model: Backbone,
    sources: Sequence[Task],
    config: FitConfig,
    token_budget: int | None,
    stages_folder: Path | None,
    beginning: Beginning,
    gate: bool,
    n_check: int,
    asked: Sequence[str],
    loaded: Loaded | None,
) -> InContextRouter:
    shared = stages_folder or out / "fit"
    console.quiet = not is_first()
    model = beginning.model(model)
    config = beginning.settings(config)
    with first_one_first():  # which may have to download
        trained = beginning.trained_tasks(sources, config.seed)
        if not _is_saved(out):
            check_place(out)
            check_name(sentence_encoder(config.encoder) or "")
            # Reckoned before the weights are loaded, which may take long.
            skeleton, tokenizer = load_skeleton(model.name)
            planned = plan.plan_fit(
                skeleton,
                tokenizer,
                trained,
                config,
                dtype_of(model.dtype) or default_dtype(),
                is_extracted=beginning.start is None,
            )
            planned.check(*plan.room_of(shared), is_spread=model.device_map is not None)
        base, tokenizer = loaded or load(model)
    is_new = not _is_saved(out)
    if not is_new:
        icr = InContextRouter.from_pretrained(out)
        if icr.description.fit != config or not beginning.is_of(icr, trained):
            other = "a router of other settings or data"
            raise ValueError(
                f"{out} holds {other}: choose another folder with --out; with --stages {shared} it "
                "takes up what they have in common"
            )
        icr.check_fitted_on(Decoder.of(base, tokenizer), f"the router in {out}")
        if not icr.has_template_of(tokenizer):
            raise ValueError(
                f"{out} holds a router that was fitted by another chat template than this "
                "tokenizer's: choose another folder with --out"
            )
        message = f"{out} holds this router already, {_gate_of(icr)}"
    else:
        decoder = Decoder.of(base, tokenizer, token_budget).unwrapped()
        phrases = stages.kept_stages(decoder, trained, config, shared, beginning.start)
        for line in (*beginning.words(trained), *phrases):
            console.print(line, markup=False)
        icr = InContextRouter.fit(
            base,
            tokenizer,
            sources,
            config,
            folder=out / "fit",
            token_budget=token_budget,
            stages=stages_folder,
            start=beginning.icr,
            keep=beginning.keep,
            gate=gate,
        )
        # All processes hold the same router by now.
        if is_first():
            icr.save_pretrained(out)
        wait()
        message = f"router saved to {out}, {_gate_of(icr)}"
    # As large as the tokens are many, and of use only where a folder was named for more fits.
    if stages_folder is None:
        delete_trunks(shared)
    console.print(message, markup=False)
    if is_new:
        ending.show(out, Decoder.of(base, tokenizer, token_budget), trained, config, n_check)
        for command in ending.next_commands(out, model, asked) if asked else ():
            console.print(f"next: {command}", markup=False, highlight=False, soft_wrap=True)
    return icr


def _gate_of(icr: InContextRouter) -> str:
    """What a router does with prompts unlike those of its tasks."""
    if icr.gate is None:
        return "without a gate: it routes every prompt"
    return f"with a gate, from {sum(icr.gate.numbers.rows):,} prompts of its tasks"


def _is_saved(out: Path) -> bool:
    """Whether a folder holds a finished router."""
    return (out / "config.json").exists()


def show_plan(
    model: Backbone,
    sources: Sequence[Task],
    config: FitConfig,
    tflops: float,
    beginning: Beginning = ANEW,
) -> None:
    """Prints what a fit would take; no weights are read."""
    model = beginning.model(model)
    config = beginning.settings(config)
    trained = beginning.trained_tasks(sources, config.seed)
    for line in beginning.words(trained):
        console.print(line, markup=False)
    skeleton, tokenizer = load_skeleton(model.name)
    # A fit to be planned is a large one, and those run on accelerators.
    dtype = dtype_of(model.dtype)
    planned = plan.plan_fit(
        skeleton,
        tokenizer,
        trained,
        config,
        dtype or torch.bfloat16,
        is_extracted=beginning.start is None,
    )
    dtype_name = "bfloat16 as on accelerators" if dtype is None else model.dtype
    console.print(_texts_by_task(planned, f"fit on {model}"))
    counted = "by the model's tokenizer"
    if tokenizer is None:
        counted = f"no tokenizer: {plan.CHARS_PER_TOKEN} characters each"
    memory = plan.listed(planned.memory, plan.size)
    if "weights" not in planned.memory:
        memory += "; weights not reckoned, being quantised"
    n_layers = len(planned.layers)
    seconds = planned.seconds(tflops * 1e12)
    total_time = plan.hours(sum(seconds.values()))
    lines = {
        "tokens": counted,
        "parameters": f"base model {planned.n_parameters:,}, router {planned.n_router:,}",
        "routed layers": f"{n_layers} from layer {planned.layers[0]} on, rank {config.rank}",
        f"memory, in {dtype_name}": memory,
        "disk": plan.listed(planned.disk, plan.size),
        f"time at {tflops:g} TFLOP/s": f"{total_time}: {plan.listed(seconds, plan.hours)}",
    }
    text = "\n".join(f"{name}: {value}" for name, value in lines.items())
    console.print(text, markup=False, highlight=False)


def _texts_by_task(planned: plan.Plan, title: str) -> Table:
    """How much text of each task a fit would read."""
    columns = ("task", "prompts", "their tokens", "queries", "their tokens")
    by_task = Table(*columns, title=title)
    for task, queries in planned.queries.items():
        # A fit that goes on from a router has no prompts.
        prompts = planned.prompts.get(task, Texts(0, 0, 0, 0))
        counts = (prompts.count, prompts.tokens, queries.count, queries.tokens)
        by_task.add_row(task, *(f"{count:,}" for count in counts))
    return by_task
