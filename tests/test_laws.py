"""Laws of routed attention on shapes, masks, paddings and cuts that hypothesis draws.

They are the same ones every time.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, Gemma3TextConfig, LlamaConfig, Phi3Config, Qwen3Config

import tiny
from icrouting.decoder.batches import by_length, pad
from icrouting.decoder.families import CACHE
from icrouting.routing.attach import attach
from icrouting.routing.attention import project, widen_key, widen_query, widen_value
from icrouting.routing.router import Routing
from reference import reference_routed

# fp32 round-off of logits of size 10 through four layers
CLOSE = 3e-5
N_LAYERS = 4
CLASSES = {
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
    "phi3": Phi3Config,
    "gemma3": Gemma3TextConfig,
}


def laws(max_examples):
    return settings(derandomize=True, deadline=None, max_examples=max_examples, database=None)


@st.composite
def worlds(draw):
    """A model's sizes, its routed layers, and a batch.

    The batch is where its real tokens are, holes among them included.
    """
    n_kv_heads, head_dim = draw(st.integers(1, 3)), 2 * draw(st.integers(1, 6))
    n_rows, n_tokens = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    kind = draw(st.sampled_from(["left", "right", "both", "holes"]))
    rows = []
    for _ in range(n_rows):
        start = draw(st.integers(0, n_tokens - 1)) if kind in ("left", "both", "holes") else 0
        stop = (
            draw(st.integers(start + 1, n_tokens))
            if kind in ("right", "both", "holes")
            else n_tokens
        )
        inside = [kind != "holes" or draw(st.booleans()) for _ in range(stop - start)]
        rows.append(
            [False] * start
            + [inside[0] or not any(inside), *inside[1:]]
            + [False] * (n_tokens - stop)
        )
    layers = draw(st.sets(st.integers(0, N_LAYERS - 1), min_size=1).map(sorted).map(tuple))
    rank, seed = draw(st.integers(1, min(4, n_kv_heads * head_dim))), draw(st.integers(0, 999))
    sizes = {
        "num_attention_heads": n_kv_heads * draw(st.integers(1, 3)),
        "num_key_value_heads": n_kv_heads,
    }
    return (
        draw(st.sampled_from(list(CLASSES))),
        sizes | {"head_dim": head_dim},
        layers,
        rank,
        seed,
        torch.tensor(rows),
    )


def build(world, kernel="sdpa"):
    """Returns a model, its directions, a routing and a batch with explicit positions."""
    family, sizes, layers, rank, seed, mask = world
    hidden_size = 4 * sizes["num_attention_heads"]  # a multiple, as some configurations want
    common = (
        tiny.SIZES
        | {"hidden_size": hidden_size, "intermediate_size": 20, "num_hidden_layers": N_LAYERS}
        | sizes
    )
    more = (
        {"sliding_window": 5, "query_pre_attn_scalar": 13, "tie_word_embeddings": False}
        if family == "gemma3"
        else {}
    )
    model = tiny.sharp(
        CLASSES[family](**common | more), kernel, seed, embed_std=0.4 if family == "gemma3" else 1.0
    )
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, tiny.VOCAB, mask.shape, generator=generator).masked_fill(~mask, 1)
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    batch = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions}
    return (
        model,
        tiny.pids(model, layers, rank, seed),
        tiny.routing(model, len(mask), len(layers), rank, seed),
        batch,
    )


@pytest.mark.slow
@laws(40)
@given(worlds())
def test_routed_attention_equals_the_dense_reference_whatever_the_shape_and_the_padding(world):
    model, pids, routing, batch = build(world)
    dense, real = build(world, "eager")[0], batch["attention_mask"].bool()
    with reference_routed(dense, pids, routing):
        expected = dense(**batch).logits[real]
    with attach(model, pids) as attachment:
        attachment.routing = routing
        assert (model(**batch).logits[real] - expected).abs().max() <= CLOSE


@pytest.mark.slow
@laws(30)
@given(worlds(), st.data())
def test_any_cut_into_prefill_and_decoding_equals_one_pass(world, data):
    model, pids, routing, batch = build(world)
    n_tokens, real = batch["input_ids"].shape[1], batch["attention_mask"].bool()
    cuts = sorted(data.draw(st.sets(st.integers(1, n_tokens)))) if n_tokens > 1 else []
    cache, pieces, start = DynamicCache(config=model.config), [], 0
    with attach(model, pids) as attachment:
        attachment.routing = routing
        expected = model(**batch).logits
        for stop in [*(cut for cut in cuts if cut < n_tokens), n_tokens]:
            step = {name: batch[name][:, start:stop] for name in ("input_ids", "position_ids")}
            step["attention_mask"], start = batch["attention_mask"][:, :stop], stop
            pieces.append(model(**step, use_cache=True, **{CACHE: cache}).logits)
    assert (torch.cat(pieces, 1) - expected)[real].abs().max() <= CLOSE


@st.composite
def tensors(draw):
    """Queries, keys, values, projections, a routing and a scaling of any sign and size.

    All are in double precision.
    """
    n_rows, n_kv_heads, n_queries, n_keys = (draw(st.integers(1, size)) for size in (3, 3, 5, 7))
    n_heads, head_dim, rank = (
        n_kv_heads * draw(st.integers(1, 3)),
        draw(st.integers(1, 9)),
        draw(st.integers(1, 6)),
    )
    n_layers, generator = (
        draw(st.integers(1, 3)),
        torch.Generator().manual_seed(draw(st.integers(0, 999))),
    )

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    routing = Routing(
        random(n_rows, n_layers, rank).tanh(), random(n_rows, n_layers, n_heads).sigmoid()
    )
    states = [random(n_rows, n_heads, n_queries, head_dim)]
    states += [random(n_rows, n_kv_heads, n_keys, head_dim) for _ in range(2)]
    states += [random(n_rows, n_queries, rank), random(n_rows, n_keys, rank)]
    scaling = draw(st.sampled_from([-1, 1])) * 10 ** draw(st.floats(-4, 4))
    return *states, routing, draw(st.integers(0, n_layers - 1)), scaling


@laws(100)
@given(tensors())
@pytest.mark.slow
def test_the_widened_product_is_the_dense_bias_and_widened_values_add_nothing(drawn):
    query, key, value, z_query, z_key, routing, layer, scaling = drawn
    gates, alpha = (
        routing.head_gates[:, layer, :, None, None],
        routing.routing_vector[:, layer, None, None],
    )
    wide_query, wide_key = (
        widen_query(query, z_query, gates * alpha / scaling),
        widen_key(key, z_key),
    )
    rank, times = z_query.shape[-1], query.shape[1] // key.shape[1]
    wide_value = widen_value(value, rank)
    got = scaling * wide_query @ wide_key.repeat_interleave(times, 1).mT
    bias = torch.einsum("bir,br,bjr->bij", z_query, routing.routing_vector[:, layer], z_key)
    bias = routing.head_gates[:, layer, :, None, None] * bias[:, None]
    expected = scaling * query @ key.repeat_interleave(times, 1).mT + bias
    assert (got - expected).abs().max() <= 1e-12 * (1 + abs(scaling)) * (
        1 + expected.abs().max() / (1 + abs(scaling))
    )
    assert torch.equal(wide_query[..., :-rank], query)
    assert torch.equal(wide_key[..., :-rank], key)
    weights = expected.softmax(-1)
    output = weights @ wide_value.repeat_interleave(times, 1)
    assert (output[..., -rank:] == 0).all()
    assert torch.allclose(
        output[..., :-rank], weights @ value.repeat_interleave(times, 1), atol=1e-12
    )


@laws(100)
@given(tensors())
@pytest.mark.slow
def test_projecting_is_linear_and_in_float32(drawn):
    query, *_, z_query, _, _, _, _ = drawn
    states = query.transpose(1, 2).flatten(2)
    directions = torch.randn(
        states.shape[-1], z_query.shape[-1], generator=torch.Generator().manual_seed(0)
    )
    z = project(states.half(), directions)
    assert z.dtype == torch.float32
    assert torch.allclose(project(2 * states.half(), directions), 2 * z)


@laws(100)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 24))
def test_a_repeated_routing_keeps_each_query_s_rows_together(n_queries, times, more, n_rows):
    alpha = torch.arange(n_queries * 6.0).view(n_queries, 2, 3)
    routing = Routing(alpha, alpha[..., :1] / 100)
    repeated = routing.repeated(n_queries * times)
    for row in range(n_queries * times):
        assert torch.equal(repeated.routing_vector[row], alpha[row // times])
        assert torch.equal(repeated.head_gates[row], alpha[row // times, :, :1] / 100)
    again, at_once = (
        repeated.repeated(len(repeated.head_gates) * more),
        routing.repeated(n_queries * times * more),
    )
    assert torch.equal(again.routing_vector, at_once.routing_vector)
    assert torch.equal(again.head_gates, at_once.head_gates)
    if n_rows % n_queries:
        with pytest.raises(ValueError, match="expected a multiple"):
            routing.repeated(n_rows)


TOKEN_LISTS = st.lists(st.lists(st.integers(0, 99), max_size=17), min_size=1, max_size=12)


@laws(100)
@given(TOKEN_LISTS, st.integers(1, 60))
def test_groups_by_length_are_every_row_once_within_the_budget(token_lists, budget):
    groups = list(by_length(token_lists, budget))
    assert sorted(row for group in groups for row in group) == list(range(len(token_lists)))
    lengths = [len(token_lists[row]) for group in groups for row in group]
    assert lengths == sorted(lengths, reverse=True)
    assert all(
        len(group) == 1 or len(group) * len(token_lists[group[0]]) <= budget for group in groups
    )


@laws(100)
@given(TOKEN_LISTS, st.integers(0, 99))
@pytest.mark.slow
def test_padding_loses_nothing(token_lists, pad_id):
    batch = pad(token_lists, pad_id)
    for row, tokens in enumerate(token_lists):
        assert batch.input_ids[row, batch.attention_mask[row]].tolist() == tokens
        assert (batch.input_ids[row, ~batch.attention_mask[row]] == pad_id).all()
        assert batch.last[row] == len(tokens) - 1
    assert batch.input_ids.shape == (len(token_lists), max(map(len, token_lists)))
    assert batch.rows == list(range(len(token_lists)))
