"""Soft prompts through peft: what stands before a prompt, and that nothing of it stays."""

import copy
import sys
import warnings

import peft
import pytest
import torch
from transformers import DynamicCache

import tiny
from fitted import fit_method
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import CACHE, dims_of, stack_of
from icrouting.decoder.scoring import score_options
from icrouting.methods import Settings
from icrouting.methods.soft_prompts import PrefixTuning, PromptTuning
from icrouting.methods.tuning import answered
from icrouting.methods.virtual_tokens import in_front
from icrouting.tasks.prompts import Prompt

TASK = tiny.task("toy", n_test=30)
OTHER = tiny.task("other", n_test=30)
LAW_FAMILIES = ("llama", "qwen3", "gemma3", "gpt_neox")
BOTH = pytest.mark.parametrize("kind", [PromptTuning, PrefixTuning])
SMALL = {"tries": 1, "train_rows": 7, "train_epochs": 2}
WORDS = [17, 200, 31, 8, 90, 121, 44, 63]


def fitted(kind, model, tokenizer, tasks=(TASK,), **changes):
    method = kind(Settings(**SMALL | changes))
    return fit_method(method, model, tokenizer, tasks)


def unfitted(model, kind):
    method = kind(Settings())
    method.decoder = Decoder.of(model, tiny.tokenizer())
    return method


def wide(family):
    """A model whose sliding window spans padding too, before which virtual tokens stand."""
    config = copy.deepcopy(tiny.ALL_CONFIGS[family])
    if hasattr(config, "sliding_window"):
        config.sliding_window = 64
    return tiny.sharp(config, embed_std=0.4 if family == "gemma3" else 1.0)


def random_prompt(model, kind, n_virtual):
    with torch.no_grad():
        start = unfitted(model, kind).start(WORDS[:n_virtual])
    return start + 0.3 * torch.randn(
        start.shape, generator=torch.Generator().manual_seed(n_virtual)
    )


def scores(model, tokenizer, context="", n=7):
    prompts = [
        TASK.prompt(example) + "." * (3 * i % 7) + ":" for i, example in enumerate(TASK.test[:n])
    ]
    return score_options(
        model, tokenizer, [Prompt(context, text) for text in prompts], TASK.spec.options
    )


