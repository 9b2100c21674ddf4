"""The artifact: a folder of JSON and safetensors that explains itself.

It refuses what it is not for, and what is damaged.
"""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import save as serialize
from torch import Tensor

from icrouting.config import EARLIER, FitConfig
from icrouting.decoder.identity import read_weight
from icrouting.routing.card import model_card
from icrouting.routing.description import Description
from icrouting.routing.gate import GateNumbers, PromptGate
from icrouting.routing.ownership import (
    CALIBRATION,
    CARD,
    CONFIG,
    METHOD,
    N_DIGITS,
    WEIGHTS,
    check_place,
)
from icrouting.routing.pids import PIDs, check_layers
from icrouting.routing.router import Router
from icrouting.runtime.checks import first_line, read
from icrouting.runtime.defaults import usual_defaults
from icrouting.runtime.storage import load_json, load_tensors, save_json, save_tensors

FORMAT_VERSION = 1
# What the weights mean; a file that says anything else was written by another version.
_MEANING = {
    "method": METHOD,
    "format_version": FORMAT_VERSION,
    "site": (
        "query and key projections before rotary embedding, "
        "after the family's own norm if it has one"
    ),
    "scale": "logits = scaling * q.k + gate * (Q U_q) diag(alpha) (K U_k)^T, the bias not scaled",
}
_PID_BASES = ("query_pids", "key_pids")
_PID_NUMBERS = ("query_std", "key_std", "query_explained", "key_explained")
_PID_TENSORS = _PID_BASES + _PID_NUMBERS


_GATE_TENSOR = "gate.states"


def save(
    folder: Path,
    description: Description,
    pids: PIDs,
    router: Router,
    source: Path | None = None,
    gate: PromptGate | None = None,
) -> None:
    """Writes an artifact; a kill leaves the old router, the new one or none, and no mixture.

    A card that names these weights, in `source` or in the folder itself, is kept as it stands, with
    what it records.

    Raises:
        ValueError: the folder holds something else under an artifact's names, or the gate is not
            that of the description's tasks; the folder is left alone.
    """
    check_place(folder)
    if gate is not None:
        _check_sources(gate.numbers, description)
    folder.parent.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(pids, router)
    if gate is not None:
        tensors[_GATE_TENSOR] = gate.states.contiguous()
    sha256 = hashlib.sha256(serialize(tensors)).hexdigest()
    config = {**_MEANING, "weights_sha256": sha256, **dataclasses.asdict(description)}
    # What an earlier version wrote is written as it was.
    for name, value in EARLIER.items():
        if config["fit"][name] == value:
            del config["fit"][name]
    if description.sources is None:
        del config["sources"]
    else:
        config["sources"] = [source.as_kept() for source in description.sources]
    if gate is not None:
        config["gate"] = dataclasses.asdict(gate.numbers)
    if not description.base_weights:
        del config["base_weights"]
    if description.origin is None:
        del config["origin"]
    if description.chat_template is None:
        del config["chat_template"]
    # The gate has no part in what a card records: results are of the router alone.
    short_digest = digest(pids, router)
    folders = [folder] if source is None else [source, folder]
    card = _card_that_names(short_digest, folders)
    if card is None:
        card = model_card(description, short_digest).encode()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as scratch:
        # Made inside, since a temporary folder itself can be read by its owner alone.
        artifact = Path(scratch, "router")
        artifact.mkdir()
        save_tensors(artifact / WEIGHTS, tensors)
        save_json(artifact / CONFIG, {**config, "checksum": _checksum(config)})
        (artifact / CARD).write_bytes(card)
        _move(artifact, folder)


def _move(artifact: Path, folder: Path) -> None:
    """Moves an artifact into its folder, which may hold an older one and a fit's results."""
    if not folder.exists():
        artifact.rename(folder)
        return
    old_config = folder / CONFIG
    new_config = artifact / CONFIG
    if old_config.exists() and old_config.read_bytes() != new_config.read_bytes():
        # Without it the folder is no router, so that halves of two do not pass for one.
        old_config.unlink()
    for name in (WEIGHTS, CARD, CONFIG):
        (artifact / name).replace(folder / name)


