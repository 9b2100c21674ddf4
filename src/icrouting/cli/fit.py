"""What `icr fit` does, once its arguments are parsed."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from icrouting.cli.loading import console, load, load_tasks
from icrouting.cli.options import Backbone
from icrouting.config import FitConfig
from icrouting.decoder.identity import fingerprint
from icrouting.decoder.loading import default_dtype, load_skeleton
from icrouting.fitting import plan
from icrouting.fitting.trunk import TRUNK_FILE
from icrouting.icr import InContextRouter
from icrouting.runtime.processes import first_one_first, is_first, wait
from icrouting.tasks.task import rows_digest


def fit(
    out: Path, model: Backbone, data: str, tasks: Sequence[str], config: FitConfig
) -> InContextRouter:
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
            raise ValueError(
                f"{out} holds a router of other settings, model or data: choose another folder with --out"
            )
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


def show_plan(
    model: Backbone, data: str, tasks: Sequence[str], config: FitConfig, tflops: float
) -> None:
    """Prints what a fit would take; no weights are read."""
    sources, (skeleton, tokenizer) = load_tasks(tasks, data), load_skeleton(model.model)
    planned = plan.plan_fit(skeleton, tokenizer, sources, config, torch.bfloat16)
    by_task = Table(
        "task", "prompts", "their tokens", "queries", "their tokens", title=f"fit on {model}"
    )
    for task, texts in planned.prompts.items():
        counts = (
            texts.count,
            texts.tokens,
            planned.queries[task].count,
            planned.queries[task].tokens,
        )
        by_task.add_row(task, *(f"{count:,}" for count in counts))
    console.print(by_task)
    seconds = planned.seconds(tflops * 1e12)
    unknown = "" if "weights" in planned.memory else "; weights not reckoned, being quantised"
    lines = {
        "tokens": "by the model's tokenizer"
        if tokenizer
        else f"no tokenizer: {plan.CHARS_PER_TOKEN} characters each",
        "parameters": f"base model {planned.n_parameters:,}, router {planned.n_router:,}",
        "routed layers": f"{len(planned.layers)} from layer {planned.layers[0]} on, rank {config.rank}",
        "memory, in bfloat16 as on accelerators": plan.listed(planned.memory, plan.size) + unknown,
        "disk": plan.listed(planned.disk, plan.size),
        f"time at {tflops:g} TFLOP/s": f"{plan.hours(sum(seconds.values()))}: {plan.listed(seconds, plan.hours)}",
    }
    console.print(
        "\n".join(f"{name}: {said}" for name, said in lines.items()), markup=False, highlight=False
    )
