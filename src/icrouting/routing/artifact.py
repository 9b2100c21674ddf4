"""The artifact: a folder of JSON and safetensors that explains itself.

It refuses what it is not for, and what is damaged.
"""

import dataclasses
import hashlib
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from pydantic import PositiveInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from icrouting.config import HIDDEN, FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.identity import read_weight
from icrouting.routing.features import Features
from icrouting.routing.pids import PIDs, check_layers
from icrouting.routing.router import Router
from icrouting.routing.sources import Source, sources_of
from icrouting.runtime.checks import first_line, read
from icrouting.runtime.defaults import usual_defaults
from icrouting.runtime.pages import render
from icrouting.runtime.storage import load_json, load_tensors, save_json, save_tensors
from icrouting.tasks.task import Task, rows_digest

FORMAT_VERSION = 1
# What the weights mean; a file that says anything else was written by another version.
_MEANING = {
    "method": "icr",
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
_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_CARD = "README.md"
# Digits of a sha256 that identify a router's weights.
_N_DIGITS = 16
# Answers of a task that a card shows.
_N_ANSWERS = 10


@dataclass(frozen=True)
class Description:
    """All there is to know about an artifact but its weights.

    Attributes:
        base_model: name or path of the model that it was fitted on.
        model_type: what transformers calls its family.
        fingerprint: identifies its weights.
        n_layers: its layers.
        n_heads: its query heads.
        n_kv_heads: its key-value heads.
        head_dim: the width of a head.
        layers: the routed ones, from 0.
        encoder: the digest of the sentence encoder's weights, or "hidden" for the model's own
            states.
        n_features: width of what the router reads.
        tasks: training rows of each source task.
        sources: what is known of each source task; None where an earlier version fitted it.
        rows: identifies the source tasks' rows.
        fit: the settings of the fit.
        versions: of the packages that it was fitted with.
        base_weights: what the model's weights are like, by name (`decoder.identity`); empty in
            routers of earlier versions.
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
    sources: tuple[Source, ...] | None
    rows: str
    fit: FitConfig
    versions: dict[str, str]
    base_weights: dict[str, str]


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
        sources=sources_of(tasks, fit),
        rows=rows_digest(tasks),
        fit=fit,
        versions={name: version(name) for name in ("icrouting", "torch", "transformers")},
        base_weights=decoder.base_weights,
    )


def save(
    folder: Path, description: Description, pids: PIDs, router: Router, source: Path | None = None
) -> None:
    """Writes an artifact; a kill leaves the old router, the new one or none, and no mixture.

    A card that names these weights, in `source` or in the folder itself, is kept as it stands, with
    what it records.

    Raises:
        ValueError: the folder holds something else under an artifact's names; it is left alone.
    """
    check_place(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(pids, router)
    sha256 = hashlib.sha256(serialize(tensors)).hexdigest()
    config = {**_MEANING, "weights_sha256": sha256, **dataclasses.asdict(description)}
    # What an earlier version wrote is written as it was.
    if description.sources is None:
        del config["sources"]
    if not description.base_weights:
        del config["base_weights"]
    short_digest = sha256[:_N_DIGITS]
    folders = [folder] if source is None else [source, folder]
    card = _card_that_names(short_digest, folders)
    if card is None:
        card = model_card(description, short_digest).encode()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as scratch:
        # Made inside, since a temporary folder itself can be read by its owner alone.
        artifact = Path(scratch, "router")
        artifact.mkdir()
        save_tensors(artifact / _WEIGHTS, tensors)
        save_json(artifact / _CONFIG, {**config, "checksum": _checksum(config)})
        (artifact / _CARD).write_bytes(card)
        _move(artifact, folder)


def _move(artifact: Path, folder: Path) -> None:
    """Moves an artifact into its folder, which may hold an older one and a fit's results."""
    if not folder.exists():
        artifact.rename(folder)
        return
    old_config = folder / _CONFIG
    new_config = artifact / _CONFIG
    if old_config.exists() and old_config.read_bytes() != new_config.read_bytes():
        # Without it the folder is no router, so that halves of two do not pass for one.
        old_config.unlink()
    for name in (_WEIGHTS, _CARD, _CONFIG):
        (artifact / name).replace(folder / name)


def check_place(folder: Path) -> None:
    """Checks that saving to a folder overwrites nothing but an older router.

    Raises:
        ValueError: names the file that is not a router's.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: expected a folder for the router")
    for name, is_ours in _OURS.items():
        file = folder / name
        if file.exists() and not is_ours(file):
            raise ValueError(
                f"{file} is not a router's and would be overwritten: choose another folder"
            )


def check_place_on_hub(repo_id: str, branch: str | None, token: str | bool | None) -> None:
    """Checks that a repository of the hub does not describe anything but a router.

    Raises:
        ValueError: it does.
    """
    if not HfApi(token=token).file_exists(repo_id, _CONFIG, revision=branch):
        return
    file = hf_hub_download(repo_id, _CONFIG, revision=branch, token=token)
    if not _is_config(Path(file)):
        raise ValueError(
            f"{repo_id!r} holds a {_CONFIG} that is not a router's and would be overwritten: "
            "choose another name"
        )


def _is_config(file: Path) -> bool:
    """Whether a config.json describes a router."""
    try:
        return load_json(file).get("method") == _MEANING["method"]
    except ValueError:
        return False


def _is_weights(file: Path) -> bool:
    """Whether a file holds a router's tensors, of this version or another."""
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
    except SafetensorError:
        # A router's own file may have been damaged; its config.json tells it from a model's.
        return _is_config(file.with_name(_CONFIG))
    return all(name.startswith(("pids.", "router.")) for name in names)


def _is_card(file: Path) -> bool:
    """Whether a README.md is a router's card, or names the router that it lies beside."""
    text = file.read_text(encoding="utf-8", errors="replace")
    if "library_name: icrouting" in text:
        return True
    weights = file.with_name(_WEIGHTS)
    if not weights.exists():
        return False
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:_N_DIGITS] in text


