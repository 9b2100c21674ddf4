"""What a method learned, as a folder that others can take up."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icrouting.decoder.decoder import Decoder
from icrouting.methods.base import Method
from icrouting.methods.batch_calibration import IcrSafe
from icrouting.methods.fits import Fit
from icrouting.methods.icr import IcrGated
from icrouting.methods.regimes import ONCE
from icrouting.methods.registry import LEARNING
from icrouting.methods.settings import Settings
from icrouting.runtime.checks import check_same, known, read
from icrouting.runtime.defaults import usual_defaults
from icrouting.runtime.storage import load_json, load_tensors, save_json, save_tensors, unshared
from icrouting.tasks.task import Task, TaskSpec, digest_of_template

CONFIG = "method.json"
TENSORS = "method.safetensors"


@dataclass(frozen=True)
class Saved:
    """The content of method.json.

    That is what was learned, with which settings, on which model, and on what else it depends.
    """

    method: str
    settings: dict[str, Any]
    model: str
    fingerprint: str
    base_weights: dict[str, str]
    depends_on: str
    sources: list[str]
    tried: list[dict[str, Any]]
    cost: dict[str, int | float]
    tensors_sha256: str
    specs: list[TaskSpec]
    # Of the tokenizer that worded the sources' chats; None without chats, and in earlier versions.
    chat_template: str | None


def save_method(method: Method, folder: str | Path) -> None:
    """Writes what a fitted method learned, with the settings and the model that it is for.

    Args:
        method: what was fitted.
        folder: where to; made where it is not there.

    Raises:
        ValueError: the method learned nothing, or one thing per task: then save `method.on(task)`.
    """
    folder = Path(folder)
    if not method.tensors():
        raise ValueError(
            f"{method.name} holds nothing to save: name its tensors in `learned`, and of a method "
            "fitted on each task, save `method.on(task)`"
        )
    fit = method.in_force()
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / TENSORS, unshared(fit.tensors))
    saved = Saved(
        # Of its kind: the regime decides what is learned from, not what is done with it.
        method=method.name.removesuffix(ONCE),
        settings=asdict(method.settings),
        model=str(method.model.config.name_or_path),
        fingerprint=method.decoder.fingerprint,
        base_weights=method.decoder.base_weights,
        depends_on=method.depends_on(),
        sources=[task.name for task in method.sources],
        tried=fit.tried,
        cost=fit.cost,
        tensors_sha256=_digest(folder),
        specs=[task.spec for task in method.sources],
        chat_template=_template_of(method.sources, method.decoder.tokenizer),
    )
    content = asdict(saved)
    # What was learned from no task has none to tell of, as in an earlier version.
    if not saved.specs:
        del content["specs"]
    if saved.chat_template is None:
        del content["chat_template"]
    save_json(folder / CONFIG, content)


@usual_defaults()
def load_method(
    folder: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Method:
    """Returns a saved method on its model.

    Args:
        folder: where `save_method` wrote it.
        model: the model that it was fitted on.
        tokenizer: its tokenizer.

    Raises:
        ValueError: a damaged folder, another model, another encoder or another chat template.
    """
    folder = Path(folder)
    saved = read_saved(folder)
    decoder = Decoder.of(model, tokenizer)
    decoder.check_fitted_on(str(folder), saved.model, saved.fingerprint, saved.base_weights)
    if saved.chat_template not in (None, digest_of_template(tokenizer)):
        raise ValueError(
            f"{folder} was learned from chats that another chat template worded: load it with the "
            "tokenizer it was fitted with, or set that `chat_template`"
        )
    # Those with a router are not LEARNING's: they have no regimes to choose from.
    kinds = {kind.name: kind for kind in (*LEARNING, IcrGated, IcrSafe)}
    kind = known("method", saved.method, kinds)
    method = kind(read(Settings, saved.settings))
    tensors, _ = load_tensors(folder / TENSORS)
    # The rows that it was learned from are elsewhere, and answering needs none.
    sources = [Task(spec, (), ()) for spec in saved.specs]
    method.take(Fit(tensors, saved.tried, saved.cost), decoder, sources)
    # Only with its tensors in place does a method know whether it reads by an encoder.
    check_same(str(folder), saved.depends_on, method.depends_on())
    return method


def read_saved(folder: Path) -> Saved:
    """Returns what a folder says of its tensors; ValueError if it is damaged or no method's."""
    if not all((folder / name).exists() for name in (CONFIG, TENSORS)):
        raise ValueError(
            f"{folder} holds no saved method: expected {CONFIG} and {TENSORS}, see `save_method`"
        )
    # The two files are written one after the other; a kill in between leaves no pair.
    digest = _digest(folder)
    # An earlier version kept no digest, and nothing of the model's weights or of how tasks read.
    content = {"tensors_sha256": digest, "base_weights": {}, "specs": [], "chat_template": None}
    content |= load_json(folder / CONFIG)
    saved = read(Saved, content)
    if saved.tensors_sha256 != digest:
        raise ValueError(
            f"{folder / TENSORS} is damaged: its sha256 is not the one in {CONFIG}; "
            "save the method again"
        )
    return saved


def _template_of(sources: Sequence[Task], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns digits that identify the template of the sources' chats; None where none is one."""
    if not any(task.spec.chat for task in sources):
        return None
    return digest_of_template(tokenizer)


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
