"""Files that are at every moment the old one or the new one, and say plainly when they are damaged."""

import json
import logging
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, contiguous_format

from icrouting.runtime.checks import in_words

T = TypeVar("T")
log = logging.getLogger(__name__)


def save_text(file: Path, text: str) -> None:
    """Writes a text."""
    scratch = file.with_name(file.name + ".part")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(file)


def save_json(file: Path, content: object) -> None:
    """Writes JSON."""
    save_text(file, json.dumps(content, indent=1))


def load_json(file: Path) -> dict[str, Any]:
    """Returns a JSON object; ValueError names the file if it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: expected a JSON object, got {type(content).__name__}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key stands twice")
    return content


def save_tensors(
    file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes safetensors; OSError if the disk does not take them."""
    scratch = file.with_name(file.name + ".part")
    try:
        save_file(tensors, scratch, metadata)
    except SafetensorError as error:
        scratch.unlink(missing_ok=True)
        raise OSError(f"cannot write {file}: {error}; what was there before is kept") from error
    scratch.replace(file)


def unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies that lie apart and in one piece, as safetensors asks."""
    return {
        name: tensor.detach().clone(memory_format=contiguous_format)
        for name, tensor in tensors.items()
    }


def load_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns tensors and metadata; ValueError names the file if it is damaged.

    Copies, since a file that lies under tensors must not change, and lies unaligned: some kernels round by that.
    """
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        return {name: value.clone() for name, value in load_file(file).items()}, metadata
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged ({error}): delete it and what it held is made anew"
        ) from error


def read_lines(path: Path, kind: type[T]) -> list[T]:
    """Returns what the lines of a JSONL file hold; ValueError names the file, the line and what does not fit.

    A last line without its newline was cut by a kill and is dropped; no file reads as no lines.
    """
    if not path.exists():
        return []
    *lines, rest = path.read_bytes().split(b"\n")
    if rest:
        log.info("%s: dropped a last line that was cut short after %d bytes", path, len(rest))
    parse, found = TypeAdapter(kind).validate_json, []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(parse(line))
        except ValidationError as error:
            raise ValueError(f"{path}:{number}: {in_words(error)}") from error
    return found
