"""States: what blocks and branches give at the last token of prompts."""

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from icrouting.decoder.batches import Batch, by_length, pad
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import CACHE, device_of
from icrouting.decoder.hooks import Editor, edited, recorded
from icrouting.decoder.passes import TOKEN_BUDGET, after_prefix, next_token_logits, run_prefix

PREFIX_BUDGET, MOST_VARIANTS = (
    8192,
    256,
)  # tokens of a prefix times the rows behind it; variants side by side


Vary = Callable[[Int[Tensor, "n"], int, Tensor], Tensor]


def last_of(hidden: Tensor, positions: Int[Tensor, "batch"]) -> Float[Tensor, "batch hidden_size"]:
    """Returns each row's hidden state at its position; some families' branches give all rows in one line."""
    rows = hidden.reshape(len(positions), -1, hidden.shape[-1])
    return rows[torch.arange(len(rows), device=hidden.device), positions.to(hidden.device)]


@torch.no_grad()
def last_outputs(
    decoder: Decoder,
    modules: Sequence[nn.Module],
    texts: Sequence[str],
    by: Editor = edited,
) -> tuple[list[Float[Tensor, "n_texts width"]], Int[Tensor, "n_texts"]]:
    """Returns what each module gives at the last token of every text, and the likeliest token after it.

    The states are a tensor per module (blocks, branches or projections; each may have a width of its own), in float32
    and, like the token ids, on the CPU. By `edited_inputs` they are what the modules are given instead.
    """
    token_lists = decoder.tokenize(texts)
    likeliest = torch.zeros(len(texts)).long()
    found: list[list[Tensor]] = [[torch.empty(0)] * len(texts) for _ in modules]
    with recorded(modules, by) as outputs:
        for group in by_length(token_lists, TOKEN_BUDGET):
            batch = pad([token_lists[i] for i in group], decoder.pad_id, group).to(decoder.device)
            likeliest[group] = next_token_logits(decoder.model, batch).argmax(-1).cpu()
            for states, output in zip(found, outputs, strict=True):
                for row, state in zip(
                    group, last_of(output, batch.last).float().cpu(), strict=True
                ):
                    states[row] = state
    return [torch.stack(states) for states in found], likeliest


def mean_last_outputs(
    decoder: Decoder,
    modules: Sequence[nn.Module],
    texts: Sequence[str],
) -> Float[Tensor, "n_modules hidden_size"]:
    """Returns what each module gives at a text's last token, the mean over texts, in float32."""
    return torch.stack([states.mean(0) for states in last_outputs(decoder, modules, texts)[0]])


@torch.no_grad()
def last_token_variants(
    model: PreTrainedModel,
    tokens: list[int],
    n: int,
    modules: Sequence[nn.Module],
    edit: Vary,
    by: Editor = edited,
) -> Iterator[Float[Tensor, "n_these vocab"]]:
    """Yields, by groups, the logits after `n` variants of a prompt's last token; the tokens before it are run once.

    A group stands side by side in one row, each blind to the others, or in a row each where a layer keeps more than
    all keys and values, as a sliding window does, or the kernel takes no such mask. `edit` is given which of them are
    there, a module's place in `modules` and their states [n_these, width], and returns those that tell them apart.
    """
    *prefix, last = tokens
    cache = run_prefix(model, prefix) if prefix else DynamicCache()
    has_all = bool(prefix) and all(type(layer) is DynamicLayer for layer in cache.layers)
    is_shared = has_all and model.config._attn_implementation in ("sdpa", "eager")
    most, run = (
        (MOST_VARIANTS, _side_by_side)
        if is_shared
        else (PREFIX_BUDGET // max(1, len(prefix)), after_prefix)
    )
    for these in torch.arange(n).split(max(1, most)):
        with by(
            modules,
            lambda at, given, these=these: edit(these, at, given.flatten(0, 1)).view_as(given),
        ):
            logits = run(model, cache, pad([[last]] * len(these), last).to(device_of(model)))
        yield logits


def _side_by_side(
    model: PreTrainedModel, prefix_cache: Cache, batch: Batch
) -> Float[Tensor, "batch vocab"]:
    """What `after_prefix` gives for rows of one token each, without a copy of the prefix for each."""
    n, n_seen, device = len(batch.input_ids), prefix_cache.get_seq_length(), batch.input_ids.device
    additive_mask = (
        torch.cat([torch.ones(n, n_seen), torch.eye(n)], dim=1)
        .log()[None, None]
        .to(device, model.dtype)
    )
    positions, cache = torch.full((1, n), n_seen, device=device), copy.deepcopy(prefix_cache)
    output = model(
        batch.input_ids.T, attention_mask=additive_mask, position_ids=positions, **{CACHE: cache}
    )
    return output.logits[0].float()
