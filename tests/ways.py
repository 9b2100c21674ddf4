"""Every way of running a model, as data.

`test_ways.py` runs the list, `docs/support.py` makes a page of it.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import accelerate
import peft
import torch
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    DynamicCache,
    QuantizedCache,
    StaticCache,
)

import tiny
from bench import CLOSE, MATTERS, Bench, rows_of
from icrouting.config import FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import CACHE
from icrouting.decoder.identity import fingerprint
from icrouting.decoder.partial import late_entry
from icrouting.fitting.training import Query, Trainer
from icrouting.fitting.trunk import run_trunk
from icrouting.icr import InContextRouter
from icrouting.routing.attach import attach
from icrouting.routing.router import Router


@dataclass(frozen=True)
class Way:
    """A way of running a routed model.

    `check` tries it on a bench, None where it is untested or tested `elsewhere`; `raises` is what
    it is refused with, `note` a remark or the reason why it is untested.
    """

    group: str
    name: str
    check: Callable[[Bench], None] | None = None
    raises: str = ""
    note: str = ""
    elsewhere: str = ""

    @property
    def outcome(self):
        if self.check is None and not self.elsewhere:
            return "untested"
        return "raises" if self.raises else "works"


def generates(*rows, family="llama", fast=None, drop=(), **both):
    """Generation in a batch of `rows` equals the slow run.

    `fast` are the settings that the slow run lacks.
    """

    def check(bench):
        on = bench if family == bench.family else bench.of(family)
        on.check_tokens(*rows, fast=fast(on) if callable(fast) else fast, drop=drop, **both)

    return check


def pads(side, positions):
    return lambda bench: bench.check_logits(0, 1, 2, side=side, positions=positions)


def needs_no_padding(positions):
    def check(bench):
        for row in range(3):
            bench.check_logits(row, positions=positions)

    return check


def seen_by_four_dimensional_mask(bench):
    inputs = bench.inputs(0, 1, 2, positions=True)
    real = inputs["attention_mask"].bool()
    n_tokens = real.shape[1]
    causal = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril()
    inputs["attention_mask"] = causal & real[:, None, None] | torch.eye(n_tokens, dtype=torch.bool)
    with bench.attached():
        logits = bench.model(**inputs).logits
    for row in range(3):
        assert (logits[row][real[row]] - bench.slow_logits(row)[0]).abs().max() <= CLOSE


def masked_as_long_as_its_cache(bench):
    inputs = bench.inputs(0, 1, 2, side="right", positions=True)
    real, spare = inputs["attention_mask"].bool(), torch.zeros(3, 5, dtype=torch.long)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], spare], 1)
    cache = StaticCache(config=bench.model.config, max_cache_len=inputs["attention_mask"].shape[1])
    with bench.attached():
        logits = bench.model(**inputs, **{CACHE: cache}).logits
    for row in range(3):
        assert (logits[row][real[row]] - bench.slow_logits(row)[0]).abs().max() <= CLOSE


def in_inference_mode(bench):
    with torch.inference_mode():
        bench.check_logits(0, 1, 2)
    bench.check_logits(0, 1, 2)


def looped_by_hand(bench):
    def greedy(
        model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
    ):
        for _ in range(generation_config.max_new_tokens):
            logits = model(input_ids=input_ids, use_cache=False).logits
            input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], 1)
        return input_ids

    bench.check_tokens(0, fast={"custom_generate": greedy})


class Streamer:
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.tokens.append("end")


def streams(bench):
    streamer = Streamer()
    bench.check_tokens(0, fast={"streamer": streamer})
    assert len(streamer.tokens) > 8
    assert streamer.tokens[-1] == "end"


def batches_continuously(bench):
    with bench.attached():
        bench.model.generate_batch(bench.inputs(0)["input_ids"].tolist(), max_new_tokens=3)


def pages(bench):
    with bench.attached():
        bench.model.generate(**bench.inputs(0), max_new_tokens=3, cache_implementation="paged")


def compiles(bench):
    """What was compiled before is neither used nor spoiled."""
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    settings = {"cache_implementation": "static", "compile_config": config}
    plain = bench.tokens(bench.model, bench.inputs(0), **settings)
    for _ in range(2):
        bench.check_tokens(0, fast=settings)
    assert torch.equal(bench.tokens(bench.model, bench.inputs(0), **settings), plain)
    compiled = torch.compile(bench.model, backend="eager")
    with bench.attached(compiled):
        logits = compiled(**bench.inputs(0)).logits
    assert (logits - bench.slow_logits(0)).abs().max() <= CLOSE


def takes_turns(make_cache, **settings):
    return lambda bench: bench.check_turns(make_cache(bench.model.config), **settings)


def dynamic(config):
    return DynamicCache(config=config)


def static(config):
    return StaticCache(config=config, max_cache_len=64)


def quantizes(bench):
    """Eight bits are too coarse for equality.

    The error stays a small part of what routing changes.
    """
    prompt = bench.inputs(0)["input_ids"]
    cache = QuantizedCache("fp8", config=bench.model.config)
    with bench.attached():
        bench.model(input_ids=prompt[:, :-4], **{CACHE: cache})
        pieces = [
            bench.model(input_ids=ids, **{CACHE: cache}).logits
            for ids in prompt[:, -4:].split(1, 1)
        ]
    # The routing is that of the first piece, so the slow run gets it too.
    text = bench.tokenizer.decode(prompt[0, :-4])
    with bench.attached() as routed:
        decided = routed.routing([text])
    with attach(bench.model, bench.icr.pids) as attachment:
        attachment.routing = decided
        expected = bench.model(input_ids=prompt, use_cache=False).logits[:, -4:]
    plain = bench.model(input_ids=prompt, use_cache=False).logits[:, -4:]
    assert (torch.cat(pieces, 1) - expected).abs().mean() < 0.3 * (plain - expected).abs().mean()


def allocates_ahead(bench):
    cache = static(bench.model.config)
    cache.early_initialization(
        batch_size=1, num_heads=3, head_dim=10, dtype=torch.float32, device="cpu"
    )
    bench.check_tokens(0, fast={CACHE: cache})


def starts_a_reset_cache_anew(bench):
    cache = static(bench.model.config)
    with bench.attached():
        bench.tokens(bench.model, bench.inputs(1), **{CACHE: cache})
        cache.reset()
        got = bench.tokens(bench.model, bench.inputs(0), **{CACHE: cache})
    assert torch.equal(got, bench.slow_tokens(0))


def interleaves_two_caches(bench):
    steps = [torch.tensor([[token]]) for token in (9, 17, 5)]
    prompts = [bench.inputs(row)["input_ids"] for row in (0, 1)]
    with bench.attached():
        caches = [bench.model(input_ids=prompt, use_cache=True)[CACHE] for prompt in prompts]
        for number, step in enumerate(steps, 1):
            for row, cache in enumerate(caches):
                got = bench.model(input_ids=step, **{CACHE: cache}).logits
                expected = bench.slow_logits(
                    row, input_ids=torch.cat([prompts[row], *steps[:number]], 1)
                )
                assert (got[0, 0] - expected[0, -1]).abs().max() <= CLOSE


def continues_a_foreign_cache(bench, through_generate=False):
    cache, more = (
        bench.foreign_cache(),
        torch.cat([bench.inputs(0)["input_ids"], torch.tensor([[9]])], 1),
    )
    with bench.attached():
        if through_generate:
            bench.model.generate(input_ids=more, max_new_tokens=2, **{CACHE: cache})
        bench.model(input_ids=more[:, -1:], **{CACHE: cache})


def continues_a_copied_cache(bench):
    with bench.attached():
        cache = bench.model(**bench.inputs(0), use_cache=True)[CACHE]
        bench.model(input_ids=torch.tensor([[9]]), **{CACHE: copy.deepcopy(cache)})


def in_pieces_outside_generate(bench):
    prompt, cache = bench.inputs(0)["input_ids"], dynamic(bench.model.config)
    with bench.attached() as routed:
        pieces = [
            bench.model(input_ids=piece, **{CACHE: cache}).logits for piece in prompt.split(7, 1)
        ]
        decided = routed.routing([bench.tokenizer.decode(prompt[0, :7])])
    with attach(bench.model, bench.icr.pids) as attachment:
        attachment.routing = decided
        expected = bench.model(input_ids=prompt, use_cache=False).logits
    assert (torch.cat(pieces, 1) - expected).abs().max() <= CLOSE


def routes_two_models_at_once(bench):
    other = bench.of("qwen2")
    with bench.attached(), other.attached():
        got = [side.tokens(side.model, side.inputs(0)) for side in (bench, other)]
    assert torch.equal(got[0], bench.slow_tokens(0))
    assert torch.equal(got[1], other.slow_tokens(0))


def routes_one_model_twice_in_turn(bench):
    second, first = copy.copy(bench), bench.icr
    second.icr = bench.router(seed=5, layers=(1, 4))
    with second.attached() as routed:
        second.routing = routed.routing(bench.texts)
    for side in (bench, second, bench):
        side.check_tokens(0, 1)
    assert bench.icr is first
    assert not torch.equal(bench.slow_tokens(0), second.slow_tokens(0))


def routes_one_model_twice_at_once(bench):
    with bench.attached(), bench.attached():
        pass


def wrapped(bench, config, kernel="sdpa"):
    torch.manual_seed(0)
    with (
        warnings.catch_warnings()
    ):  # peft 0.21 asks transformers 5.23 for an attribute by its old name
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )
        return peft.get_peft_model(bench.fresh(kernel), config).eval().requires_grad_(False)


def with_lora(bench, kernel="sdpa"):
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False
    )
    return wrapped(bench, config, kernel)


def routes_a_lora(bench):
    model, dense = with_lora(bench), with_lora(bench, "eager")
    assert fingerprint(model) == fingerprint(bench.model)
    assert (
        model(**bench.inputs(0)).logits - bench.model(**bench.inputs(0)).logits
    ).abs().max() > MATTERS
    bench.check_logits(0, 1, 2, model=model, dense=dense)
    bench.check_tokens(0, 1, 2, model=model, dense=dense)


def fits_on_a_lora(bench):
    config = FitConfig(
        (3, 4),
        3,
        n_prompts=6,
        demos_per_class=1,
        n_queries=6,
        epochs=1,
        min_steps=0,
        patience=0,
        encoder=str(bench.encoder),
    )
    model = with_lora(bench)
    icr = InContextRouter.fit(model, bench.tokenizer, [tiny.task()], config)
    with icr.attached(model, bench.tokenizer) as routed:
        assert routed.score(bench.texts, ["negative", "positive"]).shape == (3, 2)


def routes_a_merged_lora(bench):
    with bench.attached(with_lora(bench).merge_and_unload()):
        pass


def routes_virtual_tokens(bench):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with bench.attached(wrapped(bench, config)):
        pass


def in_half_precision(dtype):
    """A routed model's rounding error is that of the plain model, up to a factor of two."""

    def check(bench):
        inputs, narrow = bench.inputs(0), bench.fresh().to(dtype)
        wide = copy.deepcopy(narrow).float()
        errors = []
        for gates in (0.0, 1.0):
            logits = []
            for model in (narrow, wide):
                with attach(model, bench.icr.pids) as attachment:
                    attachment.routing = rows_of(bench.routing, 0).scaled(gates)
                    logits.append(model(**inputs).logits.float())
            errors.append((logits[0] - logits[1]).abs().mean())
        assert errors[1] < 2 * errors[0]
        assert (logits[1] - wide(**inputs).logits).abs().mean() > 2 * errors[1]

    return check


