"""The artifact: a folder of JSON and safetensors that explains itself and refuses what it is not for."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from pydantic import PositiveInt
from safetensors.torch import save as serialize
from torch import Tensor

from icrouting.config import HIDDEN, FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.routing.features import Features
from icrouting.routing.pids import PIDs, check_layers
from icrouting.routing.router import Router
from icrouting.runtime.checks import first_line, read
from icrouting.runtime.pages import render
from icrouting.runtime.storage import load_json, load_tensors, save_json, save_tensors
from icrouting.tasks.task import Task, rows_digest

FORMAT_VERSION = 1
_MEANING = {
    "method": "icr",
    "format_version": FORMAT_VERSION,
    "site": "query and key projections before rotary embedding, after the family's own norm if it has one",
    "scale": "logits = scaling * q.k + gate * (Q U_q) diag(alpha) (K U_k)^T, the bias not scaled",
}
_PID_TENSORS = (
    "query_pids",
    "key_pids",
    "query_std",
    "key_std",
    "query_explained",
    "key_explained",
)


@dataclass(frozen=True)
class Description:
    """All there is to know about an artifact but its weights.

    `encoder` is the digest of the sentence encoder's weights, or "hidden" for the model's own states; `fingerprint`
    and `rows` are those of the base model's weights and of the source tasks' rows; `tasks` counts their training
    rows; `layers` are the routed ones, from 0.
    """

    base_model: str
    model_type: str
    fingerprint: str
    n_layers: PositiveInt
    n_heads: PositiveInt
    n_kv_heads: PositiveInt
    head_dim: PositiveInt
    layers: tuple[int, ...]
    encoder: str
    n_features: PositiveInt
    tasks: dict[str, int]
    rows: str
    fit: FitConfig
    versions: dict[str, str]


def describe(
    decoder: Decoder,
    tasks: Sequence[Task],
    fit: FitConfig,
    layers: tuple[int, ...],
    features: Features,
) -> Description:
    """Returns the description of a router fitted on a decoder."""
    model = decoder.model
    return Description(
        base_model=model.config.name_or_path or type(model).__name__,
        model_type=decoder.stack.config.model_type,
        fingerprint=decoder.fingerprint,
        **vars(decoder.dims),
        layers=layers,
        encoder=features.fingerprint,
        n_features=features.n_features,
        tasks={task.name: len(task.train) for task in tasks},
        rows=rows_digest(tasks),
        fit=fit,
        versions={name: version(name) for name in ("icrouting", "torch", "transformers")},
    )


def save(
    folder: Path, description: Description, pids: PIDs, router: Router, source: Path | None = None
) -> None:
    """Writes an artifact; a kill between its two files leaves a folder that `load` refuses.

    A card that names these weights, in `source` or in the folder itself, is kept as it stands, with what it records.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(pids, router)
    save_tensors(folder / "model.safetensors", tensors)
    sha256 = hashlib.sha256(serialize(tensors)).hexdigest()
    config = {**_MEANING, "weights_sha256": sha256, **dataclasses.asdict(description)}
    save_json(folder / "config.json", {**config, "checksum": _checksum(config)})
    known = sha256[:16]
    cards = [where / "README.md" for where in (source, folder) if where]
    kept = next(
        (
            text
            for card in cards
            if card.is_file() and known.encode() in (text := card.read_bytes())
        ),
        None,
    )
    (folder / "README.md").write_bytes(kept or model_card(description, known).encode())


def model_card(description: Description, digest: str) -> str:
    """Returns the text of a router's README.md; `digest` identifies its weights."""
    # The hub refuses a card whose front matter names anything but one of its ids.
    is_hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", description.base_model)
    return render(
        "routing/templates/card.md.j2",
        {},
        **vars(description),
        digest=digest,
        is_hub_id=is_hub_id,
        hidden=HIDDEN,
    )