def whole(model):
    """Everything that could tell that a soft prompt was there."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return (
        state,
        [id(module) for module in model.modules()],
        hooks,
        set(vars(model)),
        model.config.to_dict(),
    )


def same(before, after):
    return before[1:] == after[1:] and all(
        torch.equal(value, after[0][name]) for name, value in before[0].items()
    )


@BOTH
@pytest.mark.parametrize("family", tiny.ALL_CONFIGS)
def test_a_soft_prompt_made_of_tokens_is_those_tokens_in_front(kind, family):
    """On every family: positions are shifted by P, prefix keys are rotated where they stood."""
    model = tiny.model_of(family)
    before = whole(tiny.model_of(family))
    tokens = tiny.prompts((13,))["input_ids"]
    for n_virtual in (1, 8):
        with torch.no_grad():
            front = torch.tensor([WORDS[:n_virtual]])
            expected = model(input_ids=torch.cat([front, tokens], 1)).logits[:, n_virtual:]
            start = unfitted(model, kind).start(WORDS[:n_virtual])
            with in_front(model, kind.kind, start):
                found = model(input_ids=tokens).logits
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, atol=1e-4)
        assert not torch.allclose(found, model(input_ids=tokens).logits, atol=1e-2)
    assert before[2:] == whole(model)[2:]


@BOTH
@pytest.mark.parametrize("family", LAW_FAMILIES)
@pytest.mark.parametrize("n_virtual", [1, 8])
def test_logits_are_those_of_pefts_own_wrapper(kind, family, n_virtual):
    """Which gives P + T of them in prompt tuning."""
    model = tiny.model(family)
    inputs = tiny.prompts(side="right")
    del inputs["position_ids"]  # peft's prompt tuning ignores them
    prompt = random_prompt(model, kind, n_virtual)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(peft, kind.kind)(task_type="CAUSAL_LM", num_virtual_tokens=n_virtual)
        wrapped = peft.get_peft_model(tiny.model(family), config)
        wrapped.prompt_encoder["default"].embedding.weight.data.copy_(prompt)
        theirs = wrapped(**inputs).logits[:, -inputs["input_ids"].shape[1] :]
        assert wrapped.get_nb_trainable_parameters()[0] == prompt.numel()
        with in_front(model, kind.kind, prompt):
            ours = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert torch.allclose(ours[real], theirs[real], atol=1e-5)


@pytest.mark.parametrize("family", LAW_FAMILIES)
def test_a_prompt_is_its_embeddings_prepended(family):
    model = tiny.model(family)
    tokens = tiny.prompts((13,))["input_ids"]
    for n_virtual in (1, 8):
        prompt = random_prompt(model, PromptTuning, n_virtual)
        embeds = torch.cat([prompt[None], model.get_input_embeddings()(tokens)], 1)
        with torch.no_grad():
            expected = model(inputs_embeds=embeds).logits[:, n_virtual:]
            with in_front(model, "PromptTuningConfig", prompt):
                assert torch.allclose(model(input_ids=tokens).logits, expected, atol=1e-5)


@BOTH
@pytest.mark.parametrize("family", LAW_FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_logit(kind, family, side):
    model = wide(family) if side == "left" else tiny.model(family)
    inputs = tiny.prompts(side=side)
    with in_front(model, kind.kind, random_prompt(model, kind, 8)), torch.no_grad():
        together = model(**inputs).logits
        for row, kept in enumerate(inputs["attention_mask"].bool()):
            alone = model(input_ids=inputs["input_ids"][row, kept][None]).logits[0]
            assert torch.allclose(together[row, kept], alone, atol=1e-4)


@BOTH
@pytest.mark.parametrize("family", LAW_FAMILIES)
def test_a_context_that_is_kept_in_a_cache_changes_no_score(kind, family, tokenizer):
    model = tiny.model(family)
    context = "Review: joy plot\nSentiment: positive\n"
    with in_front(model, kind.kind, random_prompt(model, kind, 8)):
        shared = scores(model, tokenizer, context, 3)
        alone = torch.cat(
            [scores(model, tokenizer, context, i + 1)[i:] if i else shared[:1] for i in range(3)]
        )
        texts = [
            context + TASK.prompt(row) + "." * (3 * i % 7) + ":"
            for i, row in enumerate(TASK.test[:3])
        ]
        whole_texts = score_options(model, tokenizer, texts, TASK.spec.options)
    assert torch.allclose(shared, whole_texts, atol=1e-4)
    assert torch.allclose(alone, whole_texts, atol=1e-4)


@BOTH
@pytest.mark.parametrize("family", LAW_FAMILIES)
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"num_beams": 2}])
def test_generation_goes_on_as_whole_passes_do(kind, family, padding, how):
    model = wide(family)
    n_new = 5
    given = tiny.prompts()
    inputs = {
        name: given[name][: 1 if padding == "none" else None]
        for name in ("input_ids", "attention_mask")
    }
    if padding == "none":  # a mask of ones is dropped on the way
        inputs = {
            name: values[:, inputs["attention_mask"][0].bool()] for name, values in inputs.items()
        }
    with in_front(model, kind.kind, random_prompt(model, kind, 8)), torch.no_grad():
        found = model.generate(
            **inputs, **how, max_new_tokens=n_new, do_sample=False, eos_token_id=None
        )
        for row, kept in enumerate(inputs["attention_mask"].bool()):
            alone = inputs["input_ids"][row, kept][None]
            assert torch.equal(
                found[row, -n_new:], best_of(model, alone, n_new, how.get("num_beams", 1))
            )


def best_of(model, tokens, n_new, n_beams):
    """The likeliest continuation by beams, each run whole and without a cache."""
    beams = [(0.0, tokens[0])]
    for _ in range(n_new):
        grown = []
        for total, beam in beams:
            logs = (
                model(input_ids=beam[None], use_cache=False).logits[0, -1].float().log_softmax(-1)
            )
            grown += [
                (total + float(logs[i]), torch.cat([beam, i[None]]))
                for i in logs.topk(n_beams).indices
            ]
        beams = sorted(grown, key=lambda each: -each[0])[:n_beams]
    return beams[0][1][-n_new:]


@BOTH
@pytest.mark.parametrize("family", LAW_FAMILIES)
def test_a_cache_of_the_caller_s_is_filled(kind, family):
    model = wide(family)
    tokens = tiny.prompts()["input_ids"][:1, :6]
    with in_front(model, kind.kind, random_prompt(model, kind, 8)), torch.no_grad():
        whole_pass = model(input_ids=tokens).logits[:, -1]
        cache = DynamicCache(config=model.config)
        model(input_ids=tokens[:, :-1], **{CACHE: cache})
        assert cache.get_seq_length() == 8 + 5
        assert torch.allclose(
            model(input_ids=tokens[:, -1:], **{CACHE: cache}).logits[:, -1], whole_pass, atol=1e-4
        )


@BOTH
def test_a_static_cache_is_refused(kind):
    model = tiny.model("llama")
    tokens = tiny.prompts()["input_ids"][:1]
    with (
        in_front(model, kind.kind, random_prompt(model, kind, 8)),
        pytest.raises(ValueError, match="a cache that grows"),
    ):
        model.generate(input_ids=tokens, max_new_tokens=2, cache_implementation="static")


@BOTH
@pytest.mark.parametrize("family", LAW_FAMILIES)
def test_trained_parameters_are_counted_exactly(kind, family, tokenizer):
    model = tiny.model(family)
    method = fitted(kind, model, tokenizer)
    dims = dims_of(model)
    per_token = model.config.hidden_size
    if kind is PrefixTuning:
        per_token = 2 * dims.n_layers * dims.n_kv_heads * dims.head_dim
    assert method.n_trained == method.n_cached(TASK) == kind.grid[0]["n_virtual"] * per_token


@BOTH
def test_the_model_is_whole_again_after_an_exception_and_a_failed_entry(kind, tokenizer):
    model = tiny.model("llama")
    method = fitted(kind, model, tokenizer)
    plain = scores(model, tokenizer)
    before = whole(model)
    with pytest.raises(RuntimeError, match="thrown inside"), method.applied(TASK):
        assert not torch.allclose(scores(model, tokenizer), plain, atol=1e-3)
        raise RuntimeError("thrown inside")
    assert same(before, whole(model))
    with (
        pytest.raises(RuntimeError, match="size of tensor"),
        in_front(model, "PrefixTuningConfig", torch.ones(2, 3)),
    ):
        pass
    assert same(before, whole(model))
    assert torch.equal(scores(model, tokenizer), plain)


@pytest.mark.slow
@BOTH
def test_training_lowers_the_loss_on_its_rows_and_stays_on_the_seed(kind, tokenizer):
    model = tiny.model("llama")
    method = kind(Settings(train_epochs=8))
    method.decoder = Decoder.of(model, tokenizer)
    method.sources = (TASK,)
    rows = answered(Decoder.of(model, tokenizer), [(TASK, row) for row in TASK.train[:8]])
    losses = []
    for lr in (1e-9, 1e-2):
        first, again = (method._trained(rows, 11, n_virtual=3, lr=lr) for _ in range(2))
        assert torch.equal(first["soft_prompt"], again["soft_prompt"])
        method.restore(first)
        with method.applied(TASK):
            found = score_options(
                model, tokenizer, [TASK.prompt(row) for row in TASK.train[:8]], TASK.spec.options
            )
        labels = torch.tensor([row.label for row in TASK.train[:8]])
        losses.append(torch.nn.functional.cross_entropy(found, labels).item())
    assert losses[1] < losses[0] - 0.02


def test_a_prompt_starts_as_pefts_own_start_from_the_template(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    model = tiny.model("gemma3")  # whose embeddings are scaled
    method = PromptTuning(Settings(train_epochs=1))
    method.decoder = Decoder.of(model, tokenizer)
    method.sources = (TASK,)
    rows = answered(Decoder.of(model, tokenizer), [(TASK, row) for row in TASK.train[:2]])
    text = "Review: \nSentiment:"
    for n_virtual in (1, len(tokenizer(text).input_ids), 20):
        config = peft.PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=n_virtual,
            token_dim=model.config.hidden_size,
            num_transformer_submodules=1,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text=text,
            tokenizer_name_or_path=str(tmp_path),
        )
        theirs = peft.PromptEmbedding(config, model.get_input_embeddings()).embedding.weight
        assert torch.allclose(
            method._trained(rows, 11, n_virtual, lr=1e-12)["soft_prompt"], theirs, atol=1e-6
        )


def test_a_prompt_longer_than_the_context_is_refused():
    model = tiny.model("gpt2")
    limit = model.config.max_position_embeddings
    with in_front(model, "PromptTuningConfig", torch.zeros(8, 42)), torch.no_grad():
        assert (
            model(input_ids=torch.ones(1, limit - 8, dtype=torch.long)).logits.shape[1] == limit - 8
        )
        with pytest.raises(ValueError, match=f"{limit - 7} tokens behind 8 virtual ones exceed"):
            model(input_ids=torch.ones(1, limit - 7, dtype=torch.long))


def test_nothing_outside_is_drawn_by_a_fit_or_an_application(tokenizer):
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    method = fitted(PrefixTuning, tiny.model("llama"), tokenizer)
    with method.applied(TASK):
        assert torch.equal(torch.rand(3), expected)


@BOTH
@pytest.mark.slow
def test_data_budgets_and_pooled_sources(kind, tokenizer):
    model = tiny.model("llama")
    assert (
        fitted(kind, model, tokenizer).n_labelled == 7
    )  # one setting: no validation row is looked at
    pooled = fitted(kind, model, tokenizer, (TASK, OTHER), tries=2)
    assert pooled.n_labelled == 2 * (7 + len(TASK.validation))
    assert [tried["n_virtual"] for tried in pooled.tried] == [
        setting["n_virtual"] for setting in kind.grid[:2]
    ]
    assert len(kind.grid) <= 12
    with pytest.raises(ValueError, match="at least one source task"):
        fitted(kind, model, tokenizer, ())


@BOTH
def test_half_precision_models_get_a_soft_prompt_in_float32(kind, tokenizer):
    model = tiny.model("llama").to(torch.bfloat16)
    method = fitted(kind, model, tokenizer)
    assert method.soft_prompt.dtype == torch.float32
    with method.applied(TASK):
        assert scores(model, tokenizer).isfinite().all()
    assert not stack_of(model)._forward_hooks


def test_without_peft_its_extra_is_named(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install 'icrouting\[peft\]'") as raised:
        fitted(PromptTuning, tiny.model("llama"), tokenizer)
    assert "\n" not in str(raised.value)
