import re
from pathlib import Path

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GemmaConfig,
    GPTJConfig,
    HunYuanDenseV1Config,
    MinistralConfig,
    Olmo3Config,
    PersimmonConfig,
    Phi3Config,
    PhiConfig,
    StableLmConfig,
    Starcoder2Config,
)

import tiny
from icrouting.decoder.families import FAMILIES, Family, Site, family_of
from icrouting.decoder.sites import fused_key, fused_query, token_major
from icrouting.routing.attach import attach
from plain_and_routed import CLOSE, MATTERS, logits_of, no_routing, routed_logits, state_of
from reference import reference_routed

REFUSED = "cannot be routed: looked for queries and keys that reach the attention function"


def decoder(config_class, **settings):
    return tiny.sharp(
        config_class(**tiny.SIZES | {"tie_word_embeddings": False} | settings), "eager"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", tiny.ALL_CONFIGS)
def test_every_family_passes_and_is_left_as_it_was(family, dtype):
    model = tiny.model(family, "eager").to(dtype)
    model.train()
    model.get_output_embeddings().eval()
    before = state_of(model)
    modes = [module.training for module in model.modules()]
    seed = torch.get_rng_state()
    assert family_of(model) == FAMILIES[tiny.ALL_CONFIGS[family].model_type]
    assert state_of(model) == before
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), seed)


WRONG = {
    "llama": Family(Site("q_proj"), Site("v_proj")),
    "phi": Family(Site("k_proj"), Site("q_proj")),
    "opt": Family(Site("k_proj"), Site("q_proj")),
    "gpt2": Family(
        Site("c_attn", fused_key), Site("c_attn", fused_query), layers="h", attention="attn"
    ),
    "gpt_neox": Family(
        Site("query_key_value", fused_query),
        Site("query_key_value", fused_key),
        attention="attention",
    ),
    "phi3": Family(
        Site("qkv_proj", fused_query), Site("qkv_proj", lambda output, dims: output[..., -30:])
    ),
    "qwen3": Family(),
    "olmo2": Family(),
    "gemma3_text": Family(Site("q_norm", token_major), Site("k_norm", token_major)),
    "mistral": Family(layers="blocks"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", WRONG)
def test_a_wrong_row_is_refused(model_type, dtype, monkeypatch):
    monkeypatch.setitem(FAMILIES, model_type, WRONG[model_type])
    model = tiny.model(model_type.removesuffix("_text")).to(dtype)
    before = state_of(model)
    with pytest.raises(ValueError, match=REFUSED) as error, attach(model, tiny.pids(model)):
        pass
    assert str(WRONG[model_type]) in str(error.value)
    assert state_of(model) == before


def test_a_key_that_is_right_at_position_zero_only_is_refused(monkeypatch):
    def first_everywhere(output, dims):
        return output[:, :1].expand_as(output)

    monkeypatch.setitem(FAMILIES, "llama", Family(key=Site("k_proj", first_everywhere)))
    with pytest.raises(ValueError, match=REFUSED):
        family_of(tiny.model("llama"))


@pytest.mark.parametrize("family", tiny.ALL_CONFIGS)
def test_a_model_type_without_a_row_is_tried_with_every_row(family, monkeypatch):
    model = tiny.model(family, "eager")
    model.config.model_type = "unheard_of"
    assert str(family_of(model)) == str(FAMILIES[tiny.ALL_CONFIGS[family].model_type])


def check_laws(model):
    pids = tiny.pids(model)
    routing = tiny.routing(model, 3)
    inputs = tiny.prompts()
    plain = logits_of(model, inputs)
    unrouted = routed_logits(model, inputs, pids, no_routing(model, 3))
    assert (unrouted - plain).abs().max() == 0.0
    with reference_routed(model, pids, routing):
        expected = logits_of(model, inputs)
    assert (routed_logits(model, inputs, pids, routing) - expected).abs().max() <= CLOSE
    assert (expected - plain).abs().max() > MATTERS


@pytest.mark.parametrize(
    "config_class", [GemmaConfig, MinistralConfig, Olmo3Config, Starcoder2Config]
)
def test_an_unknown_model_of_known_build_is_routed(config_class):
    model = decoder(config_class)
    assert model.config.model_type not in FAMILIES
    check_laws(model)


def test_a_family_is_added_as_the_page_says(monkeypatch):
    page = Path(__file__).parents[1] / "docs" / "families.md"
    model = decoder(
        PersimmonConfig, hidden_size=60, num_key_value_heads=6, partial_rotary_factor=0.4
    )
    with pytest.raises(ValueError, match=f"'persimmon' models {REFUSED}"):
        family_of(model)
    monkeypatch.setitem(FAMILIES, "persimmon", None)  # so that the page's row goes with the test
    exec(re.search(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[1], {})
    check_laws(model)


@pytest.mark.parametrize(
    ("config_class", "settings"),
    [
        (GPTJConfig, {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}),
        (HunYuanDenseV1Config, {}),  # normalises queries and keys after rotary embedding
        (PhiConfig, {"hidden_size": 60, "qk_layernorm": True, "partial_rotary_factor": 0.4}),
        (StableLmConfig, {"hidden_size": 60, "qk_layernorm": True}),
    ],
)
def test_a_model_whose_queries_are_elsewhere_is_refused_in_a_sentence(config_class, settings):
    with pytest.raises(
        ValueError,
        match=rf"'{config_class.model_type}' models {REFUSED}.*layers\.\*\.self_attn\.q_proj",
    ):
        family_of(decoder(config_class, **settings))


def test_an_encoder_with_a_decoder_is_refused():
    config = BartConfig(
        vocab_size=31, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8
    )
    with pytest.raises(
        ValueError, match="'bart' models cannot be routed: expected a decoder, got an encoder"
    ):
        family_of(BartForConditionalGeneration(config))


def test_rotary_tables_that_scale_a_part_of_the_head_pass():
    longrope = {
        "rope_type": "longrope",
        "short_factor": [1.5] * 2,
        "long_factor": [3.0] * 2,
        "rope_theta": 1e4,
    }
    rope = {
        "rope_parameters": longrope | {"partial_rotary_factor": 0.4},
        "original_max_position_embeddings": 64,
    }
    model = decoder(Phi3Config, hidden_size=60, **rope)
    assert model.model.rotary_emb.attention_scaling > 1.1
    assert family_of(model) == FAMILIES["phi3"]


def test_the_wiring_is_checked_once_per_model(monkeypatch):
    model = tiny.model("llama")
    runs = []
    model.model.register_forward_hook(lambda *args: runs.append(1))
    for _ in range(3):
        with attach(model, tiny.pids(model)):
            pass
    assert len(runs) == 1
