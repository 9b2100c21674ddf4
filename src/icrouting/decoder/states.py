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
from icrouting.runtime.defaults import usual_defaults

# Tokens of a prefix times the rows behind it, each of which needs a copy of its cache.
PREFIX_BUDGET = 8192
# Variants side by side in one row; their mask grows with the square of their number.
MOST_VARIANTS = 256

# From the variants that run, a module's place and their states [n, width], the edited states.
EditVariants = Callable[[Int[Tensor, "n"], int, Tensor], Tensor]


def last_of(hidden: Tensor, positions: Int[Tensor, "batch"]) -> Float[Tensor, "batch hidden_size"]:
    """Returns each row's hidden state at its position."""
    # Some families' branches give all rows in one line.
    states = hidden.reshape(len(positions), -1, hidden.shape[-1])
    rows = torch.arange(len(states), device=hidden.device)
    return states[rows, positions.to(hidden.device)]


@usual_defaults()
@torch.no_grad()
def last_outputs(
    decoder: Decoder,
    modules: Sequence[nn.Module],
    texts: Sequence[str],
    editor: Editor = edited,
) -> tuple[list[Float[Tensor, "n_texts width"]], Int[Tensor, "n_texts"]]:
    """Returns what each module gives at every text's last token, and the likeliest next token.

    The states are a tensor per module (blocks, branches or projections; each may have a width of
    its own), in float32 and, like the token ids, on the CPU. With `edited_inputs` as the editor
    they are what the modules are handed instead.
    """
    token_lists = decoder.tokenize(texts)
    likeliest = torch.zeros(len(texts)).long()
    states_by_module: list[list[Tensor]] = [[torch.empty(0)] * len(texts) for _ in modules]
    with recorded(modules, editor) as outputs:
        for group in by_length(token_lists, decoder.token_budget or TOKEN_BUDGET):
            group_lists = [token_lists[row] for row in group]
            batch = pad(group_lists, decoder.pad_id, group).to(decoder.device)
            likeliest[group] = next_token_logits(decoder.model, batch).argmax(-1).cpu()
            for states, output in zip(states_by_module, outputs, strict=True):
                last_states = last_of(output, batch.last).float().cpu()
                for row, state in zip(group, last_states, strict=True):
                    states[row] = state
    return [torch.stack(states) for states in states_by_module], likeliest


def mean_last_outputs(
    decoder: Decoder,
    modules: Sequence[nn.Module],
    texts: Sequence[str],
) -> Float[Tensor, "n_modules hidden_size"]:
    """Returns what each module gives at a text's last token, the mean over texts, in float32."""
    states_by_module, _ = last_outputs(decoder, modules, texts)
    return torch.stack([states.mean(0) for states in states_by_module])


@torch.no_grad()
def last_token_variants(
    model: PreTrainedModel,
    tokens: list[int],
    n_variants: int,
    modules: Sequence[nn.Module],
    edit: EditVariants,
    editor: Editor = edited,
) -> Iterator[Float[Tensor, "n_group vocab"]]:
    """Yields, by groups, the logits after variants of a prompt's last token.

    The tokens before it are run once. A group stands side by side in one row, each variant blind to
    the others, or in a row each where a layer keeps more than all keys and values, as a sliding
    window does, or the kernel takes no such mask.

    Args:
        model: the model.
        tokens: the prompt.
        n_variants: how many variants there are.
        modules: where they differ.
        edit: gets which variants run, a module's place in `modules` and their states
            [n_group, width], and returns states that tell them apart.
        editor: whether it gets what modules give or, as `edited_inputs`, what they are handed.
    """
    *prefix, last = tokens
    cache = run_prefix(model, prefix) if prefix else DynamicCache()
    if bool(prefix) and _can_stand_side_by_side(model, cache):
        group_size = MOST_VARIANTS
        run = _side_by_side
    else:
        group_size = PREFIX_BUDGET // max(1, len(prefix))
        run = after_prefix
    for variants in torch.arange(n_variants).split(max(1, group_size)):

        def edit_group(place: int, states: Tensor, variants: Tensor = variants) -> Tensor:
            # A variant is a token of the one row, or a row of one token.
            return edit(variants, place, states.flatten(0, 1)).view_as(states)

        batch = pad([[last]] * len(variants), last).to(device_of(model))
        with editor(modules, edit_group):
            logits = run(model, cache, batch)
        yield logits


def _can_stand_side_by_side(model: PreTrainedModel, cache: Cache) -> bool:
    """Whether every layer keeps all keys and values, and the kernel takes any mask."""
    keeps_all = all(type(layer) is DynamicLayer for layer in cache.layers)
    return keeps_all and model.config._attn_implementation in ("sdpa", "eager")


def _side_by_side(
    model: PreTrainedModel, prefix_cache: Cache, batch: Batch
) -> Float[Tensor, "batch vocab"]:
    """Returns what `after_prefix` does for rows of one token each.

    They stand in one row, so that the prefix need not be copied for each.
    """
    n_rows = len(batch.input_ids)
    n_seen = prefix_cache.get_seq_length()
    device = batch.input_ids.device
    # Each sees the prefix and itself: log 1 = 0 lets a token through, log 0 = -inf does not.
    sees = torch.cat([torch.ones(n_rows, n_seen), torch.eye(n_rows)], dim=1)
    additive_mask = sees.log()[None, None].to(device, model.dtype)
    output = model(
        batch.input_ids.T,
        attention_mask=additive_mask,
        # All of them are the token behind the prefix.
        position_ids=torch.full((1, n_rows), n_seen, device=device),
        **{CACHE: copy.deepcopy(prefix_cache)},
    )
    return output.logits[0].float()
