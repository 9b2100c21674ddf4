"""LoRA through peft: where it stands, what it trains, and that nothing of it stays."""

import dataclasses
import warnings

import numpy as np
import peft
import pytest
import torch
from torch import nn

import tiny
from fitted import fit_method
from icrouting.decoder.batches import pad, pad_id_of
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import layers_of
from icrouting.decoder.identity import fingerprint
from icrouting.decoder.passes import next_token_logits
from icrouting.decoder.scoring import score_options
from icrouting.methods import Settings
from icrouting.methods.adapters import RANK, injected
from icrouting.methods.lora import GRID, LoraBlock, LoraBlockMore, LoraHead
from icrouting.methods.tuning import PATIENCE, answered, tune

TASK = tiny.task("toy", n_test=30)
OTHER = tiny.task("other", n_test=30)
LAW_FAMILIES = ("llama", "qwen3", "gemma3", "gpt_neox")
ARMS = pytest.mark.parametrize("kind", [LoraBlock, LoraHead])
SMALL = {"demos_per_class": 2, "tries": 1, "train_rows": 7, "train_epochs": 2}


@pytest.fixture(autouse=True)
def few_epochs(monkeypatch):
    monkeypatch.setattr("icrouting.methods.lora.EPOCHS", 3)


def fitted(kind, model, tokenizer, tasks=(TASK,), **changes):
    method = kind(Settings(**SMALL | changes))
    return fit_method(method, model, tokenizer, tasks)


def scores(model, tokenizer, n=7):
    prompts = [
        TASK.prompt(example) + "." * (3 * i % 7) + ":" for i, example in enumerate(TASK.test[:n])
    ]
    return score_options(model, tokenizer, prompts, TASK.spec.options)


def whole(model):
    """Everything that could tell that an adapter was there."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return (
        state,
        [id(module) for module in model.modules()],
        set(vars(model)),
        model.config.to_dict(),
    )


def same(before, after):
    return before[1:] == after[1:] and all(
        torch.equal(value, after[0][name]) for name, value in before[0].items()
    )


def unfitted(model, kind):
    method = kind(Settings())
    method.decoder = Decoder.of(model, tiny.tokenizer())
    return method


@ARMS
@pytest.mark.parametrize("family", tiny.ALL_CONFIGS)
def test_a_new_adapter_changes_nothing_and_any_other_something(kind, family, tokenizer):
    """B starts at zero; on every row of the family table."""
    model = tiny.model(family, "eager" if family == "gemma2" else "sdpa")
    targets = unfitted(model, kind)._targets()
    plain = scores(model, tokenizer, 3)
    before = whole(model)
    with torch.random.fork_rng(), injected(model, targets, 32, 5) as adapter:
        for module in model.modules():
            module.eval()
        new = {name: weight.detach().clone() for name, weight in adapter.items()}
        assert torch.equal(scores(model, tokenizer, 3), plain)
    assert same(before, whole(model))
    generator = torch.Generator().manual_seed(3)
    other = {name: torch.randn(weight.shape, generator=generator) for name, weight in new.items()}
    with injected(model, targets, 32, other):
        assert not torch.allclose(scores(model, tokenizer, 3), plain, atol=1e-2)
    assert same(before, whole(model))
    assert torch.equal(scores(model, tokenizer, 3), plain)


@ARMS
@pytest.mark.parametrize("family", [*LAW_FAMILIES, "gpt2"])
def test_an_adapter_is_the_weight_plus_scale_times_b_a(kind, family, tokenizer):
    """Against weights with the update added by hand."""
    model = tiny.model(family)
    updated = tiny.model(family)
    targets = unfitted(model, kind)._targets()
    generator = torch.Generator().manual_seed(3)
    with torch.random.fork_rng(), injected(model, targets, 64, 5) as adapter:
        shapes = {name: weight.shape for name, weight in adapter.items()}
    adapter = {name: torch.randn(shape, generator=generator) / 9 for name, shape in shapes.items()}
    updated.set_output_embeddings(updated.get_output_embeddings())
    head = updated.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # GPT-2's is tied
    for name in targets:
        a, b = (adapter[f"{name}.lora_{part}.default.weight"] for part in "AB")
        weight = updated.get_submodule(name).weight
        update = 64 / RANK * b @ a
        weight.data += update.T if weight.shape != update.shape or ".c_" in name else update
    with injected(model, targets, 64, adapter):
        assert torch.allclose(scores(model, tokenizer), scores(updated, tokenizer), atol=1e-4)


@pytest.mark.slow
def test_the_last_block_is_what_pefts_own_names_say():
    """Equality with `layers_to_transform` and the family's list of names."""
    names = {
        "llama": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
        "qwen3": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
        "gemma3": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
        "phi3": "qkv_proj o_proj gate_up_proj down_proj",
        "gpt_neox": "query_key_value dense dense_h_to_4h dense_4h_to_h",
        "gpt2": "c_attn c_proj c_fc",
    }
    for family, listed in names.items():
        model = tiny.model(family)
        last = len(layers_of(tiny.model(family))) - 1
        config = peft.LoraConfig(
            r=RANK,
            target_modules=listed.split(),
            layers_to_transform=[last],
            layers_pattern="h" if family == "gpt2" else "layers",
            fan_in_fan_out=family == "gpt2",
        )
        named = peft.inject_adapter_in_model(config, tiny.model(family))
        with (
            torch.random.fork_rng(),
            injected(model, unfitted(model, LoraBlock)._targets(), 32, 5) as adapter,
        ):
            theirs = {
                name: weight.shape for name, weight in named.named_parameters() if ".lora_" in name
            }
            assert {name: weight.shape for name, weight in adapter.items()} == theirs


