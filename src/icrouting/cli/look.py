"""What `icr generate` and `icr inspect` do, once their arguments are parsed."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from icrouting.cli.filling import filled
from icrouting.cli.loading import base_of_router, console, load
from icrouting.decoder.backbone import Backbone
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import device_of
from icrouting.decoder.texts import prompts_of
from icrouting.icr import InContextRouter
from icrouting.routing import inspection
from icrouting.runtime.pages import counted
from icrouting.runtime.storage import save_text
from icrouting.tasks.task import LabelScoring


def generate(
    router: str,
    prompt: str | None,
    task: str | None,
    fields: Sequence[str],
    model: Backbone,
    strength: float,
    max_new_tokens: int,
    *,
    chat: bool = False,
    system: str = "",
) -> None:
    """Prints a prompt's continuation with and without routing."""
    icr = InContextRouter.from_pretrained(router)
    asked = filled(prompt, task, fields, icr.description.sources, chat=chat, system=system).prompt
    base, tokenizer = load(base_of_router(model, icr))
    (whole_prompt,) = prompts_of([asked], tokenizer)
    (tokens,) = Decoder.of(base, tokenizer).tokenize([whole_prompt.text])
    input_ids = torch.tensor([tokens], device=device_of(base))
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def continued(n_tokens: int) -> torch.Tensor:
        return base.generate(  # pyright: ignore[reportCallIssue]
            **inputs, max_new_tokens=n_tokens, do_sample=False
        )

    def panel(title: str) -> Panel:
        continued(1)  # warms up, so that times compare
        started = time.monotonic()
        output = continued(max_new_tokens)
        seconds = time.monotonic() - started
        new_tokens = output[0, len(tokens) :]
        words = Text(str(tokenizer.decode(new_tokens, skip_special_tokens=True)))
        return Panel(
            words, title=f"{title}: {counted(len(new_tokens), 'token')} in {seconds:.1f} s"
        )

    # Before the router is attached, which would route this one too.
    plain = panel("zero-shot")
    # What is looked at is the router, whether its gate would let the prompt in or not.
    with icr.attached(base, tokenizer, strength=strength, gate=False) as routed:
        beside = Table.grid(Column(ratio=1), Column(ratio=1), expand=True)
        beside.add_row(plain, panel(f"routed, strength {strength:g}"))
        console.print(beside)
        console.print(routed.effect([asked]), markup=False, highlight=False)


def inspect(
    router: str,
    prompt: str | None,
    task: str | None,
    fields: Sequence[str],
    model: Backbone,
    options: Sequence[str],
    strength: float,
    out: Path,
    *,
    chat: bool = False,
    system: str = "",
    label_scoring: LabelScoring | None = None,
) -> None:
    """Prints what a router does to one prompt and writes it as a page."""
    icr = InContextRouter.from_pretrained(router)
    asked = filled(prompt, task, fields, icr.description.sources, chat=chat, system=system)
    model = base_of_router(model, icr)
    with icr.attached(*load(model), strength=strength, gate=False) as routed:
        seen = inspection.inspect_prompt(
            routed,
            asked.prompt,
            options or asked.options or None,
            label_scoring=label_scoring or asked.label_scoring,
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    save_text(out, inspection.html(seen, f"{model}, router {router} ({icr.digest()})"))
    text = inspection.text(seen)
    console.print(f"{text}\npage: {out}", soft_wrap=True, markup=False, highlight=False)
