"""Ownership: which files of a folder are a router's, so that saving overwrites no others."""

import hashlib
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from safetensors import SafetensorError, safe_open

from icrouting.runtime.storage import load_json, load_metadata

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
CALIBRATION = "calibration.safetensors"
# What its metadata holds of each prior.
PRIORS = "priors"
# What a router's config.json says that it is.
METHOD = "icr"
# Digits of a sha256 that identify a router's weights.
N_DIGITS = 16


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
    if not HfApi(token=token).file_exists(repo_id, CONFIG, revision=branch):
        return
    file = hf_hub_download(repo_id, CONFIG, revision=branch, token=token)
    if not _is_config(Path(file)):
        raise ValueError(
            f"{repo_id!r} holds a {CONFIG} that is not a router's and would be overwritten: "
            "choose another name"
        )


def _is_config(file: Path) -> bool:
    """Whether a config.json describes a router."""
    try:
        return load_json(file).get("method") == METHOD
    except ValueError:
        return False


def _is_weights(file: Path) -> bool:
    """Whether a file holds a router's tensors, of this version or another."""
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
    except SafetensorError:
        # A router's own file may have been damaged; its config.json tells it from a model's.
        return _is_config(file.with_name(CONFIG))
    return all(name.startswith(("pids.", "router.", "gate.")) for name in names)


def _is_card(file: Path) -> bool:
    """Whether a README.md is a router's card, or names the router that it lies beside."""
    text = file.read_text(encoding="utf-8", errors="replace")
    if "library_name: icrouting" in text:
        return True
    weights = file.with_name(WEIGHTS)
    if not weights.exists():
        return False
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:N_DIGITS] in text


def _is_calibration(file: Path) -> bool:
    """Whether a file holds a router's calibrations."""
    try:
        return PRIORS in (load_metadata(file) or {})
    except ValueError:
        # A damaged one, which its folder's config.json tells from another's.
        return _is_config(file.with_name(CONFIG))


# The files of an artifact, and what tells each from a file of that name of another kind.
_OURS = {
    CONFIG: _is_config,
    WEIGHTS: _is_weights,
    CARD: _is_card,
    CALIBRATION: _is_calibration,
}
