"""What the processor's tests show holds on an accelerator too: they skip where there is none."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, LlamaConfig, StaticCache

import test_rivals
import tiny
from icrouting import FitConfig, InContextRouter
from icrouting.decoder.families import CACHE
from icrouting.decoder.loading import load_model
from icrouting.decoder.scoring import score_options
from icrouting.methods.registry import LEARNING
from icrouting.routing.attach import attach
from icrouting.tasks.prompts import Prompt
from reference import reference_routed

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no accelerator here"
)
# fp32 round-off of logits of size 10 through five layers, by another machine's kernels
CLOSE = 1e-4


def there(inputs):
    return {name: value.to("cuda") for name, value in inputs.items()}


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [family for family in tiny.ALL_CONFIGS if family != "gemma2"])
def test_routed_attention_there_equals_the_dense_reference_here(family, kernel):
    inputs, dense = tiny.prompts(), tiny.model(family, "eager")
    model, real = tiny.model(family, kernel).to("cuda"), inputs["attention_mask"].bool()
    pids, routing = tiny.pids(model), tiny.routing(model, 3)
    with reference_routed(dense, pids, routing):
        expected = dense(**inputs).logits[real]
    plain = model(**there(inputs)).logits
    with attach(model, pids) as attachment:
        attachment.routing = routing
        got = model(**there(inputs)).logits
        attachment.routing = routing.scaled(0.0)
        assert torch.equal(model(**there(inputs)).logits, plain), "zero strength changes logits"
    assert (got.cpu()[real] - expected).abs().max() <= CLOSE
    assert (got - plain).abs().max() > 0.1, "the routing must matter for this to say anything"
    assert torch.equal(model(**there(inputs)).logits, plain)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", list(tiny.CONFIGS))
def test_prefill_and_decoding_there_equal_one_pass_here(family, kind):
    model, inputs = tiny.model(family), tiny.prompts()
    pids, routing, plain = tiny.pids(model), tiny.routing(model, 3), model(**inputs).logits
    with attach(model, pids) as attachment:
        attachment.routing = routing
        expected = model(**inputs).logits
    model, inputs = model.to("cuda"), there(inputs)
    cache = (
        DynamicCache(config=model.config)
        if kind == "dynamic"
        else StaticCache(model.config, max_cache_len=20)
    )
    pieces = []
    with attach(model, pids) as attachment:
        attachment.routing = routing
        for start, stop in [(0, 9), *((at, at + 1) for at in range(9, 17))]:
            step = {name: inputs[name][:, start:stop] for name in ("input_ids", "position_ids")}
            mask = inputs["attention_mask"][:, :stop]
            pieces.append(
                model(**step, attention_mask=mask, use_cache=True, **{CACHE: cache}).logits
            )
    real = inputs["attention_mask"].bool().cpu()
    assert (torch.cat(pieces, 1).cpu() - expected)[real].abs().max() <= CLOSE
    assert (expected - plain)[real].abs().max() > 0.1, (
        "the routing must matter for this to say anything"
    )


def test_the_fused_kernel_takes_the_wider_heads():
    """At a rank of 8 and in bfloat16.

    If it refused them, the slow one would be left, which makes q x kv.
    """
    config = LlamaConfig(**tiny.SIZES | {"hidden_size": 768, "head_dim": 128})
    tokens, found = tiny.prompts((17,))["input_ids"].to("cuda"), []
    for kernel in ("sdpa", "eager"):
        model = tiny.sharp(config, kernel).to("cuda", torch.bfloat16)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            plain = model(tokens).logits
            with attach(model, tiny.pids(model, rank=8)) as attachment:
                attachment.routing = tiny.routing(model, 1, rank=8)
                found.append(model(tokens).logits - plain)
    assert (found[0] - found[1]).abs().mean() < 0.2 * found[1].abs().mean()


@pytest.mark.parametrize("encoder", ["hidden", "sentence"])
def test_a_router_fitted_there_gives_the_same_scores_here(
    encoder, encoder_folder, tokenizer, tmp_path
):
    tasks, model = [tiny.task("toy"), tiny.task("other")], tiny.model("llama").to("cuda")
    name = encoder if encoder == "hidden" else str(encoder_folder)
    config = FitConfig(
        (3, 4),
        3,
        n_prompts=4,
        n_queries=16,
        demos_per_class=1,
        encoder=name,
        lr=0.03,
        epochs=4,
        min_steps=0,
        patience=0,
    )
    InContextRouter.fit(model, tokenizer, tasks, config).save_pretrained(tmp_path)
    icr, found = InContextRouter.from_pretrained(tmp_path), []
    prompts, options = (
        [tasks[0].prompt(example) for example in tasks[0].test],
        tasks[0].spec.options,
    )
    plain = score_options(
        model, tokenizer, [Prompt("", prompt) for prompt in prompts], options
    ).cpu()
    for device in ("cuda", "cpu"):
        model = model.to(device)
        encoded = tokenizer(prompts, return_tensors="pt", padding=True).to(device)
        with icr.attached(model, tokenizer) as routed:
            scores = routed.score(prompts, options).cpu()
            tokens = model.generate(**encoded, max_new_tokens=3, do_sample=False)
        found.append((scores, tokens[:, encoded["input_ids"].shape[1] :].cpu()))
    assert (found[1][0] - plain).abs().max() > 0.1, (
        "the routing must matter for this to say anything"
    )
    assert torch.allclose(found[0][0], found[1][0], atol=CLOSE)
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", LEARNING, ids=lambda kind: kind.name)
def test_every_method_is_fitted_applied_saved_and_loaded_there(
    kind, family, tokenizer, small_settings, tmp_path, monkeypatch
):
    on_processor = tiny.model
    monkeypatch.setattr(
        tiny, "model", lambda *args, **kwargs: on_processor(*args, **kwargs).to("cuda")
    )
    test_rivals.test_fit_apply_leave_save_load(kind, family, tokenizer, small_settings, tmp_path)


def test_a_model_is_loaded_there_in_bfloat16_unless_asked_otherwise(tokenizer, tmp_path):
    tiny.save(tmp_path)
    model, asked = (
        load_model(tmp_path)[0],
        load_model(tmp_path, device="cpu", dtype=torch.float32)[0],
    )
    assert (model.device.type, model.dtype) == ("cuda", torch.bfloat16)
    assert (asked.device.type, asked.dtype) == ("cpu", torch.float32)
