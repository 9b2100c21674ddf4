"""The frozen trunk: the layers below the first routed one, run once per example, not per epoch.

Routing starts at layer `first`. What enters it is the same for the plain and for the routed pass
and in every epoch, so it is kept, and training runs the layers from `first` on.
"""

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from icrouting.decoder.batches import Batch, by_length, pad
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.partial import TRUNK_TOKEN_BUDGET, watch_entering
from icrouting.decoder.passes import next_token_logits
from icrouting.fitting.losses import entropy
from icrouting.runtime.processes import decided, is_first, mine, total, wait
from icrouting.runtime.progress import track
from icrouting.runtime.storage import load_tensors, save_tensors

TRUNK_FILE = "trunk.bin"
# It is written last, so where it is, the states are whole.
ENTROPIES_FILE = "trunk.safetensors"


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
    token_budget: int | None = None,
) -> list[TrunkState]:
    """Returns the trunk state of every prompt, from one plain pass each.

    The hidden states, tokens * hidden_size numbers of the model's dtype, go to a file that is
    mapped into memory, so they may be larger than it. A finished file is taken up again.

    Args:
        decoder: the model that is routed.
        token_lists: the prompts' tokens.
        first: the first routed layer.
        folder: where the file goes; None makes one without a name. Several processes share the
            work, and need a folder that all of them see.
        token_budget: tokens of a batch, padded; None takes the decoder's.

    Raises:
        OSError: the disk does not hold the states.
    """
    lengths = [len(tokens) for tokens in token_lists]
    with ExitStack() as stack:
        if folder is None:
            # A mapped file stays readable, though its folder is deleted on leaving.
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            folder = Path(decided(scratch))
        files = _TrunkFiles(folder, first, sum(lengths), decoder.hidden_size, decoder.model.dtype)
        # The first process alone looks: it may change both files before another one would.
        is_finished = is_first() and files.are_finished()
        if not decided(is_finished):
            budget = token_budget or decoder.token_budget or TRUNK_TOKEN_BUDGET
            _write(files, decoder, token_lists, budget)
        entropies = load_tensors(files.entropies)[0]["entropies"].tolist()
        hidden = files.mapped_states()
        # The folder is not deleted before all processes have mapped the file.
        wait()
    states = hidden.split(lengths)
    return [TrunkState(*parts) for parts in zip(token_lists, states, entropies, strict=True)]


@dataclass(frozen=True)
class _TrunkFiles:
    """The two files that a trunk is kept in.

    Attributes:
        folder: where they lie.
        first: the first routed layer.
        n_tokens: number of tokens of all prompts.
        width: numbers in a token's state.
        dtype: of the states.
    """

    folder: Path
    first: int
    n_tokens: int
    width: int
    dtype: torch.dtype

    @property
    def states(self) -> Path:
        """The file of states, one prompt's behind the other's."""
        return self.folder / TRUNK_FILE

    @property
    def entropies(self) -> Path:
        """The file of entropies; it is written last, so where it is, the states are whole."""
        return self.folder / ENTROPIES_FILE

    @property
    def about(self) -> dict[str, str]:
        """What the states are of, as the file of entropies has it in its metadata."""
        return {
            "first": str(self.first),
            "shape": str([self.n_tokens, self.width]),
            "dtype": str(self.dtype),
        }

    @property
    def n_bytes(self) -> int:
        """Size of the file of states."""
        return self.n_tokens * self.width * self.dtype.itemsize

    def are_finished(self) -> bool:
        """Whether both files are there, of this layer, shape and dtype."""
        if not self.states.exists() or self.states.stat().st_size != self.n_bytes:
            return False
        if not self.entropies.exists():
            return False
        _, metadata = load_tensors(self.entropies)
        return metadata == self.about

    def mapped_states(self) -> Shaped[Tensor, "n_tokens hidden_size"]:
        """The states, which are read from the file where they are used."""
        size = self.n_tokens * self.width
        # Not shared: what is written to the tensor goes to memory, never to the file.
        numbers = torch.from_file(str(self.states), shared=False, size=size, dtype=self.dtype)
        return numbers.view(-1, self.width)


def _write(
    files: _TrunkFiles, decoder: Decoder, token_lists: Sequence[list[int]], token_budget: int
) -> None:
    """Runs the trunk of all prompts into both files; all processes take part."""
    if is_first():
        # It would vouch for a file that a kill leaves half filled.
        files.entropies.unlink(missing_ok=True)
        _allocate(files.states, files.n_bytes)
    wait()
    try:
        entropies = _fill(files.states, decoder, token_lists, files.first, token_budget)
    except OSError as error:
        raise OSError(
            f"cannot write {files.states} ({error}): make room or choose another folder"
        ) from error
    entropies = total(entropies)
    if is_first():
        save_tensors(files.entropies, {"entropies": entropies}, files.about)
    wait()


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
    with watch_entering(decoder.model, first, stop=False) as entering, file.open("r+b") as stream:
        for group in track(groups, "trunk", sizes, "queries"):
            batch = pad([token_lists[row] for row in group], decoder.pad_id).to(decoder.device)
            logits = next_token_logits(decoder.model, batch)
            entropies[group] = entropy(logits).cpu()
            # What the pass left when it entered the first routed layer.
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
