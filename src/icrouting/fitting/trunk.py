"""The frozen trunk: the layers below the first routed one run once per example, not once per epoch.

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

from icrouting.decoder.batches import Batch, by_length, pad
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.partial import TRUNK_TOKEN_BUDGET, watch_entering
from icrouting.decoder.passes import next_token_logits
from icrouting.fitting.losses import entropy
from icrouting.runtime.processes import decided, is_first, mine, total, wait
from icrouting.runtime.progress import track
from icrouting.runtime.storage import load_tensors, save_tensors

TRUNK_FILE = "trunk.bin"


@dataclass(frozen=True)
class TrunkState:
    """What one prompt leaves behind.

    `hidden` is what enters the first routed layer, [q_len, hidden_size], in the model's dtype; `entropy` that of
    the plain model's next-token distribution, in nats.
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
    token_budget: int = TRUNK_TOKEN_BUDGET,
) -> list[TrunkState]:
    """Returns the trunk state of every prompt, from one plain pass each; `first` is the first routed layer.

    The hidden states, tokens * hidden_size numbers of the model's dtype, go to a file that is mapped into memory, so
    they may be larger than it. A finished file in `folder` is taken up again; several processes share the work, and
    need a folder that all of them see. OSError where the disk does not hold the states.
    """
    with ExitStack() as stack:
        if folder is None:  # the file stays readable while it is mapped
            folder = Path(decided(stack.enter_context(tempfile.TemporaryDirectory())))
        file, finished = folder / TRUNK_FILE, folder / "trunk.safetensors"
        lengths, width = (
            [len(tokens) for tokens in token_lists],
            decoder.hidden_size,
        )
        n_bytes = sum(lengths) * width * decoder.model.dtype.itemsize
        about = {
            "first": str(first),
            "shape": str([sum(lengths), width]),
            "dtype": str(decoder.model.dtype),
        }
        # The first process alone looks: it may change both files before another one would.
        is_whole = is_first() and file.exists() and file.stat().st_size == n_bytes
        if not decided(is_whole and finished.exists() and load_tensors(finished)[1] == about):
            if is_first():
                finished.unlink(
                    missing_ok=True
                )  # it would vouch for a file that a kill leaves half filled
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
                save_tensors(finished, {"entropies": entropies}, about)
            wait()
        entropies = load_tensors(finished)[0]["entropies"].tolist()
        flat = torch.from_file(
            str(file), shared=False, size=sum(lengths) * width, dtype=decoder.model.dtype
        )
        wait()
    states = flat.view(-1, width).split(lengths)
    return [TrunkState(*parts) for parts in zip(token_lists, states, entropies, strict=True)]


def _fill(
    file: Path,
    decoder: Decoder,
    token_lists: Sequence[list[int]],
    first: int,
    token_budget: int,
) -> Float[Tensor, "n_prompts"]:
    """Writes the states of this process's share of prompts, and returns their entropies; 0 for the others."""
    ends, entropies = list(accumulate(map(len, token_lists))), torch.zeros(len(token_lists))
    groups = mine(list(by_length(token_lists, token_budget)))
    with watch_entering(decoder.model, first, stop=False) as entering, file.open("r+b") as stream:
        for group in track(groups, "trunk", [len(group) for group in groups], "queries"):
            batch = pad([token_lists[i] for i in group], decoder.pad_id).to(decoder.device)
            entropies[group] = entropy(next_token_logits(decoder.model, batch)).cpu()
            for row, padded in zip(
                group, entering.pop().to("cpu", decoder.model.dtype), strict=True
            ):
                hidden = padded[: len(token_lists[row])].contiguous().view(torch.uint8).numpy()
                stream.seek((ends[row] - len(token_lists[row])) * hidden.shape[1])
                stream.write(hidden.tobytes())
    return entropies


def _allocate(file: Path, n_bytes: int) -> None:
    """Makes a file that takes `n_bytes`; OSError if the disk has no room for them."""
    file.unlink(missing_ok=True)
    free = shutil.disk_usage(file.parent).free
    if n_bytes > free:
        raise OSError(
            f"the states entering the first routed layer take {n_bytes / 1e9:.1f} GB, {file.parent} has room for "
            f"{free / 1e9:.1f} GB: choose a folder on another disk (--out), or lower n_queries or max_tokens"
        )
    with file.open("wb") as stream:
        stream.truncate(n_bytes)


def pad_states(states: Sequence[TrunkState], pad_id: int) -> tuple[Batch, Tensor]:
    """Returns trunk states as one batch: tokens and hidden states, padded on the right."""
    hidden = torch.nn.utils.rnn.pad_sequence([state.hidden for state in states], batch_first=True)
    return pad([state.tokens for state in states], pad_id), hidden
