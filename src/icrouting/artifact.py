"""The artifact: a folder of JSON and safetensors that explains itself and refuses what it is not for."""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import save as serialize
from torch import Tensor
from transformers import PreTrainedModel

from icrouting.card import model_card
from icrouting.config import FitConfig
from icrouting.families import decoder_of, dims_of
from icrouting.features import Features
from icrouting.models import fingerprint
from icrouting.pids import PIDs
from icrouting.router import Router
from icrouting.storage import load_json, load_tensors, save_json, save_tensors
from icrouting.tasks import Task, rows_digest

FORMAT_VERSION = 1
_FILES = ("config.json", "model.safetensors", "README.md")
_PID_TENSORS = ("query_pids", "key_pids", "query_std", "key_std", "query_explained", "key_explained")


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
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    layers: tuple[int, ...]
    encoder: str
    n_features: int
    tasks: dict[str, int]
    rows: str
    fit: FitConfig
    versions: dict[str, str]


def describe(
    model: PreTrainedModel,
    tasks: Sequence[Task],
    fit: FitConfig,
    layers: tuple[int, ...],
    features: Features,
) -> Description:
    """Returns the description of a router fitted on `model`."""
    dims, decoder = dims_of(model), decoder_of(model)
    return Description(
        base_model=model.config.name_or_path or type(model).__name__,
        model_type=decoder.config.model_type,
        fingerprint=fingerprint(model),
        n_layers=dims.n_layers,
        n_heads=dims.n_heads,
        n_kv_heads=dims.n_kv_heads,
        head_dim=dims.head_dim,
        layers=layers,
        encoder=features.fingerprint,
        n_features=features.n_features,
        tasks={task.name: len(task.train) for task in tasks},
        rows=rows_digest(tasks),
        fit=fit,
        versions={name: version(name) for name in ("icrouting", "torch", "transformers")},
    )


def save(folder: Path, description: Description, pids: PIDs, router: Router) -> None:
    """Writes an artifact; a kill between its two files leaves a folder that `load` refuses."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "model.safetensors", _tensors(pids, router))
    config = {
        "format_version": FORMAT_VERSION,
        "method": "icr",
        "site": "query and key projections before rotary embedding, after the family's own norm if it has one",
        "scale": "logits = scaling * q.k + gate * (Q U_q) diag(alpha) (K U_k)^T, the bias not scaled",
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        **dataclasses.asdict(description),
    }
    config["checksum"] = _checksum(config)
    save_json(folder / "config.json", config)
    (folder / "README.md").write_text(model_card(description))


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


def locate(name: str, revision: str | None) -> Path:
    """Returns the folder of an artifact, downloaded if `name` is a hub id."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"no router at {name!r}: expected a folder or a hub id; {reason}") from error


def load(folder: Path) -> tuple[Description, PIDs, Router]:
    """Returns the parts of an artifact.

    Raises:
        ValueError: a file is missing or damaged, the format is newer, or shapes do not match.
    """
    config = _read_config(folder)
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise ValueError(f"{folder} is no router: model.safetensors is missing")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if digest != config["weights_sha256"]:
        raise ValueError(
            f"{weights} is damaged: expected sha256 {config['weights_sha256'][:12]}…, got {digest[:12]}…; "
            "fetch it again"
        )
    description = _description(config, folder)
    return description, *_assemble(load_tensors(weights)[0], description, weights)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.exists():
        raise ValueError(f"{folder} is no router: config.json is missing")
    config = load_json(file)
    if config.get("method") != "icr":
        raise ValueError(f'{file} does not describe an icrouting artifact: expected "method": "icr"')
    found = config.get("format_version")
    if found != FORMAT_VERSION:
        raise ValueError(f"{file} is of format {found!r}, this version reads {FORMAT_VERSION}: update icrouting")
    if config.get("checksum") != _checksum(config):
        raise ValueError(f"{file} is damaged or was edited: its checksum does not match; fetch it again")
    return config


def _description(config: dict[str, Any], folder: Path) -> Description:
    names = {field.name for field in dataclasses.fields(Description)}
    envelope = {"format_version", "method", "site", "scale", "weights_sha256", "checksum"}
    fit, settings = config.get("fit", {}), {field.name for field in dataclasses.fields(FitConfig)}
    if odd := sorted((set(config) ^ (names | envelope)) | (set(fit) ^ settings)):
        raise ValueError(f"{folder}/config.json: keys {odd} are unknown or missing: another version wrote it")
    fit = FitConfig(**{**fit, "layers": None if fit["layers"] is None else tuple(fit["layers"])})
    values = {name: config[name] for name in names}
    return Description(**{**values, "fit": fit, "layers": tuple(config["layers"])})


def _assemble(tensors: dict[str, Tensor], description: Description, weights: Path) -> tuple[PIDs, Router]:
    n_routed, rank = len(description.layers), description.fit.rank
    router = Router(description.n_features, n_routed, description.n_heads, rank, description.fit.hidden_width)
    query_width = description.n_heads * description.head_dim
    key_width = description.n_kv_heads * description.head_dim
    expected = {f"router.{name}": tuple(value.shape) for name, value in router.state_dict().items()}
    expected |= {f"pids.{name}": (n_routed, rank) for name in _PID_TENSORS[2:]}
    expected |= {
        "pids.query_pids": (n_routed, query_width, rank),
        "pids.key_pids": (n_routed, key_width, rank),
    }
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        name = wrong[0]
        raise ValueError(f"{weights}: {name} should be {expected.get(name)}, is {found.get(name)}")
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{weights}: {name} holds NaN or infinity")
    router.load_state_dict({name.removeprefix("router."): tensors[name] for name in tensors if name[0] == "r"})
    # A file's tensors are not aligned as fresh ones are, and kernels may round by that.
    parts = {name: tensors[f"pids.{name}"].clone() for name in _PID_TENSORS}
    pids = PIDs(layers=description.layers, basis=description.fit.basis, **parts)
    return pids, router.eval().requires_grad_(False)


def push(
    repo_id: str, description: Description, pids: PIDs, router: Router, *, private: bool, token: str | None
) -> str:
    """Uploads an artifact to the hub and returns its address."""
    api = HfApi(token=token)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        save(Path(scratch), description, pids, router)
        api.upload_folder(repo_id=url.repo_id, folder_path=scratch, allow_patterns=list(_FILES))
    return str(url)