# The files of an artifact, and what tells each from a file of that name of another kind.
_OURS = {_CONFIG: _is_config, _WEIGHTS: _is_weights, _CARD: _is_card}


def _card_that_names(digest: str, folders: Sequence[Path]) -> bytes | None:
    """Returns the first card that names a router's weights, None where there is none."""
    for folder in folders:
        file = folder / "README.md"
        if not file.is_file():
            continue
        card = file.read_bytes()
        if digest.encode() in card:
            return card
    return None


def model_card(description: Description, digest: str) -> str:
    """Returns the text of a router's README.md; `digest` identifies its weights."""
    # The hub refuses a card whose front matter names anything but one of its ids.
    is_hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", description.base_model)
    filters = {
        "literal": repr,
        "cell": _cell,
        "code": _code,
        "answers": _answers,
        "thousands": "{:,}".format,
    }
    sources = description.sources or ()
    return render(
        "routing/templates/card.md.j2",
        filters,
        **vars(description),
        sources_by_name={source.name: source for source in sources},
        # What was left out of them is not counted.
        at_most=", at most" if description.fit.skip_nan else "",
        digest=digest,
        is_hub_id=is_hub_id,
        hidden=HIDDEN,
    )


def _cell(text: str) -> str:
    """Returns a text as it can stand in a cell of a table."""
    return text.replace("|", r"\|").replace("\n", r"\n")


def _code(text: str) -> str:
    """Returns a text as code in a cell of a table."""
    fence = "`` " if "`" in text else "`"
    return f"{fence}{_cell(text)}{fence[::-1]}"


def _answers(options: Sequence[str]) -> str:
    """Returns options in a cell of a table, the first of them where they are many."""
    shown = ", ".join(_cell(option) for option in options[:_N_ANSWERS])
    return shown if len(options) <= _N_ANSWERS else f"{shown}, ... ({len(options)})"


def with_results(card: str, results: str) -> str:
    """Returns a card whose section "Results" holds `results` alone, at its end if it had none."""
    section = f"## Results\n\n{results.strip()}\n"
    # The section ends at the next one, or with the card.
    old = re.search(r"^## Results$.*?(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    if old is None:
        return f"{card.rstrip()}\n\n{section}"
    before = card[: old.start()]
    after = card[old.end() :]
    if after:
        section += "\n"
    return before + section + after


def _tensors(pids: PIDs, router: Router) -> dict[str, Tensor]:
    tensors = {f"pids.{name}": getattr(pids, name) for name in _PID_TENSORS}
    tensors |= {f"router.{name}": value for name, value in router.state_dict().items()}
    # Whatever device it is used on, a router has the same bytes, and so the same digest.
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def digest(pids: PIDs, router: Router) -> str:
    """Returns 16 hex digits that identify an artifact's weights."""
    return hashlib.sha256(serialize(_tensors(pids, router))).hexdigest()[:_N_DIGITS]


def _checksum(config: dict[str, Any]) -> str:
    content = {key: value for key, value in config.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def locate(name: str, revision: str | None, token: str | bool | None = None) -> Path:
    """Returns the folder of an artifact, downloaded if `name` is a hub id."""
    if Path(name).is_dir():
        return Path(name)
    # The card is not read, but goes along when the router is saved again.
    files = ["config.json", "model.safetensors", "README.md"]
    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"no router at {name!r}: expected a folder or a hub id; {first_line(error)}"
        ) from error


@usual_defaults()
def load(folder: Path) -> tuple[Description, PIDs, Router]:
    """Returns an artifact's parts.

    ValueError if a file is missing or damaged, newer, or its shapes do not match.
    """
    config_file = folder / "config.json"
    weights_file = folder / "model.safetensors"
    if not config_file.is_file():
        raise ValueError(f"{folder} is no router: config.json is missing")
    config = load_json(config_file)
    try:
        description = _description(config)
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
    pids, router = _assemble(tensors, description, weights_file)
    return description, pids, router


def _description(config: dict[str, Any]) -> Description:
    """Returns what config.json describes; ValueError says what it is not."""
    if config.get("method") != "icr":
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
    for name in ("checksum", "weights_sha256"):
        content.pop(name, None)
    meaning = {name: content.pop(name, None) for name in _MEANING}
    if meaning != _MEANING:
        raise ValueError(f"expected its weights to mean {_MEANING}: another version wrote it")
    # An earlier version did not keep them.
    content.setdefault("base_weights", {})
    # By itself first, so that an error names the setting alone.
    fit = read(FitConfig, content.get("fit"))
    # Routers of 0.1 know their sources' names and sizes alone, in `tasks`.
    content.setdefault("sources", None)
    description = read(Description, content)
    check_layers(description.layers, description.n_layers)
    for text in description.base_weights.values():
        read_weight(text)
    if fit.layers not in (None, description.layers):
        raise ValueError(f"its layers {description.layers} are not those of the fit, {fit.layers}")
    return description


def _shapes(description: Description) -> dict[str, tuple[int, ...]]:
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
    return shapes


def _check_tensors(tensors: dict[str, Tensor], description: Description, weights: Path) -> None:
    """Checks that tensors are those that a description promises, and their values possible."""
    expected = {name: (shape, torch.float32) for name, shape in _shapes(description).items()}
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


def _assemble(
    tensors: dict[str, Tensor], description: Description, weights: Path
) -> tuple[PIDs, Router]:
    """Returns directions and router, ready for use, from checked tensors."""
    _check_tensors(tensors, description, weights)
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