@pytest.mark.parametrize("family", LAW_FAMILIES)
def test_trained_parameters_are_counted_exactly(family, tokenizer):
    model = tiny.model(family)
    for kind in (LoraBlock, LoraHead):
        linear = [model.get_submodule(name) for name in unfitted(model, kind)._targets()]
        expected = sum(RANK * (part.in_features + part.out_features) for part in linear)
        method = fitted(kind, model, tokenizer)
        assert method.n_trained == method.n_cached(TASK) == expected
        assert method.cost["trained"] == expected


@ARMS
def test_the_model_is_whole_again_after_an_exception_and_a_failed_entry(
    kind, tokenizer, monkeypatch
):
    model = tiny.model("llama")
    method = fitted(kind, model, tokenizer)
    plain = scores(model, tokenizer)
    before = whole(model)
    with pytest.raises(RuntimeError, match="thrown inside"), method.applied(TASK):
        raise RuntimeError("thrown inside")
    assert same(before, whole(model))
    broken = {name: weight for name, weight in method.adapter.items() if ".lora_A." in name}
    with pytest.raises(KeyError), injected(model, method._targets(), RANK, broken):
        pass
    assert same(before, whole(model))
    assert torch.equal(scores(model, tokenizer), plain)


def test_a_tied_head_is_updated_without_the_embeddings(tokenizer):
    model = tiny.model("gpt2")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    method = fitted(LoraHead, model, tokenizer)
    before = whole(model)
    batch = pad([[5, 9, 30]], 1)
    with method.applied(TASK), torch.no_grad():
        assert torch.equal(model.get_input_embeddings().weight, before[0]["transformer.wte.weight"])
        changed = next_token_logits(model, batch)
    assert not torch.allclose(changed, next_token_logits(model, batch), atol=1e-4)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert same(before, whole(model))


@ARMS
@pytest.mark.parametrize("family", LAW_FAMILIES)
def test_left_padding_and_a_batch_change_no_score(kind, family, tokenizer):
    model = tiny.model(family)
    inputs = tiny.prompts()
    method = fitted(kind, model, tokenizer)
    with method.applied(TASK), torch.no_grad():
        together = model(**inputs).logits[:, -1]
        for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
            alone = model(input_ids=inputs["input_ids"][row : row + 1, -length:]).logits[:, -1]
            assert torch.allclose(together[row : row + 1], alone, atol=1e-4)


@ARMS
def test_training_on_kept_states_equals_training_on_whole_passes(kind, tokenizer):
    """Against a plain loop over whole forward passes with peft's adapter, without dropout."""
    model = tiny.model("qwen3")
    held = dataclasses.replace(TASK, validation=())
    method = unfitted(model, kind)
    pairs = [(held, row) for row in TASK.train[:6]]
    rows = answered(Decoder.of(model, tokenizer), pairs)
    targets = method._targets()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("icrouting.methods.adapters.DROPOUT", 0.0)
        states = method._states(pairs)
        trained = method._trained(states, (), 11, lr=1e-3, alpha=64)
        with torch.random.fork_rng(), injected(model, targets, 64, 11) as adapter:

            def logits_of(token_lists):
                return next_token_logits(model, pad(token_lists, pad_id_of(tokenizer)))

            weights = list(adapter.values())
            rng = np.random.default_rng(11)
            tune(weights, rows, (), logits_of, lr=1e-3, n_epochs=3, rng=rng)
            slow = {name: weight.detach().clone() for name, weight in adapter.items()}
    for name, weight in trained.items():
        expected = slow[name] * (2 if ".lora_B." in name else 1)
        assert torch.allclose(weight, expected, atol=1e-5)
        assert weight.abs().max() > 0