def _card_that_names(digest: str, folders: Sequence[Path]) -> bytes | None:
    """Returns the first card that names a router's weights, None where there is none."""
    for folder in folders:
        file = folder / CARD
        if not file.is_file():
            continue
        card = file.read_bytes()
        if digest.encode() in card:
            return card
    return None


def _tensors(pids: PIDs, router: Router) -> dict[str, Tensor]:
    tensors = {f"pids.{name}": getattr(pids, name) for name in _PID_TENSORS}
    tensors |= {f"router.{name}": value for name, value in router.state_dict().items()}
    # Whatever device it is used on, a router has the same bytes, and so the same digest.
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def digest(pids: PIDs, router: Router) -> str:
    """Returns 16 hex digits that identify an artifact's weights."""
    return hashlib.sha256(serialize(_tensors(pids, router))).hexdigest()[:N_DIGITS]


def _checksum(config: dict[str, Any]) -> str:
    content = {key: value for key, value in config.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def locate(name: str, revision: str | None, token: str | bool | None = None) -> Path:
    """Returns the folder of an artifact, downloaded if `name` is a hub id."""
    if Path(name).is_dir():
        return Path(name)
    # The card is not read, but goes along when the router is saved again.
    files = [CONFIG, WEIGHTS, CARD, CALIBRATION]
    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"no router at {name!r}: expected a folder or a hub id; {first_line(error)}"
        ) from error


@usual_defaults()
def load(folder: Path) -> tuple[Description, PIDs, Router, PromptGate | None]:
    """Returns an artifact's parts; the last is None where it has no gate.

    ValueError if a file is missing or damaged, newer, or its shapes do not match.
    """
    config_file = folder / "config.json"
    weights_file = folder / "model.safetensors"
    if not config_file.is_file():
        raise ValueError(f"{folder} is no router: config.json is missing")
    config = load_json(config_file)
    try:
        description = _description(config)
        gate_numbers = _gate_numbers(config, description)
    # What the parser still took may be nested too deep for whatever looks at it next.
    except RecursionError as error:
        raise ValueError(
            f"{config_file} is damaged: it is nested too deep; fetch it again"
        ) from error
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from error
    if not weights_file.is_file():
        raise ValueError(f"{folder} is no router: model.safetensors is missing")
    sha256 = hashlib.sha256(weights_file.read_bytes()).hexdigest()
    expected = config.get("weights_sha256")
    if sha256 != expected:
        raise ValueError(
            f"{weights_file} is damaged: its sha256 is {sha256[:12]}…, not {expected!r:.14}…; "
            "fetch it again"
        )
    tensors, _ = load_tensors(weights_file)
    _check_tensors(tensors, description, gate_numbers, weights_file)
    pids, router = _assemble(tensors, description)
    if gate_numbers is None:
        return description, pids, router, None
    return description, pids, router, PromptGate(tensors[_GATE_TENSOR], gate_numbers)


def _description(config: dict[str, Any]) -> Description:
    """Returns what config.json describes; ValueError says what it is not."""
    if config.get("method") != METHOD:
        raise ValueError('this does not describe an icrouting artifact: expected "method": "icr"')
    format_version = config.get("format_version")
    # The format comes first: what a newer one holds cannot be judged here. True is no version,
    # though it equals 1.
    if type(format_version) is not int or format_version != FORMAT_VERSION:
        raise ValueError(
            f"this is of format {format_version!r}, this version reads {FORMAT_VERSION}: "
            "update icrouting"
        )
    if config.get("checksum") != _checksum(config):
        raise ValueError(
            "this is damaged or was edited: its checksum does not match; fetch it again"
        )
    content = dict(config)
    for name in ("checksum", "weights_sha256", "gate"):
        content.pop(name, None)
    meaning = {name: content.pop(name, None) for name in _MEANING}
    if meaning != _MEANING:
        raise ValueError(f"expected its weights to mean {_MEANING}: another version wrote it")
    # An earlier version did not keep them.
    content.setdefault("base_weights", {})
    if isinstance(content.get("fit"), dict):
        content["fit"] = {**EARLIER, **content["fit"]}
    # By itself first, so that an error names the setting alone.
    fit = read(FitConfig, content.get("fit"))
    # Routers of 0.1 know their sources' names and sizes alone, in `tasks`.
    content.setdefault("sources", None)
    content.setdefault("origin", None)
    content.setdefault("chat_template", None)
    description = read(Description, content)
    check_layers(description.layers, description.n_layers)
    for text in description.base_weights.values():
        read_weight(text)
    if fit.layers not in (None, description.layers):
        raise ValueError(f"its layers {description.layers} are not those of the fit, {fit.layers}")
    return description


