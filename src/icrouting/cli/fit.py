"""What `icr fit` does, once its arguments are parsed."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from icrouting.cli import ending
from icrouting.cli.loading import console, load, load_tasks, stoppable
from icrouting.config import FitConfig
from icrouting.decoder.backbone import Backbone
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.loading import default_dtype, load_skeleton
from icrouting.fitting import plan, stages
from icrouting.fitting.trunk import TRUNK_FILE
from icrouting.icr import InContextRouter
from icrouting.routing.ownership import check_place
from icrouting.runtime.processes import first_one_first, is_first, wait
from icrouting.tasks.task import rows_digest


def fit(
    out: Path,
    model: Backbone,
    data: str,
    tasks: Sequence[str],
    config: FitConfig,
    n_check: int = 0,
) -> InContextRouter:
    """Returns a router that is fitted and saved to `out`, or was finished there already.

    One that was not is asked `n_check` held-back rows of each task.
    """
    if n_check < 0:
        raise ValueError(f"check must be a number of rows, 0 or more, got {n_check}")
    with stoppable(lambda: _kept(out)):
        return _fit(out, model, data, tasks, config, n_check)


def _kept(out: Path) -> str:
    """What a fit that is stopped has kept."""
    if _is_saved(out):
        return f"the router is saved in {out}"
    phrases = stages.progress_in(out / "fit")
    if not phrases:
        return f"nothing was computed yet that {out} could keep, the same command begins anew"
    return f"{out} keeps {', '.join(phrases)}; the same command goes on from there"


def _fit(
    out: Path, model: Backbone, data: str, tasks: Sequence[str], config: FitConfig, n_check: int
) -> InContextRouter:
    console.quiet = not is_first()
    with first_one_first():  # which may have to download
        sources = load_tasks(tasks, data)
        if not _is_saved(out):
            check_place(out)
            # Reckoned before the weights are loaded, which may take long.
            skeleton, tokenizer = load_skeleton(model.name)
            planned = plan.plan_fit(skeleton, tokenizer, sources, config, default_dtype())
            planned.check(*plan.room_of(out), is_spread=model.device_map is not None)
        base, tokenizer = load(model)
    is_new = not _is_saved(out)
    if not is_new:
        icr = InContextRouter.from_pretrained(out)
        description = icr.description
        if (description.fit, description.rows) != (config, rows_digest(sources)):
            other = "a router of other settings or data"
            raise ValueError(f"{out} holds {other}: choose another folder with --out")
        icr.check_fitted_on(Decoder.of(base, tokenizer), f"the router in {out}")
        message = f"{out} holds this router already"
    else:
        icr = InContextRouter.fit(base, tokenizer, sources, config, folder=out / "fit")
        # All processes hold the same router by now.
        if is_first():
            icr.save_pretrained(out)
        wait()
        message = f"router saved to {out}"
    (out / "fit" / TRUNK_FILE).unlink(missing_ok=True)  # as large as the tokens are many
    console.print(message, markup=False)
    if is_new:
        ending.show(out, Decoder.of(base, tokenizer), sources, config, n_check)
        command = ending.next_command(out, model, data, tasks)
        console.print(f"next: {command}", markup=False, highlight=False, soft_wrap=True)
    return icr


def _is_saved(out: Path) -> bool:
    """Whether a folder holds a finished router."""
    return (out / "config.json").exists()


def show_plan(
    model: Backbone, data: str, tasks: Sequence[str], config: FitConfig, tflops: float
) -> None:
    """Prints what a fit would take; no weights are read."""
    sources = load_tasks(tasks, data)
    skeleton, tokenizer = load_skeleton(model.name)
    # A fit to be planned is a large one, and those run on accelerators.
    planned = plan.plan_fit(skeleton, tokenizer, sources, config, torch.bfloat16)
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
        "memory, in bfloat16 as on accelerators": memory,
        "disk": plan.listed(planned.disk, plan.size),
        f"time at {tflops:g} TFLOP/s": f"{total_time}: {plan.listed(seconds, plan.hours)}",
    }
    text = "\n".join(f"{name}: {value}" for name, value in lines.items())
    console.print(text, markup=False, highlight=False)


def _texts_by_task(planned: plan.Plan, title: str) -> Table:
    """How much text of each task a fit would read."""
    columns = ("task", "prompts", "their tokens", "queries", "their tokens")
    by_task = Table(*columns, title=title)
    for task, prompts in planned.prompts.items():
        queries = planned.queries[task]
        counts = (prompts.count, prompts.tokens, queries.count, queries.tokens)
        by_task.add_row(task, *(f"{count:,}" for count in counts))
    return by_task
