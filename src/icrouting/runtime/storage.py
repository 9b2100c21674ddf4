"""Storage: files that are always whole, old or new, and say plainly when they are damaged."""

import logging
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, contiguous_format

from icrouting.runtime.checks import in_words
from icrouting.runtime.files import load_json as load_json
from icrouting.runtime.files import save_json as save_json
from icrouting.runtime.files import save_text as save_text

T = TypeVar("T")
log = logging.getLogger(__name__)


def save_tensors(
    file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes safetensors.

    Raises:
        OSError: the disk does not take them; the file that was there before is kept.
    """
    # A scratch file as in `save_text`, which goes too where the disk was full.
    scratch = file.with_name(file.name + ".part")
    try:
        save_file(tensors, scratch, metadata)
    except SafetensorError as error:
        scratch.unlink(missing_ok=True)
        raise OSError(f"cannot write {file}: {error}; what was there before is kept") from error
    scratch.replace(file)


def unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies that lie apart and in one piece, as safetensors asks."""
    copies = {}
    for name, tensor in tensors.items():
        copies[name] = tensor.detach().clone(memory_format=contiguous_format)
    return copies


def load_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a file by name, and its metadata.

    Raises:
        ValueError: names the file, if it is damaged.
    """
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        mapped = load_file(file)
        # The file lies under what was loaded: it must not change meanwhile, and its tensors are
        # not aligned, by which some kernels round. Copies are free of both.
        tensors = {name: tensor.clone() for name, tensor in mapped.items()}
    except SafetensorError as error:
        raise _damaged(file, error) from error
    return tensors, metadata


def load_metadata(file: Path) -> dict[str, str] | None:
    """Returns the metadata of a file of tensors, of which none is read; None where it is not."""
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except SafetensorError as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: SafetensorError) -> ValueError:
    return ValueError(f"{file} is damaged ({error}): delete it and what it held is made anew")


def read_lines(path: Path, kind: type[T]) -> list[T]:
    """Returns what the lines of a JSONL file hold; no file reads as no lines.

    A last line without its newline was cut by a kill and is dropped.

    Raises:
        ValueError: names the file, the line and what does not fit.
    """
    if not path.exists():
        return []
    # What follows the last newline is empty where the file is whole.
    *lines, cut_line = path.read_bytes().split(b"\n")
    if cut_line:
        log.info("%s: dropped a last line that was cut short after %d bytes", path, len(cut_line))
    adapter = TypeAdapter(kind)
    values = []
    for number, line in enumerate(lines, start=1):
        try:
            values.append(adapter.validate_json(line))
        except ValidationError as error:
            raise ValueError(f"{path}:{number}: {in_words(error)}") from error
    return values