def with_results(card: str, results: str) -> str:
    """Returns a card whose section "Results" holds `results` alone, at its end if it had none."""
    section = f"## Results\n\n{results.strip()}\n"
    found = re.search(r"^## Results$.*?(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    if found is None:
        return f"{card.rstrip()}\n\n{section}"
    rest = card[found.end() :]
    return card[: found.start()] + section + ("\n" + rest if rest else "")


def _tensors(pids: PIDs, router: Router) -> dict[str, Tensor]:
    tensors = {f"pids.{name}": getattr(pids, name) for name in _PID_TENSORS}
    tensors |= {f"router.{name}": value for name, value in router.state_dict().items()}
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def digest(pids: PIDs, router: Router) -> str:
    """Returns 16 hex digits that identify an artifact's weights."""
    return hashlib.sha256(serialize(_tensors(pids, router))).hexdigest()[:16]


def _checksum(config: dict[str, Any]) -> str:
    content = {key: value for key, value in config.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def locate(name: str, revision: str | None, token: str | bool | None = None) -> Path:
    """Returns the folder of an artifact, downloaded if `name` is a hub id."""
    if Path(name).is_dir():
        return Path(name)
    files = ["config.json", "model.safetensors", "README.md"]
    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"no router at {name!r}: expected a folder or a hub id; {first_line(error)}"
        ) from error


def load(folder: Path) -> tuple[Description, PIDs, Router]:
    """Returns an artifact's parts; ValueError if a file is missing or damaged, newer, or its shapes do not match."""
    file, weights = folder / "config.json", folder / "model.safetensors"
    if not file.is_file():
        raise ValueError(f"{folder} is no router: config.json is missing")
    config = load_json(file)
    try:
        description = _description(config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if not weights.is_file():
        raise ValueError(f"{folder} is no router: model.safetensors is missing")
    found, expected = hashlib.sha256(weights.read_bytes()).hexdigest(), config.get("weights_sha256")
    if found != expected:
        raise ValueError(
            f"{weights} is damaged: its sha256 is {found[:12]}…, not {expected!r:.14}…; fetch it again"
        )
    return description, *_assemble(load_tensors(weights)[0], description, weights)


def _description(config: dict[str, Any]) -> Description:
    if config.get("method") != "icr":
        raise ValueError('this does not describe an icrouting artifact: expected "method": "icr"')
    found = config.get("format_version")
    if type(found) is not int or found != FORMAT_VERSION:
        raise ValueError(
            f"this is of format {found!r}, this version reads {FORMAT_VERSION}: update icrouting"
        )
    if config.get("checksum") != _checksum(config):
        raise ValueError(
            "this is damaged or was edited: its checksum does not match; fetch it again"
        )
    content = {
        name: value for name, value in config.items() if name not in ("checksum", "weights_sha256")
    }
    if {name: content.pop(name, None) for name in _MEANING} != _MEANING:
        raise ValueError(f"expected its weights to mean {_MEANING}: another version wrote it")
    fit, description = read(FitConfig, content.get("fit")), read(Description, content)
    check_layers(description.layers, description.n_layers)
    if fit.layers not in (None, description.layers):
        raise ValueError(f"its layers {description.layers} are not those of the fit, {fit.layers}")
    return description


def _shapes(description: Description) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, from the description alone: nothing is allocated for a size that is a lie."""
    n_routed, fit = len(description.layers), description.fit
    shapes: dict[str, tuple[int, ...]] = {
        f"pids.{name}": (n_routed, fit.rank) for name in _PID_TENSORS[2:]
    }
    shapes["pids.query_pids"] = (n_routed, description.n_heads * description.head_dim, fit.rank)
    shapes["pids.key_pids"] = (n_routed, description.n_kv_heads * description.head_dim, fit.rank)
    for part, n_out in (("alpha", n_routed * fit.rank), ("gamma", n_routed * description.n_heads)):
        for layer, shape in (
            (0, (fit.hidden_width, description.n_features)),
            (2, (n_out, fit.hidden_width)),
        ):
            shapes |= {
                f"router.{part}.{layer}.weight": shape,
                f"router.{part}.{layer}.bias": shape[:1],
            }
    return shapes


def _assemble(
    tensors: dict[str, Tensor], description: Description, weights: Path
) -> tuple[PIDs, Router]:
    expected = {name: (shape, torch.float32) for name, shape in _shapes(description).items()}
    found = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{weights}: {name!r} should be {expected.get(name)}, is {found.get(name)}"
            )
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{weights}: {name} holds NaN or infinity")
        if name.endswith("_std") and value.min() <= 0:
            raise ValueError(f"{weights}: {name} holds a deviation that is not positive")
    fit, n_routed = description.fit, len(description.layers)
    router = Router(
        description.n_features, n_routed, description.n_heads, fit.rank, fit.hidden_width
    )
    router.load_state_dict(
        {name.removeprefix("router."): tensors[name] for name in tensors if name[0] == "r"}
    )
    parts = {name: tensors[f"pids.{name}"] for name in _PID_TENSORS}
    return PIDs(layers=description.layers, basis=fit.basis, **parts), router.eval().requires_grad_(
        False
    )