def off_loads(load):
    def check(bench):
        with tempfile.TemporaryDirectory() as folder:
            model = load(bench, folder)
            assert any(weight.is_meta for weight in model.parameters())
            assert fingerprint(model) == fingerprint(bench.model)
            bench.check_logits(0, 1, 2, model=model)
            bench.check_tokens(0, model=model)
            with bench.attached(model) as routed, bench.attached() as expected:
                scores = [
                    side.score(bench.texts, ["negative", "positive"]) for side in (routed, expected)
                ]
            assert torch.allclose(*scores, atol=CLOSE)

    return check


def by_device_map(bench, folder):
    bench.model.save_pretrained(folder)
    places = {f"model.layers.{layer}": "disk" if layer in (1, 4) else "cpu" for layer in range(5)}
    places |= dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=f"{folder}/off"
    )
    model.generation_config.pad_token_id = 1
    return model.requires_grad_(False)


def trains_with_checkpointing(bench):
    """Loss and gradients are the same, and every routed layer runs again in the backward pass."""
    prompts = bench.tokenizer(bench.texts).input_ids
    states, generator = (
        run_trunk(Decoder.of(bench.model, tiny.tokenizer()), prompts, 3),
        torch.Generator().manual_seed(0),
    )
    queries = [Query(state, torch.randn(12, generator=generator), [5, 9], 1) for state in states]
    outcomes = []
    for checkpointing in (False, True):
        model, runs = bench.fresh(), []
        if checkpointing:
            model.activation_checkpointing_enable()
        router = Router(12, 2, 6, 3, 13, torch.Generator().manual_seed(0))
        torch.nn.init.ones_(router.alpha[-1].weight)
        last = model.model.layers[4]
        trainer = Trainer(
            Decoder.of(model, tiny.tokenizer()),
            bench.icr.pids,
            router,
            queries,
            FitConfig((3, 4), 3, batch_size=3, min_steps=0, patience=0),
        )
        with attach(model, bench.icr.pids) as attachment, late_entry(model, 3) as entry:
            last.register_forward_pre_hook(lambda *args, runs=runs: runs.append(1))
            loss = sum(trainer._terms(entry, attachment, queries).values())
            loss.backward()
        outcomes.append(
            (loss.detach(), torch.cat([weight.grad.flatten() for weight in router.parameters()]))
        )
        assert len(runs) == 1 + checkpointing
        assert not any(type(layer).__name__ == "_Checkpointed" for layer in model.model.layers)
    for without, with_it in zip(*outcomes, strict=True):
        assert torch.allclose(without, with_it, rtol=1e-4, atol=1e-6)
    assert outcomes[0][1].abs().max() > 1e-3


