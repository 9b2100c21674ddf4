"""What a method learned, as a folder that others can take up."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icrouting.decoder.decoder import Decoder
from icrouting.methods.base import Method
from icrouting.methods.icr import IcrGated
from icrouting.methods.regimes import ONCE
from icrouting.methods.registry import LEARNING
from icrouting.methods.settings import Settings
from icrouting.runtime.checks import check_same, known, read
from icrouting.runtime.storage import load_json, load_tensors, save_json, save_tensors, unshared

CONFIG, TENSORS = "method.json", "method.safetensors"


@dataclass(frozen=True)
class Saved:
    """The content of method.json: what was learned, with which settings, and on what it depends."""

    method: str
    settings: dict[str, Any]
    model: str
    fingerprint: str
    depends_on: str
    sources: list[str]
    tried: list[dict[str, Any]]
    cost: dict[str, int | float]
    tensors_sha256: str


def save_method(method: Method, folder: str | Path) -> None:
    """Writes what a fitted method learned, with the settings and the model that it is for.

    ValueError for a method that learned nothing, or one thing per task: then save `method.on(task)`.
    """
    folder = Path(folder)
    if not (learned := method.tensors()):
        raise ValueError(
            f"{method.name} holds nothing to save: name its tensors in `learned`, and of a method fitted on each task, "
            "save `method.on(task)`"
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / TENSORS, unshared(learned))
    described = Saved(
        method=method.name.removesuffix(ONCE),
        settings=asdict(method.settings),
        model=str(method.model.config.name_or_path),
        fingerprint=method.decoder.fingerprint,
        depends_on=method.depends_on(),
        sources=[task.name for task in method.sources],
        tried=method.tried,
        cost=method.cost,
        tensors_sha256=_digest(folder),
    )
    save_json(folder / CONFIG, asdict(described))


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()


def load_method(
    folder: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Method:
    """Returns a saved method on its model; ValueError for a damaged folder, another model or another encoder."""
    folder = Path(folder)
    if not all((folder / name).exists() for name in (CONFIG, TENSORS)):
        raise ValueError(
            f"{folder} holds no saved method: expected {CONFIG} and {TENSORS}, see `save_method`"
        )
    digest = _digest(folder)
    found = read(
        Saved, {"tensors_sha256": digest, **load_json(folder / CONFIG)}
    )  # an earlier version kept none
    if found.tensors_sha256 != digest:
        raise ValueError(
            f"{folder / TENSORS} is damaged: its sha256 is not the one in {CONFIG}; save the method again"
        )
    decoder = Decoder.of(model, tokenizer)
    decoder.check_fitted_on(str(folder), found.model, found.fingerprint)
    kind = known("method", found.method, {kind.name: kind for kind in (*LEARNING, IcrGated)})
    method = kind(read(Settings, found.settings))
    method.decoder = decoder
    method.sources = ()
    method.tried, method.cost = found.tried, found.cost
    method.restore(load_tensors(folder / TENSORS)[0])
    check_same(str(folder), found.depends_on, method.depends_on())
    return method