def _gate_numbers(config: dict[str, Any], description: Description) -> GateNumbers | None:
    """Returns what config.json says of a gate, None where there is none; ValueError if damaged."""
    if "gate" not in config:
        return None
    numbers = read(GateNumbers, config["gate"])
    _check_sources(numbers, description)
    return numbers


def _check_sources(numbers: GateNumbers, description: Description) -> None:
    """ValueError where a gate has not as many sources as the router has tasks."""
    n_sources = len(description.tasks)
    if len(numbers.rows) != n_sources or len(numbers.limits) != n_sources:
        raise ValueError(
            f"its gate should have rows and a limit for each of {n_sources} sources, "
            f"has {len(numbers.rows)} and {len(numbers.limits)}"
        )


def _shapes(description: Description, gate: GateNumbers | None) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor, from the description alone.

    Nothing is allocated for a size that is a lie.
    """
    n_routed = len(description.layers)
    rank = description.fit.rank
    hidden_width = description.fit.hidden_width
    query_width = description.n_heads * description.head_dim
    key_width = description.n_kv_heads * description.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "pids.query_pids": (n_routed, query_width, rank),
        "pids.key_pids": (n_routed, key_width, rank),
    }
    for name in _PID_NUMBERS:
        shapes[f"pids.{name}"] = (n_routed, rank)
    n_outputs = {"alpha": n_routed * rank, "gamma": n_routed * description.n_heads}
    for part, n_out in n_outputs.items():
        # A perceptron's linear layers; its activation, 1, has no weights.
        shapes[f"router.{part}.0.weight"] = (hidden_width, description.n_features)
        shapes[f"router.{part}.0.bias"] = (hidden_width,)
        shapes[f"router.{part}.2.weight"] = (n_out, hidden_width)
        shapes[f"router.{part}.2.bias"] = (n_out,)
    if gate is not None:
        shapes[_GATE_TENSOR] = (sum(gate.rows), gate.hidden_size)
    return shapes


def _check_tensors(
    tensors: dict[str, Tensor],
    description: Description,
    gate: GateNumbers | None,
    weights: Path,
) -> None:
    """Checks that tensors are those that a description promises, and their values possible."""
    shapes = _shapes(description, gate)
    expected = {name: (shape, torch.float32) for name, shape in shapes.items()}
    stored = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
    # Over both, since a tensor may be missing or too much.
    for name in sorted(stored.keys() | expected.keys()):
        if stored.get(name) != expected.get(name):
            raise ValueError(
                f"{weights}: {name!r} should be {expected.get(name)}, is {stored.get(name)}"
            )
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{weights}: {name} holds NaN or infinity")
        # Whitened directions are divided by it.
        if name.endswith("_std") and value.min() <= 0:
            raise ValueError(f"{weights}: {name} holds a deviation that is not positive")


def _assemble(tensors: dict[str, Tensor], description: Description) -> tuple[PIDs, Router]:
    """Returns directions and router, ready for use, from checked tensors."""
    fit = description.fit
    bases_and_numbers = {name: tensors[f"pids.{name}"] for name in _PID_TENSORS}
    pids = PIDs(layers=description.layers, basis=fit.basis, **bases_and_numbers)
    router = Router(
        description.n_features,
        len(description.layers),
        description.n_heads,
        fit.rank,
        fit.hidden_width,
    )
    state = {}
    for name, value in tensors.items():
        if name.startswith("router."):
            state[name.removeprefix("router.")] = value
    router.load_state_dict(state)
    return pids, router.eval().requires_grad_(False)