def by_kernel(kernel):
    def check(bench):
        model = bench.fresh(kernel)
        bench.check_logits(0, 1, 2, model=model)
        bench.check_tokens(0, 1, 2, model=model)

    return check


def by_flex(bench):
    model = bench.fresh()
    model.config._attn_implementation = "flex_attention"
    with bench.attached(model):
        pass


def gives_attention_weights(bench):
    model, inputs = bench.fresh("eager"), bench.inputs(0)
    plain = model(**inputs, output_attentions=True).attentions
    bench.check_logits(0, model=model, output_attentions=True)
    with bench.attached(model):
        routed = model(**inputs, output_attentions=True).attentions
    for layer, (before, after) in enumerate(zip(plain, routed, strict=True)):
        assert after.shape == before.shape
        assert (after.sum(-1) - 1).abs().max() < CLOSE
        assert ((after - before).abs().max() > 0.01) == (layer >= 3)


def from_embeddings(bench, through_generate=False):
    embeddings = bench.model.get_input_embeddings()(bench.inputs(0)["input_ids"])
    with bench.attached():
        if through_generate:
            bench.model.generate(inputs_embeds=embeddings, max_new_tokens=2)
        bench.model(inputs_embeds=embeddings)


def uses_what_was_left(bench):
    with bench.attached() as routed:
        pass
    routed.score(bench.texts, ("negative", "positive"))


