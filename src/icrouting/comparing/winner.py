"""Winner: the recommended method as a folder, and its answers to new rows."""

import shutil
from pathlib import Path
from typing import Any

from icrouting.comparing.ladder import ICR
from icrouting.icr import InContextRouter
from icrouting.methods.base import Method
from icrouting.methods.named_prompts import UserPrompt
from icrouting.methods.saved import save_method
from icrouting.runtime.storage import save_json
from icrouting.tasks.task import Task

# Says what lies beside it, and that the folder is ours to replace.
NOTE = "winner.json"
_NOTHING_LEARNED = (
    "nothing was learned: ask the model the template behind the context, and score the options"
)
_IN_A_CHAT = (
    "; the template is the user's turn, as the tokenizer's chat template writes it behind the "
    "system turn, and a context has been through the chat template already"
)


def save(folder: Path, method: Method, task: Task, icr: InContextRouter | None) -> None:
    """Writes the recommended method to a folder, in place of an earlier one.

    A router's folder is read by `InContextRouter.from_pretrained`, what another method learned by
    `load_method`. What learns nothing has its prompt alone. winner.json says which it is.

    Args:
        folder: where to.
        method: the method, fitted for the task.
        task: what it was fitted on.
        icr: the router, if one was fitted.

    Raises:
        ValueError: the folder holds something else.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / NOTE).exists():
            raise ValueError(f"{folder} holds no earlier winner: move it, or choose another --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # First, so that a folder that was left half written is known for ours.
    save_json(folder / NOTE, _note(method, task))
    if method.name == ICR:
        assert icr is not None, "ICR has answered by a router"
        icr.save_pretrained(folder)
    elif method.tensors():
        save_method(method, folder)


def _note(method: Method, task: Task) -> dict[str, Any]:
    """What winner.json says."""
    holds = _NOTHING_LEARNED
    if method.name == ICR:
        holds = "a router: InContextRouter.from_pretrained(this folder).attached(model, tokenizer)"
    elif method.tensors():
        holds = "what was learned: load_method(this folder, model, tokenizer)"
    if isinstance(method, UserPrompt):
        spec = method.asked(task).spec
        # What is read once for all examples is a part of the template.
        context = ""
    else:
        spec = task.spec
        # Prompts of one task and seed have one context.
        context = method.prompt(task, task.test[0]).context
    if spec.chat and holds == _NOTHING_LEARNED:
        holds += _IN_A_CHAT
    return {
        "method": method.name,
        "holds": holds,
        "model": str(method.model.config.name_or_path),
        "fingerprint": method.decoder.fingerprint,
        "task": spec.name,
        "template": spec.template,
        "options": list(spec.options),
        "words": {field: dict(texts) for field, texts in spec.words.items()},
        "context": context,
        "label_scoring": spec.label_scoring,
        "chat": spec.chat,
        "system": spec.system,
    }
