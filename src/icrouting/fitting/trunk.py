"""The frozen trunk: the layers below the first routed one, run once per example, not per epoch.

Routing starts at layer `first`. What enters it is the same for the plain and for the routed pass and in
every epoch, so it is kept, and training runs the layers from `first` on.
"""

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from icrouting.decoder.batches import Batch, by_length, pad
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.partial import TOKEN_BUDGET, _entering
from icrouting.decoder.passes import next_token_logits
from icrouting.fitting.losses import entropy
from icrouting.runtime.processes import decided, is_first, mine, total, wait
from icrouting.runtime.progress import track
from icrouting.runtime.storage import load_tensors, save_tensors

TRUNK_FILE = "trunk.bin"


@dataclass(frozen=True)
class TrunkState:
    """What one prompt leaves behind.

    Attributes:
        tokens: the prompt's.
        hidden: what enters the first routed layer, [q_len, hidden_size], in the model's dtype.
        entropy: that of the plain model's next-token distribution, in nats.
    """

    tokens: list[int]
    hidden: Tensor
    entropy: float


@torch.no_grad()
def run_trunk(
    decoder: Decoder,
    token_lists: Sequence[list[int]],
    first: int,
    folder: Path | None = None,
    *,
    token_budget: int = TOKEN_BUDGET,
) -> list[TrunkState]:
    """Returns the trunk state of every prompt, from one plain pass each.

    The hidden states, tokens * hidden_size numbers of the model's dtype, go to a file that is mapped into memory, so
    they may be larger than it. A finished file is taken up again.

    Args:
        decoder: the model that is routed.
        token_lists: the prompts' tokens.
        first: the first routed layer.
        folder: where the file goes; None makes one without a name. Several processes share the work, and need a folder
            that all of them see.
        token_budget: tokens of a batch, padded.

    Raises:
        OSError: the disk does not hold the states.
    """
    lengths = [len(tokens) for tokens in token_lists]
    n_tokens = sum(lengths)
    width = decoder.hidden_size
    dtype = decoder.model.dtype
    with ExitStack() as stack:
        if folder is None:
            # A mapped file stays readable, though its folder is deleted on leaving.
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            folder = Path(decided(scratch))
        file = folder / TRUNK_FILE
        entropies_file = folder / "trunk.safetensors"
        n_bytes = n_tokens * width * dtype.itemsize
        about = {"first": str(first), "shape": str([n_tokens, width]), "dtype": str(dtype)}
        # The first process alone looks: it may change both files before another one would.
        is_finished = is_first() and _is_finished(file, n_bytes, entropies_file, about)
        if not decided(is_finished):
            if is_first():
                # It would vouch for a file that a kill leaves half filled.
                entropies_file.unlink(missing_ok=True)
                _allocate(file, n_bytes)
            wait()
            try:
                entropies = _fill(file, decoder, token_lists, first, token_budget)
            except OSError as error:
                raise OSError(
                    f"cannot write {file} ({error}): make room or choose another folder"
                ) from error
            entropies = total(entropies)
            if is_first():
                save_tensors(entropies_file, {"entropies": entropies}, about)
            wait()
        entropies = load_tensors(entropies_file)[0]["entropies"].tolist()
        numbers = torch.from_file(str(file), shared=False, size=n_tokens * width, dtype=dtype)
        # No process deletes the folder before all have mapped the file.
        wait()
    states = numbers.view(-1, width).split(lengths)
    return [TrunkState(*parts) for parts in zip(token_lists, states, entropies, strict=True)]


def _is_finished(file: Path, n_bytes: int, entropies_file: Path, about: dict[str, str]) -> bool:
    """Whether a file holds all states of the very prompts' sizes, layer and dtype."""
    if not file.exists() or file.stat().st_size != n_bytes:
        return False
    # The entropies are written last, so where they are, the states are whole.
    if not entropies_file.exists():
        return False
    _, metadata = load_tensors(entropies_file)
    return metadata == about


def _fill(
    file: Path,
    decoder: Decoder,
    token_lists: Sequence[list[int]],
    first: int,
    token_budget: int,
) -> Float[Tensor, "n_prompts"]:
    """Writes the states of this process's prompts, and returns their entropies.

    The entropies of the other processes' prompts are 0.
    """
    dtype = decoder.model.dtype
    token_bytes = decoder.hidden_size * dtype.itemsize
    lengths = [len(tokens) for tokens in token_lists]
    # Where each prompt begins, in tokens from the start of the file.
    starts = list(accumulate(lengths, initial=0))
    entropies = torch.zeros(len(token_lists))
    groups = mine(list(by_length(token_lists, token_budget)))
    sizes = [len(group) for group in groups]
    with _entering(decoder.model, first, stop=False) as entering, file.open("r+b") as stream:
        for group in track(groups, "trunk", sizes, "queries"):
            batch = pad([token_lists[row] for row in group], decoder.pad_id).to(decoder.device)
            logits = next_token_logits(decoder.model, batch)
            entropies[group] = entropy(logits).cpu()
            padded_states = entering.pop().to("cpu", dtype)
            for row, padded in zip(group, padded_states, strict=True):
                stream.seek(starts[row] * token_bytes)
                stream.write(_bytes_of(padded[: lengths[row]]))
    return entropies


def _bytes_of(hidden: Float[Tensor, "q_len hidden_size"]) -> bytes:
    # By way of bytes, as numpy knows no bfloat16.
    return hidden.contiguous().view(torch.uint8).numpy().tobytes()


def _allocate(file: Path, n_bytes: int) -> None:
    """Makes a file that takes `n_bytes`; OSError if the disk has no room for them."""
    file.unlink(missing_ok=True)
    free = shutil.disk_usage(file.parent).free
    if n_bytes > free:
        raise OSError(
            f"the states entering the first routed layer take {n_bytes / 1e9:.1f} GB, "
            f"{file.parent} has room for {free / 1e9:.1f} GB: choose a folder on another disk "
            "(--out), or lower n_queries or max_tokens"
        )
    with file.open("wb") as stream:
        stream.truncate(n_bytes)


def pad_states(states: Sequence[TrunkState], pad_id: int) -> tuple[Batch, Tensor]:
    """Returns trunk states as one batch: tokens and hidden states, padded on the right."""
    batch = pad([state.tokens for state in states], pad_id)
    hidden = pad_sequence([state.hidden for state in states], batch_first=True)
    return batch, hidden
