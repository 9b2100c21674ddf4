"""What a method learned, as a folder that others can take up."""

import dataclasses
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icrouting.checks import read
from icrouting.config import Settings
from icrouting.methods.base import Method
from icrouting.methods.regimes import ONCE
from icrouting.models import fingerprint
from icrouting.storage import load_json, load_tensors, save_json, save_tensors
from icrouting.tasks import known

CONFIG, TENSORS = "method.json", "method.safetensors"


def save_method(method: Method, folder: Path) -> None:
    """Writes what a fitted method learned, with the settings and the model that it is for.

    ValueError for a method that learned nothing, or one thing per task: then save `method.on(task)`.
    """
    if not (learned := method.tensors()):
        raise ValueError(
            f"{method.name} holds nothing to save: of a method fitted on each task, save `method.on(task)`"
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / TENSORS, {name: tensor.contiguous() for name, tensor in learned.items()})
    described = {
        "method": method.name.removesuffix(ONCE),
        "settings": dataclasses.asdict(method.settings),
        "model": method.model.config.name_or_path,
        "fingerprint": fingerprint(method.model),
        "sources": [task.name for task in method.sources],
        "tried": method.tried,
        "cost": method.cost,
    }
    save_json(folder / CONFIG, described)


def load_method(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Method:
    """Returns a saved method on its model; ValueError for a damaged folder or another model."""
    from icrouting.methods import LEARNING

    found = load_json(folder / CONFIG)
    if found["fingerprint"] != (own := fingerprint(model)):
        raise ValueError(
            f"{folder} was learned on {found['model']!r} ({found['fingerprint']}), this model is {own}: load that one"
        )
    kind = known("method", found["method"], {kind.name: kind for kind in LEARNING})
    method = kind(read(Settings, found["settings"]))
    method.model, method.tokenizer, method.sources = model, tokenizer, ()
    method.tried, method.cost = found["tried"], found["cost"]
    method.restore(load_tensors(folder / TENSORS)[0])
    return method
