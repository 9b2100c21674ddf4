import pytest
import torch

import tiny
from icrouting.config import HIDDEN
from icrouting.decoder.passes import next_token_logits
from icrouting.routing.effect import run_both
from inspected import LAYERS, OPTIONS, prompts, sharp_router

# fp32 round-off between kernels on logits of size 30
CLOSE = 1e-4
# Of rows of float32 attention weights
SUM_CLOSE = 1e-5


@pytest.fixture(params=["llama", "gemma2", "gpt2"])
def world(request, tokenizer, encoder_folder, monkeypatch):
    # sdpa has no soft cap
    model = tiny.model(request.param, "eager" if request.param == "gemma2" else "sdpa")
    return model, tokenizer, sharp_router(model, tokenizer, encoder_folder, monkeypatch)


@pytest.fixture
def llama(tokenizer, encoder_folder, monkeypatch):
    model = tiny.model("llama")
    return model, tokenizer, sharp_router(model, tokenizer, encoder_folder, monkeypatch)


def state_of(model):
    hooks = [(*m._forward_hooks.values(), *m._forward_pre_hooks.values()) for m in model.modules()]
    return model.config._attn_implementation, hooks, sorted(vars(model))


def both(world, prompt, strength=1.0):
    model, tokenizer, icr = world
    with icr.attached(model, tokenizer, strength=strength):
        return run_both(model, tokenizer(prompt).input_ids, LAYERS)


def test_both_passes_are_the_models_own(world):
    model, tokenizer, icr = world
    passes, inputs = both(world, prompts()[0]), tokenizer(prompts()[0], return_tensors="pt")
    plain = model(**inputs).logits[0, -1]
    with icr.attached(model, tokenizer):
        routed = model(**inputs).logits[0, -1]
    assert (passes.logits - torch.stack([plain, routed])).abs().max() < CLOSE
    assert (plain - routed).abs().max() > 100 * CLOSE
    assert not passes.is_nothing


def test_rows_sum_to_one_and_the_mass_that_moves_is_a_share(world):
    passes, n_tokens = both(world, prompts()[0]), len(world[1](prompts()[0]).input_ids)
    assert (passes.attn_weights.sum(-1) - 1).abs().max() < SUM_CLOSE
    assert passes.attn_weights.shape[-1] == passes.mass_moved.shape[-1] == n_tokens
    assert passes.mass_moved.min() >= 0
    assert passes.mass_moved.max() <= 1 + SUM_CLOSE
    assert passes.mass_moved[..., 0].max() == 0, "the first token sees itself alone"
    last = passes.attn_weights.diff(dim=0)[0].clamp_min(0).sum(-1)
    assert (passes.mass_moved[..., -1] - last).abs().max() < SUM_CLOSE, (
        "what some tokens gain, others lose"
    )


def test_attention_weights_are_those_that_transformers_gives_out(world):
    model, tokenizer, _ = world
    passes = both(world, prompts()[0])
    other = tiny.model(model.config.model_type, "eager")
    with torch.no_grad():
        given = other(
            **tokenizer(prompts()[0], return_tensors="pt"), output_attentions=True
        ).attentions
    expected = torch.stack([given[layer][0, :, -1] for layer in LAYERS])
    assert torch.allclose(passes.attn_weights[0], expected, atol=SUM_CLOSE)


def test_nothing_moves_at_strength_zero(world):
    passes = both(world, prompts()[0], strength=0.0)
    assert passes.kl == 0.0
    assert passes.mass_moved.max() == 0.0
    assert torch.equal(*passes.logits)
    assert passes.is_nothing


def test_the_model_is_as_found_also_after_an_exception(world, monkeypatch):
    before = state_of(world[0])
    both(world, prompts()[0])
    assert state_of(world[0]) == before
    ran = []

    def interrupted(model, batch):
        ran.append(model.config._attn_implementation)
        if len(ran) == 2:
            raise RuntimeError
        return next_token_logits(model, batch)

    monkeypatch.setattr("icrouting.routing.effect.next_token_logits", interrupted)
    with pytest.raises(RuntimeError):
        both(world, prompts()[0])
    assert ran == ["eager", "icrouting_eager"]
    assert state_of(world[0]) == before


def test_inside_attached_the_model_stays_routed(llama):
    model, tokenizer, icr = llama
    with icr.attached(model, tokenizer) as routed:
        expected = routed.score(prompts(), OPTIONS)
        routed.effect(prompts()[:2])
        assert (routed.score(prompts(), OPTIONS) - expected).abs().max() < CLOSE


def test_the_line_holds_means_over_prompts(llama):
    model, tokenizer, icr = llama
    each = [both(llama, prompt) for prompt in prompts()[:3]]
    with icr.attached(model, tokenizer) as routed:
        line = routed.effect(prompts()[:3])
    n_changed = sum(int(one.logits[0].argmax() != one.logits[1].argmax()) for one in each)
    assert line.startswith("effect on 3 prompts: logits moved ")
    assert f"KL {sum(one.kl for one in each) / 3:.3g} nats" in line
    assert f"top token changed in {n_changed} of 3" in line
    assert (
        "attention moved "
        f"{100 * sum(one.mass_moved[..., -1].mean().item() for one in each) / 3:.3g} %" in line
    )
    assert "(layers 3 to 4)" in line
    assert "\n" not in line


@pytest.mark.slow
def test_without_prompts_those_of_the_last_call_are_taken(llama):
    model, tokenizer, icr = llama
    with icr.attached(model, tokenizer) as routed:
        with pytest.raises(ValueError, match="nothing has been routed yet"):
            routed.effect()
        routed.score(prompts(), OPTIONS)
        whole = routed.effect()
        assert whole.startswith(f"effect on {len(prompts())} prompts")
        assert routed.effect() == whole
        model(**tokenizer(prompts()[1], return_tensors="pt"))
        assert routed.effect() == routed.effect([prompts()[1]])


def test_an_edit_that_is_numerically_nothing_warns(llama):
    model, tokenizer, icr = llama
    for strength in (0.0, 1e-9):
        with icr.attached(model, tokenizer, strength=strength) as routed:
            routed.score(prompts()[:2], OPTIONS)
            with pytest.warns(UserWarning, match="numerically nothing.*is `strength` 0"):
                line = routed.effect()
        assert "top token changed in 0 of 2" in line


def test_a_change_below_bfloat16s_rounding_warns(tokenizer, encoder_folder, monkeypatch):
    model = tiny.model("llama").to(torch.bfloat16)
    icr = sharp_router(model, tokenizer, encoder_folder, monkeypatch)
    with (
        icr.attached(model, tokenizer, strength=1e-5) as routed,
        pytest.warns(UserWarning, match="nothing"),
    ):
        routed.effect(prompts()[:1])
    with icr.attached(model, tokenizer) as routed:
        assert "effect on 1 prompt:" in routed.effect(prompts()[:1])


def test_a_router_of_the_backbones_own_state_is_seen_alike(tokenizer, monkeypatch):
    model = tiny.model("llama")
    icr = sharp_router(model, tokenizer, HIDDEN, monkeypatch)
    with icr.attached(model, tokenizer) as routed:
        alone = [routed.effect([prompt]) for prompt in prompts()[:2]]
        assert alone[0] != alone[1]
        model.generate(
            **tokenizer(prompts()[0], return_tensors="pt"), max_new_tokens=3, num_beams=2
        )
        assert routed.effect() == alone[0]