def takes_generate_before(bench):
    taken_before = bench.model.generate
    with bench.attached():
        taken_before(**bench.inputs(0), max_new_tokens=2)


def swaps_a_module(bench):
    model = bench.fresh()
    with bench.attached(model):
        model.model.layers[3].self_attn.q_proj = model.model.layers[2].self_attn.q_proj
        model(**bench.inputs(0))


def copies(bench):
    with bench.attached():
        copy.deepcopy(bench.model)


def sets_another_kernel(bench):
    model = bench.fresh()
    with bench.attached(model):
        model.set_attn_implementation("eager")
        model(**bench.inputs(0))


ONE, ALL = (0,), (0, 1, 2)
EMBEDS = "a routed model needs `input_ids` to be routed by, got `inputs_embeds` alone"
UNKNOWN = "this cache is unknown here: it was filled outside `attached`, or is a copy"
PACKED = "an attached model cannot batch continuously, which packs all prompts into one row"
LEFT = "the model is no longer attached"
TO_HUB = "transformers moved them to repositories of the hub, whose code is not looked at here"
FLASH = "wired up; its kernels need an accelerator"

WAYS = (
    Way("Padding", "padded on the left, explicit position ids", pads("left", True)),
    Way(
        "Padding",
        "padded on the left, implicit position ids",
        pads("left", False),
        note="in a plain call not of GPT-2, which counts padding as positions, routed or not",
    ),
    Way("Padding", "padded on the right, explicit position ids", pads("right", True)),
    Way("Padding", "padded on the right, implicit position ids", pads("right", False)),
    Way("Padding", "no padding, explicit position ids", needs_no_padding(True)),
    Way("Padding", "no padding, implicit position ids", needs_no_padding(False)),
    Way("Padding", "`generate` without a mask", generates(*ALL, drop=("attention_mask",))),
    Way("Padding", "a 4-D mask of one's own", seen_by_four_dimensional_mask),
    Way("Padding", "`torch.no_grad`, `torch.inference_mode`", in_inference_mode),
    Way("Padding", "`inputs_embeds` in a call", from_embeddings, EMBEDS),
    Way(
        "Padding",
        "`inputs_embeds` in `generate`",
        lambda bench: from_embeddings(bench, True),
        EMBEDS,
    ),
    Way("Decoding", "greedy", generates(*ALL)),
    Way("Decoding", "sampling with a seed", generates(*ONE, do_sample=True, seed=5)),
    Way(
        "Decoding",
        "sampling with top-k, top-p, min-p and typical filters",
        generates(*ONE, do_sample=True, top_k=9, top_p=0.9, min_p=0.01, typical_p=0.9),
    ),
    Way(
        "Decoding",
        "several samples of a prompt",
        generates(*ONE, do_sample=True, num_return_sequences=3),
    ),
    Way("Decoding", "beam search", generates(*ALL, num_beams=3)),
    Way(
        "Decoding",
        "several beams of a prompt",
        generates(*ALL, num_beams=3, num_return_sequences=2),
    ),
    Way("Decoding", "beam sampling", generates(*ONE, num_beams=3, do_sample=True)),
    Way(
        "Decoding",
        "repetition penalty, n-grams and words that are forbidden",
        generates(*ALL, repetition_penalty=1.3, no_repeat_ngram_size=2, bad_words_ids=[[9]]),
    ),
    Way(
        "Decoding",
        "classifier-free guidance",
        generates(*ONE, guidance_scale=1.5),
        note="the pass without the prompt is routed by the prompt too",
    ),
    Way("Decoding", "prompt lookup", generates(*ONE, fast={"prompt_lookup_num_tokens": 3})),
    Way(
        "Decoding",
        "assisted by another model",
        generates(*ONE, fast=lambda bench: {"assistant_model": tiny.model("llama", seed=4)}),
        note="the assistant is routed only if it is attached itself",
    ),
    Way(
        "Decoding",
        "assisted by the model itself",
        generates(*ONE, fast=lambda bench: {"assistant_model": bench.model}),
    ),
    Way("Decoding", "drafts by early exit", generates(*ONE, fast={"assistant_early_exit": 4})),
    Way("Decoding", "a streamer", streams),
    Way("Decoding", "a decoding loop of one's own (`custom_generate`)", looped_by_hand),
    Way("Decoding", "contrastive search, DoLa, group and constrained beams", note=TO_HUB),
    Way("Decoding", "multi-token prediction, DFlash", note="needs models with heads for it"),
    Way("Decoding", "`generate_batch`, continuous batching", batches_continuously, PACKED),
    Way("Decoding", '`cache_implementation="paged"`', pages, PACKED),
    Way(
        "Decoding",
        "compiled (`compile_config`, `torch.compile`)",
        compiles,
        note="inside `attached` everything runs uncompiled: a compiled graph does not notice hooks",
    ),
    Way("Caches", "none", generates(*ALL, fast={"use_cache": False})),
    Way(
        "Caches",
        "dynamic",
        generates(*ALL, fast=lambda bench: {CACHE: dynamic(bench.model.config)}),
    ),
    Way("Caches", "static", generates(*ALL, fast={"cache_implementation": "static"})),
    Way(
        "Caches",
        "static, with beams",
        generates(*ALL, num_beams=3, fast={"cache_implementation": "static"}),
    ),
    Way("Caches", "static, allocated ahead", allocates_ahead),
    Way("Caches", "sliding, dynamic (Gemma 3)", generates(*ALL, family="gemma3")),
    Way(
        "Caches",
        "sliding, static (Mistral)",
        generates(*ALL, family="mistral", fast={"cache_implementation": "static"}),
    ),
    Way("Caches", "quantized, `fp8`", quantizes, note="lossy, so compared within a bound"),
    Way(
        "Caches",
        "quantized, `quanto` and `hqq`",
        note="tried by hand, the packages being large; "
        "`q_group_size` must divide what heads, now wider, hold",
    ),
    Way(
        "Caches",
        "off-loaded, dynamic and static",
        note="transformers moves them on an accelerator's streams",
    ),
    Way("Caches", "chunked prefill, dynamic", generates(*ONE, fast={"prefill_chunk_size": 5})),
    Way(
        "Caches",
        "chunked prefill, static",
        generates(*ONE, fast={"prefill_chunk_size": 5, "cache_implementation": "static"}),
    ),
    Way(
        "Caches",
        "a prompt fed in pieces to `model(...)`",
        in_pieces_outside_generate,
        note="routed by the first piece",
    ),
    Way("Caches", "a kept cache in `model(...)`", takes_turns(dynamic, through_generate=False)),
    Way(
        "Caches",
        "a kept cache in `generate`, dynamic",
        takes_turns(dynamic),
        note="routed by the first turn",
    ),
    Way(
        "Caches",
        "a kept cache in `generate`, static",
        takes_turns(static),
        note="routed by the first turn",
    ),
    Way("Caches", "a kept cache that was cropped", takes_turns(dynamic, cropped=3)),
    Way("Caches", "a cache that was reset, and another prompt", starts_a_reset_cache_anew),
    Way("Caches", "two caches in turn", interleaves_two_caches),
    Way("Caches", "a cache filled outside `attached`", continues_a_foreign_cache, UNKNOWN),
    Way(
        "Caches",
        "the same in `generate`",
        lambda bench: continues_a_foreign_cache(bench, through_generate=True),
        UNKNOWN,
    ),
    Way("Caches", "a copied cache", continues_a_copied_cache, UNKNOWN),
    Way("Caches", "a mask as long as the static cache", masked_as_long_as_its_cache),
    Way(
        "Caches",
        "rows of a kept cache reordered or selected by hand",
        note="not followed, and not noticed: a row keeps the routing of its old place",
    ),
    Way(
        "Routers",
        "several threads in one `attached`",
        note="one call after the other; leaving waits for a call that runs",
        elsewhere="tests/test_in_use.py",
    ),
    Way(
        "Routers",
        "a `generate` that began, or was taken, before `attached`",
        takes_generate_before,
        "this `generate` began before the method was attached",
    ),
    Way("Routers", "what `attached` gave, after its `with`", uses_what_was_left, LEFT),
    Way(
        "Routers",
        "another routing for every row of a batch",
        lambda bench: bench.check_logits(2, 0, 1),
    ),
    Way("Routers", "two routed models at once", routes_two_models_at_once),
    Way("Routers", "two routers on one model, in turn", routes_one_model_twice_in_turn),
    Way(
        "Routers",
        "two routers on one model at once",
        routes_one_model_twice_at_once,
        "icr is attached to this model: leave it before icr is fitted or attached",
    ),
    Way(
        "Models",
        "a LoRA, in peft's wrapper",
        routes_a_lora,
        note="on the queries, keys and values that it makes",
    ),
    Way("Models", "a router fitted with a LoRA in place", fits_on_a_lora),
    Way(
        "Models",
        "a merged LoRA",
        routes_a_merged_lora,
        "this router was fitted on",
        "other weights: fit a router",
    ),
    Way(
        "Models",
        "prompt and prefix tuning",
        routes_virtual_tokens,
        "PeftModelForCausalLM puts tokens of its own before the prompt: expected a LoRA or none",
    ),
    Way(
        "Models",
        "modules replaced, wrapped or removed while attached",
        swaps_a_module,
        "was replaced, wrapped or removed while the model is attached",
    ),
    Way("Models", "a copy of an attached model", copies, "a model cannot be copied or pickled"),
    Way(
        "Models",
        "a model of images and text (Gemma 3), given text",
        note="given images it raises",
        elsewhere="tests/test_vision.py",
    ),
    Way("Models", "bfloat16", in_half_precision(torch.bfloat16)),
    Way("Models", "float16", in_half_precision(torch.float16)),
    Way("Models", "layers off-loaded to disk by `device_map`", off_loads(by_device_map)),
    Way(
        "Models",
        "all of it off-loaded to disk by accelerate",
        off_loads(
            lambda bench, folder: accelerate.disk_offload(
                bench.fresh(), folder, execution_device="cpu"
            )
        ),
    ),
    Way(
        "Models",
        "all of it off-loaded to memory by accelerate",
        off_loads(lambda bench, folder: accelerate.cpu_offload(bench.fresh(), "cpu")),
    ),
    Way(
        "Models",
        "from a GGUF file",
        note="the demo's model, which is a download",
        elsewhere="tests/test_smollm2.py",
    ),
    Way(
        "Models",
        "weights in 8 or 4 bits, several devices, tensor parallelism",
        note="needs accelerators",
    ),
    Way("Training", "activation (gradient) checkpointing", trains_with_checkpointing),
    Way(
        "Training",
        "the same inside `attached`, with several forwards to a backward",
        note="the backward belongs inside the `with`; after it, it raises",
        elsewhere="tests/test_in_use.py",
    ),
    Way(
        "Training",
        "a checkpoint of one's own around the whole model",
        note="its backward belongs inside the `with`: after it, a reentrant one runs the plain "
        "model, and nothing of ours is left to say so",
    ),
    Way("Kernels", "`eager`", by_kernel("eager")),
    Way("Kernels", "`sdpa`", by_kernel("sdpa")),
    Way(
        "Kernels",
        "another implementation set while attached",
        sets_another_kernel,
        "the attention implementation was set to 'eager' while the model is attached",
    ),
    Way("Kernels", "`flash_attention_2`", note=FLASH),
    Way("Kernels", "`flash_attention_3`", note=FLASH),
    Way(
        "Kernels",
        "`flex_attention`",
        by_flex,
        "attention implementation 'flex_attention' cannot be routed",
    ),
    Way(
        "Kernels",
        "`output_attentions` on `eager`",
        gives_attention_weights,
        note="`sdpa` gives none, routed or not",
    ),
)