@pytest.mark.slow
def test_training_lowers_the_loss_on_its_rows_and_stays_on_the_seed(tokenizer):
    model = tiny.model("llama")
    method = unfitted(model, LoraBlock)
    rows = method._states([(TASK, row) for row in TASK.train[:8]])
    first, again = (method._trained(rows, (), 11, lr=3e-3, alpha=32) for _ in range(2))
    assert all(torch.equal(weight, again[name]) for name, weight in first.items())
    other = method._trained(rows, (), 12, lr=3e-3, alpha=32)
    assert any(not torch.equal(weight, other[name]) for name, weight in first.items())

    def loss():
        found = score_options(
            model, tokenizer, [TASK.prompt(row) for row in TASK.train[:8]], TASK.spec.options
        )
        labels = torch.tensor([row.label for row in TASK.train[:8]])
        return nn.functional.cross_entropy(found, labels).item()

    plain = loss()
    method.restore(first)
    with method.applied(TASK):
        assert loss() < plain - 0.02


def test_nothing_outside_is_drawn_by_a_fit_or_an_application(tokenizer):
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    method = fitted(LoraBlock, tiny.model("llama"), tokenizer)
    with method.applied(TASK):
        assert torch.equal(torch.rand(3), expected)


def test_training_stops_where_the_held_loss_is_least():
    """A held loss falls for two epochs, then rises: three more run, the second's weights stay."""
    weight = nn.Parameter(torch.zeros(1))
    seen = []
    falls = iter([2.0, 1.0, 5.0, 6.0, 7.0, 8.0, 0.0])

    def logits_of(rows):
        if torch.is_grad_enabled():
            return torch.stack([torch.zeros(1), weight], 1).expand(len(rows), -1)
        seen.append(weight.detach().clone())
        return torch.tensor([[0.0, next(falls)]])  # answer 0: the larger, the worse

    tune(
        [weight],
        [(None, 1)],
        [(None, 0)],
        logits_of,
        lr=0.1,
        n_epochs=9,
        rng=np.random.default_rng(0),
    )
    assert len(seen) == 2 + PATIENCE
    assert torch.equal(weight.detach(), seen[1])
    assert not torch.equal(seen[1], seen[2])


@pytest.mark.slow
def test_data_budgets_and_pooled_sources(tokenizer):
    model = tiny.model("llama")
    assert fitted(LoraBlock, model, tokenizer).n_labelled == 2 * 2 + len(TASK.validation)
    pooled = fitted(LoraBlock, model, tokenizer, (TASK, OTHER))
    assert pooled.n_labelled == 2 * (2 * 2 + len(TASK.validation))
    assert fitted(LoraBlockMore, model, tokenizer, (TASK, OTHER)).n_labelled == 2 * (
        7 + len(TASK.validation)
    )
    assert len(GRID) <= 12
    with pytest.raises(ValueError, match="at least one source task"):
        fitted(LoraBlock, model, tokenizer, ())
    lone = dataclasses.replace(TASK, validation=())
    assert fitted(LoraHead, model, tokenizer, (lone,)).n_labelled == 4


def test_settings_are_tried_from_one_start_and_logged(tokenizer):
    method = fitted(LoraHead, tiny.model("llama"), tokenizer, tries=2)
    assert [{name: tried[name] for name in ("lr", "alpha")} for tried in method.tried] == GRID[:2]


def test_half_precision_models_get_an_adapter_in_float32(tokenizer):
    model = tiny.model("llama").to(torch.bfloat16)
    method = fitted(LoraBlock, model, tokenizer)
    before = fingerprint(model)
    assert {weight.dtype for weight in method.adapter.values()} == {torch.float32}
    with method.applied(TASK):
        assert scores(model, tokenizer).isfinite().all()
        assert {p.dtype for name, p in model.named_parameters() if ".lora_" in name} == {
            torch.float32
        }
    assert fingerprint(model) == before


def test_a_model_that_has_a_lora_is_refused(tokenizer):
    model = tiny.model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).requires_grad_(False)
    with pytest.raises(ValueError, match="merge it first"):
        fitted(LoraBlock, model, tokenizer)


def test_without_peft_its_extra_is_named(tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install 'icrouting\[peft\]'") as raised:
        fitted(LoraBlock, tiny.model("llama"), tokenizer)
    assert "\n" not in str(raised.value)


def test_the_cost_counts_every_pass_whole_or_late(tokenizer):
    method = fitted(LoraBlockMore, tiny.model("llama"), tokenizer)
    n_held = len(TASK.validation)
    assert method.cost["backwards"] == 2 * 7
    assert method.cost["forwards"] == (7 + n_held) + 2 * (7 + n_held)
