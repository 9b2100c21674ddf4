"""What a user may do with an attached model: it stays routed, or there is an error."""

import copy
import io
import threading
import warnings
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import StoppingCriteria

import tiny
from bench import CLOSE, MATTERS, Bench
from fitted import fit_method
from icrouting.config import HIDDEN
from icrouting.decoder.families import family_of
from icrouting.decoder.guards import lock_of
from icrouting.decoder.scoring import score_options
from icrouting.methods import Settings
from icrouting.methods.iterative_vectors import IterativeVectors
from icrouting.methods.task_vectors import TaskVectors
from icrouting.routing.effect import run_both
from icrouting.runtime.defaults import usual_defaults
from plain_and_routed import state_of

OPTIONS = ("negative", "positive")
NEW = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
REPLACED = "was replaced, wrapped or removed while the model is attached"
OVER = "no longer attached"


@pytest.fixture(scope="module")
def bench():
    return Bench(HIDDEN)


@pytest.fixture
def model(bench):
    return bench.fresh()


def scores_of(bench, model, strength=1.0):
    """Every text's routed scores, from a model that is attached anew."""
    with bench.icr.attached(model, bench.tokenizer, strength=strength) as routed:
        return routed.score(bench.texts, OPTIONS)


def with_lora(model, modules=("q_proj", "k_proj"), seed=0):
    """The model inside a LoRA that changes what it computes."""
    config = LoraConfig(r=2, target_modules=list(modules), task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        # peft asks transformers for an attribute by its old name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in wrapped.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator)
    return wrapped.eval().requires_grad_(False)


# Gradients under checkpointing


def enable_checkpointing(model, **kwargs):
    """Whatever this release of transformers calls it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def gradients_of(bench, checkpointing, backward_inside=True):
    """The gradients of every weight: two forwards of two prompts, then one backward."""
    model = bench.fresh().train().requires_grad_(True)
    # Reentrant checkpointing gives gradients only where its input has one.
    model.enable_input_require_grads()
    if checkpointing is not None:
        enable_checkpointing(model, use_reentrant=checkpointing == "reentrant")
    with bench.attached(model):
        one, other = (model(**bench.inputs(row)).logits[0, -1].sum() for row in (0, 1))
        if backward_inside:
            (one - other).backward()
    if not backward_inside:
        (one - other).backward()
    weights = dict(model.named_parameters())
    # Where tokens enter: that gradient is made by a reentrant backward in two parts.
    return {name: weight.grad for name, weight in weights.items() if weight.grad is not None}


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_gradients_of_several_forwards_are_those_without_checkpointing(kind, bench):
    plain = gradients_of(bench, None)
    checkpointed = gradients_of(bench, kind)
    assert plain.keys() == checkpointed.keys()
    for name, expected in plain.items():
        assert torch.allclose(checkpointed[name], expected, rtol=1e-3, atol=1e-4), name
    assert max(gradient.abs().max() for gradient in plain.values()) > MATTERS


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_checkpointed_gradients_are_refused_after_leaving(kind, bench):
    with pytest.raises(RuntimeError, match=OVER):
        gradients_of(bench, kind, backward_inside=False)


def test_gradients_without_checkpointing_may_be_taken_after_leaving(bench):
    inside, after = gradients_of(bench, None), gradients_of(bench, None, backward_inside=False)
    assert all(torch.equal(after[name], inside[name]) for name in inside)


def test_a_layer_checkpointed_in_another_way_is_refused_and_not_routed_by_another_prompt(bench):
    model = bench.fresh().requires_grad_(True)
    last = model.model.layers[4]
    plain_forward = last.forward
    last.forward = lambda *args, **kwargs: checkpoint(
        plain_forward, *args, use_reentrant=False, **kwargs
    )
    with bench.attached(model):
        one, other = (model(**bench.inputs(row)).logits[0, -1].sum() for row in (0, 1))
        with pytest.raises(ValueError, match="no routing"):
            (one - other).backward()


def test_checkpointing_is_as_it_was_after_leaving(bench, model):
    enable_checkpointing(model.train().requires_grad_(True), use_reentrant=False)
    model.config.use_cache = False
    layer = model.model.layers[4]
    before = layer._gradient_checkpointing_func
    with bench.attached(model):
        model(**bench.inputs(0))
        assert layer._gradient_checkpointing_func is not before
    assert layer._gradient_checkpointing_func is before


# Modules swapped while attached


def swap_query(model):
    attention = model.model.layers[3].self_attn
    attention.q_proj = copy.deepcopy(attention.o_proj)


def wrap_key(model):
    attention = model.model.layers[4].self_attn

    class Twice(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, states):
            return 2 * self.inner(states)

    attention.k_proj = Twice(attention.k_proj)


def swap_attention(model):
    model.model.layers[3].self_attn = tiny.model("llama", seed=1).model.layers[3].self_attn


def swap_layer(model):
    model.model.layers[4] = tiny.model("llama", seed=1).model.layers[4]


def swap_layers(model):
    model.model.layers = tiny.model("llama", seed=1).model.layers


def drop_layer(model):
    model.model.layers = model.model.layers[:4]


def swap_stack(model):
    model.model = tiny.model("llama", seed=1).model


SWAPS = [swap_query, wrap_key, swap_attention, swap_layer, swap_layers, drop_layer, swap_stack]


@pytest.mark.parametrize("swap", [*SWAPS, with_lora], ids=lambda swap: swap.__name__)
@pytest.mark.parametrize("use", ["score", "call", "generate", "routing of it"])
def test_a_model_changed_while_attached_is_an_error_at_the_next_call(swap, use, bench, model):
    with bench.attached(model) as routed:
        routed.score(bench.texts, OPTIONS)
        swap(model)
        uses = {
            "score": lambda: routed.score(bench.texts, OPTIONS),
            "call": lambda: model(**bench.inputs(0)),
            "generate": lambda: model.generate(**bench.inputs(0), **NEW),
            "routing of it": lambda: routed.effect(bench.texts[:1]),
        }
        with pytest.raises(RuntimeError, match=REPLACED):
            uses[use]()


def test_an_unloaded_adapter_is_an_error_at_the_next_call(bench, model):
    wrapped = with_lora(model)
    with bench.icr.attached(model, bench.tokenizer) as routed:
        routed.score(bench.texts, OPTIONS)
        wrapped.unload()
        with pytest.raises(RuntimeError, match=r"layers\.3\.self_attn\.q_proj` " + REPLACED):
            routed.score(bench.texts, OPTIONS)


@pytest.mark.parametrize("how", ["merged", "switched off", "on other modules"])
def test_an_adapter_that_changes_in_its_place_is_followed(how, bench):
    modules = ("v_proj", "o_proj") if how == "on other modules" else ("q_proj", "k_proj")

    def change(model, wrapped):
        if how == "merged":
            wrapped.merge_adapter()
        elif how == "switched off":
            wrapped.base_model.disable_adapter_layers()
        else:
            with_lora(model, modules)

    before, after = bench.fresh(), bench.fresh()
    wrapped = None if how == "on other modules" else with_lora(before, modules)
    same = None if how == "on other modules" else with_lora(after, modules)
    # A merged adapter computes what it did.
    if how != "merged":
        change(after, same)
    expected = scores_of(bench, after)
    with bench.icr.attached(before, bench.tokenizer) as routed:
        routed.score(bench.texts, OPTIONS)
        change(before, wrapped)
        assert torch.allclose(routed.score(bench.texts, OPTIONS), expected, atol=CLOSE)


def test_hooks_that_somebody_removed_are_missed(bench, model):
    with bench.attached(model) as routed:
        routed.score(bench.texts, OPTIONS)
        model.model.layers[3].self_attn.q_proj._forward_hooks.clear()
        with pytest.raises(RuntimeError, match=r"hooks of `model.layers.3.self_attn.q_proj` were"):
            routed.score(bench.texts, OPTIONS)


def test_hooks_of_the_user_change_what_is_routed_whenever_they_came(bench, model):
    """Our hooks on one module are called behind theirs."""

    def stretch(module, args, output):
        return 1.5 * output

    query = model.model.layers[3].self_attn.q_proj
    with query.register_forward_hook(stretch), bench.attached(model):
        expected = model(**bench.inputs(0)).logits
    with bench.attached(model):
        plain = model(**bench.inputs(0)).logits
        with query.register_forward_hook(stretch):
            assert torch.equal(model(**bench.inputs(0)).logits, expected)
    assert (plain - expected).abs().max() > MATTERS


def test_an_attention_that_calls_its_own_function_is_an_error(bench, model):
    attention = model.model.layers[4].self_attn
    own = attention.forward

    def unrouted(hidden_states, *args, **kwargs):
        return torch.zeros_like(hidden_states), None

    with bench.attached(model):
        attention.forward = unrouted
        with pytest.raises(RuntimeError, match="the attention of layer 4 ran unrouted"):
            model(**bench.inputs(0))
        attention.forward = own
        model(**bench.inputs(0))


@pytest.mark.slow
def test_one_layer_on_another_kernel_is_an_error(bench, model):
    attention = model.model.layers[3].self_attn
    with bench.attached(model):
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation = "eager"
        with pytest.raises(RuntimeError, match="implementation was set to 'eager'"):
            model(**bench.inputs(0))


# Rivals


@pytest.fixture(scope="module")
def rival(bench):
    method = IterativeVectors(Settings(demos_per_class=2, tries=1, train_rows=8))
    return fit_method(method, bench.fresh(), bench.tokenizer, [tiny.task()])


def test_layers_replaced_under_a_rival_are_an_error(rival, bench, model):
    clean = copy.deepcopy(model.model.layers)
    with rival.attached(model, bench.tokenizer, tiny.task()):
        model.model.layers = clean
        with pytest.raises(RuntimeError, match=REPLACED):
            model(**bench.inputs(0))


def test_checkpointing_under_a_rival_is_refused(rival, bench, model):
    enable_checkpointing(model.train().requires_grad_(True), use_reentrant=False)
    with (
        rival.attached(model, bench.tokenizer, tiny.task()),
        pytest.raises(ValueError, match="switch gradient checkpointing off"),
    ):
        model(**bench.inputs(0), use_cache=False)


def test_the_stack_alone_under_a_rival_is_no_part_of_the_last_call(rival, bench, model):
    with rival.attached(model, bench.tokenizer, tiny.task()):
        model(**bench.inputs(0))
        with pytest.raises(ValueError, match="call the whole model"):
            model.model(**bench.inputs(2))


def test_no_part_of_a_model_is_copied_under_a_rival(rival, bench, model):
    with rival.attached(model, bench.tokenizer, tiny.task()):
        for part in (model, model.model):
            with pytest.raises(RuntimeError, match="cannot be copied"):
                copy.deepcopy(part)


# After the `with`


@pytest.mark.parametrize("strength", [1.0, 0.0])
@pytest.mark.parametrize("use", ["score", "routing", "effect", "effect of the last"])
def test_what_was_attached_is_an_error_after_its_with(use, strength, bench, model):
    with bench.icr.attached(model, bench.tokenizer, strength=strength) as routed:
        routed.score(bench.texts, OPTIONS)
    uses = {
        "score": lambda: routed.score(bench.texts, OPTIONS),
        "routing": lambda: routed.routing(bench.texts),
        "effect": lambda: routed.effect(bench.texts),
        "effect of the last": lambda: routed.effect(),
    }
    with pytest.raises(RuntimeError, match=OVER):
        uses[use]()
    # Attached again, it is another: the old one is no door to it.
    with bench.attached(model), pytest.raises(RuntimeError, match=OVER):
        uses[use]()


def test_strength_zero_is_alone_too(bench, model):
    for first, second in ((1.0, 0.0), (0.0, 1.0)):
        with (
            bench.icr.attached(model, bench.tokenizer, strength=first),
            pytest.raises(ValueError, match="is attached to this model"),
        ):
            bench.icr.attached(model, bench.tokenizer, strength=second).__enter__()


def test_what_held_on_to_the_model_s_methods_has_the_plain_ones_after_leaving(bench, model):
    with bench.attached(model):
        forward, generate = model.forward, model.generate
    inputs = bench.inputs(0)
    assert torch.equal(forward(**inputs).logits, model(**inputs).logits)
    assert torch.equal(generate(**inputs, **NEW), model.generate(**inputs, **NEW))
    model.forward = forward
    copied = copy.deepcopy(model)
    copied.lm_head.weight.data.zero_()
    assert not copied(**inputs).logits.any()
    assert model(**inputs).logits.any()


def test_a_generate_that_is_not_the_attached_model_s_is_an_error(bench, model):
    taken_before = model.generate
    with bench.attached(model):
        for generate in (taken_before, lambda **inputs: type(model).generate(model, **inputs)):
            with pytest.raises(RuntimeError, match="began before the method was attached"):
                generate(**bench.inputs(0), **NEW)


def test_a_generate_without_a_prompt_begins_as_a_plain_call_does(bench, model):
    begin = torch.tensor([[model.config.bos_token_id]])
    with bench.attached(model):
        assert torch.equal(model.generate(**NEW), model.generate(begin, **NEW))


# The attention implementation


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("how", ["the model", "its stack", "its config"])
def test_another_attention_implementation_is_an_error_at_the_next_call(how, kernel, bench, model):
    before = state_of(model)
    with bench.attached(model) as routed:
        if how == "the model":
            model.set_attn_implementation(kernel)
        elif how == "its stack":
            model.model.set_attn_implementation(kernel)
        else:
            model.config._attn_implementation = kernel
        with pytest.raises(RuntimeError, match=f"implementation was set to '{kernel}'"):
            routed.score(bench.texts, OPTIONS)
        with pytest.raises(RuntimeError, match=f"implementation was set to '{kernel}'"):
            model.generate(**bench.inputs(0), **NEW)
    assert state_of(model) == before


def test_attention_weights_of_a_routed_call_are_those_that_effect_reads(bench):
    model = bench.fresh("eager")
    inputs = bench.inputs(0)
    plain = model(**inputs, output_attentions=True).attentions
    with bench.attached(model):
        routed = model(**inputs, output_attentions=True).attentions
        passes = run_both(model, inputs["input_ids"][0].tolist(), bench.icr.pids.layers)
    for each, of_effect in ((plain, passes.attn_weights[0]), (routed, passes.attn_weights[1])):
        last_rows = torch.stack([each[layer][0, :, -1] for layer in bench.icr.pids.layers])
        assert torch.allclose(last_rows, of_effect, atol=CLOSE)


# Threads

N_THREADS = 40


def in_threads(requests):
    """The results of functions, each in a thread of its own, all let go at one moment."""
    barrier = threading.Barrier(len(requests))

    futures = [Future() for _ in requests]

    def run(request, future):
        barrier.wait()
        try:
            future.set_result(request())
        except BaseException as error:
            future.set_exception(error)

    for request, future in zip(requests, futures, strict=True):
        # Threads that wait for one another forever fail the test, and hold nobody up.
        threading.Thread(target=run, args=(request, future), daemon=True).start()
    return [future.result(timeout=60) for future in futures]


def test_forty_threads_get_each_row_s_own_result(bench, model):
    with bench.attached(model) as routed, torch.no_grad():
        inputs = [bench.inputs(row) for row in range(3)]
        uses = {
            "score": lambda row: routed.score([bench.texts[row]], OPTIONS),
            "routing": lambda row: routed.routing([bench.texts[row]]).head_gates,
            "call": lambda row: model(**inputs[row]).logits,
            "stack": lambda row: model.model(**inputs[row]).last_hidden_state,
            "generate": lambda row: model.generate(**inputs[row], **NEW),
            "effect": lambda row: routed.effect([bench.texts[row]]),
        }
        names = [*uses, "score", "call"]
        order = [(names[place % len(names)], place % 3) for place in range(N_THREADS)]
        alone = [uses[name](row) for name, row in order]
        # Gradients are switched off for each thread by itself.
        requests = [
            torch.no_grad()(lambda name=name, row=row: uses[name](row)) for name, row in order
        ]
        together = in_threads(requests)
    for (name, row), expected, result in zip(order, alone, together, strict=True):
        is_same = result == expected if name == "effect" else torch.equal(result, expected)
        assert is_same, (name, row)


@pytest.mark.slow
def test_threads_share_a_plain_model(bench, model):
    """Scoring has hooks of its own on the model, which are its thread's alone."""
    inputs = [bench.inputs(row) for row in range(3)]

    def score(row):
        return score_options(model, bench.tokenizer, [bench.texts[row]], OPTIONS)

    def call(row):
        with torch.no_grad():
            return model(**inputs[row]).logits

    order = [((score, call)[place % 2], place % 3) for place in range(N_THREADS)]
    alone = [use(row) for use, row in order]
    together = in_threads([lambda use=use, row=row: use(row) for use, row in order])
    assert all(map(torch.equal, together, alone))


@pytest.mark.slow
def test_threads_take_turns_under_a_rival_too(bench, model):
    rival = fit_method(
        TaskVectors(Settings(demos_per_class=2, tries=1, train_rows=8)),
        model,
        bench.tokenizer,
        [tiny.task()],
    )
    inputs = [bench.inputs(row) for row in range(3)]

    def use(row):
        with torch.no_grad():
            return model(**inputs[row]).logits, model.generate(**inputs[row], **NEW)

    with rival.attached(model, bench.tokenizer, tiny.task()):
        alone = [use(place % 3) for place in range(N_THREADS)]
        together = in_threads([lambda row=place % 3: use(row) for place in range(N_THREADS)])
    for pair, expected in zip(together, alone, strict=True):
        assert all(map(torch.equal, pair, expected))


@pytest.mark.slow
def test_a_model_that_drafts_is_held_between_its_drafts_too(bench):
    """Else two that draft for one another each hold what the other waits for."""
    one, other = bench.fresh(), bench.fresh()
    inputs = bench.inputs(0)
    free = []

    def try_both():
        for model in (one, other):
            lock = lock_of(model)
            is_free = lock.acquire(blocking=False)
            free.append(is_free)
            if is_free:
                lock.release()

    def begin(layer, args):
        # While no draft is made; by another thread, as this one has the locks.
        if not free:
            in_threads([try_both])

    with bench.attached(one), bench.attached(other):
        alone = one.generate(**inputs, **NEW, assistant_model=other)
        for model, assistant in ((one, other), (other, one)):
            free.clear()
            with model.model.layers[0].register_forward_pre_hook(begin):
                tokens = model.generate(**inputs, **NEW, assistant_model=assistant)
            assert torch.equal(tokens, alone)
            assert free == [False, False]
        try_both()
    assert free[2:] == [True, True]


def test_threads_that_meet_a_model_first_leave_it_as_it_is(bench):
    for _ in range(3):
        model = bench.fresh()
        assert len(set(map(str, in_threads([lambda model=model: family_of(model)] * 8)))) == 1
        assert model.config._attn_implementation == "sdpa"


def test_a_plain_call_beside_the_first_look_at_a_model_is_plain(bench):
    model = bench.fresh()
    inputs = bench.inputs(0)
    expected = model(**inputs).logits
    reached, go_on = threading.Event(), threading.Event()

    def look(layer, args):
        # While it is tried, which is in this thread, the other calls it.
        if threading.current_thread() is threading.main_thread():
            reached.set()
            go_on.wait(10)

    def call():
        reached.wait(10)
        logits = model(**inputs).logits
        go_on.set()
        return logits

    with (
        model.model.layers[2].register_forward_pre_hook(look),
        ThreadPoolExecutor(1) as pool,
    ):
        logits = pool.submit(call)
        family_of(model)
        assert torch.equal(logits.result(), expected)


def test_threads_leave_the_default_dtype_as_it_was():
    torch.set_default_dtype(torch.float16)

    def make():
        for _ in range(50):
            with usual_defaults():
                assert torch.zeros(1).dtype == torch.float32

    try:
        in_threads([make] * 8)
        assert torch.get_default_dtype() == torch.float16
    finally:
        torch.set_default_dtype(torch.float32)


def test_leaving_waits_for_a_call_in_flight(bench, model):
    begun, go_on = threading.Event(), threading.Event()

    class Waits(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            begun.set()
            go_on.wait(10)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    inputs = bench.inputs(0)
    plain = model.generate(**inputs, **NEW)
    with ThreadPoolExecutor(2) as pool:
        with bench.attached(model):
            expected = model.generate(**inputs, **NEW)
            generated = pool.submit(model.generate, **inputs, **NEW, stopping_criteria=[Waits()])
            assert begun.wait(10)
            # Let go only once this thread waits in `__exit__`.
            pool.submit(lambda: threading.Event().wait(0.2) or go_on.set())
        assert go_on.is_set()
        assert torch.equal(generated.result(), expected)
    assert not torch.equal(expected, plain)
    assert torch.equal(model.generate(**inputs, **NEW), plain)


def test_of_threads_that_attach_one_model_one_does(bench, model):
    before = state_of(model)
    expected = scores_of(bench, model)
    go_on = threading.Event()

    def attach():
        try:
            with bench.attached(model) as routed:
                go_on.wait(10)
                return routed.score(bench.texts, OPTIONS)
        except ValueError as error:
            go_on.set()
            return error

    results = in_threads([attach] * 4)
    errors = [result for result in results if isinstance(result, ValueError)]
    scores = [result for result in results if torch.is_tensor(result)]
    assert len(scores) + len(errors) == 4
    assert scores
    assert errors
    assert all(torch.equal(each, expected) for each in scores)
    assert all("is attached to this model" in str(error) for error in errors)
    assert state_of(model) == before


def test_a_plain_call_that_was_running_when_the_model_was_attached_is_an_error(bench, model):
    """Its later layers would be routed, by nothing or by another thread's prompt."""
    reached, go_on = threading.Event(), threading.Event()

    def wait(layer, args):
        if threading.current_thread() is not threading.main_thread():
            reached.set()
            go_on.wait(10)

    expected = scores_of(bench, model)
    inputs = bench.inputs(0)
    handle = model.model.layers[1].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(model, **inputs)
        assert reached.wait(10)
        with bench.attached(model) as routed:
            assert torch.equal(routed.score(bench.texts, OPTIONS), expected)
            go_on.set()
            with pytest.raises(ValueError, match="no routing"):
                call.result()
            assert torch.equal(routed.score(bench.texts, OPTIONS), expected)
    handle.remove()


def test_a_plain_call_that_meets_a_routed_one_is_an_error_and_disturbs_it_not(bench, model):
    reached, go_on = threading.Event(), threading.Event()
    errors = []

    def wait(layer, args):
        if threading.current_thread() is not threading.main_thread():
            reached.set()
            go_on.wait(10)

    def let_the_other_run(layer, args):
        if threading.current_thread() is threading.main_thread() and not errors:
            go_on.set()
            errors.append(call.exception(10))

    expected = scores_of(bench, model)
    # Of this call the queries are there, and what they are read for is still to come.
    with (
        model.model.layers[1].register_forward_pre_hook(wait),
        model.model.layers[3].self_attn.v_proj.register_forward_pre_hook(let_the_other_run),
        ThreadPoolExecutor(1) as pool,
    ):
        call = pool.submit(model, **bench.inputs(0))
        assert reached.wait(10)
        with bench.attached(model) as routed:
            assert torch.equal(routed.score(bench.texts, OPTIONS), expected)
    assert isinstance(errors[0], RuntimeError)
    assert "met the call of another thread" in str(errors[0])


def test_a_model_left_first_leaves_the_other_uncompiled(bench):
    """One stance of the compiler is for the whole process."""
    from torch._dynamo.eval_frame import _stance as before

    one, other = bench.attached(bench.fresh()), bench.attached(bench.fresh())
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    from torch._dynamo import eval_frame

    assert eval_frame._stance.stance == "force_eager"
    other.__exit__(None, None, None)
    assert eval_frame._stance.stance == before.stance == "default"


# Copies, and calls within calls


@pytest.mark.parametrize("part", ["model", "stack", "layer", "pickle"])
def test_an_attached_model_refuses_to_be_copied(part, bench, model):
    parts = {"model": model, "stack": model.model, "layer": model.model.layers[3]}
    with bench.attached(model) as routed:
        with pytest.raises(RuntimeError, match="cannot be copied or pickled"):
            if part == "pickle":
                torch.save(model, io.BytesIO())
            else:
                copy.deepcopy(parts[part])
        routed.score(bench.texts, OPTIONS)
    copied = copy.deepcopy(model)
    assert torch.equal(scores_of(bench, copied), scores_of(bench, model))


def test_a_shallow_copy_is_the_model_itself(bench, model):
    plain, inputs = model(**bench.inputs(0)).logits, bench.inputs(0)
    with bench.attached(model):
        routed, copied = model(**inputs).logits, copy.copy(model)
        assert torch.equal(copied(**inputs).logits, routed)
    assert torch.equal(copied(**inputs).logits, plain)


def test_weights_saved_while_attached_are_the_model_s(bench, model, tmp_path):
    with bench.attached(model):
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(loaded(**bench.inputs(0)).logits, model(**bench.inputs(0)).logits)


def test_a_hook_that_calls_the_model_meanwhile_disturbs_no_routing(bench, model):
    with bench.attached(model), torch.no_grad():
        alone = model(**bench.inputs(0)).logits

        def ask(layer, args):
            handle.remove()
            model(**bench.inputs(1))

        handle = model.model.layers[4].register_forward_pre_hook(ask)
        assert torch.equal(model(**bench.inputs(0)).logits, alone)


def test_a_call_that_failed_leaves_no_routing_to_the_next(bench, model):
    def fail(layer, args):
        raise RuntimeError("boom")

    with bench.attached(model) as routed:
        expected = routed.score(bench.texts, OPTIONS)
        with model.model.layers[4].register_forward_pre_hook(fail):
            for use in (lambda: model(**bench.inputs(0)), lambda: routed.score(["x"], OPTIONS)):
                with pytest.raises(RuntimeError, match="boom"):
                    use()
        # A layer by itself is part of no call.
        with pytest.raises(ValueError, match="no routing"):
            layer = model.model.layers[4]
            states = torch.zeros(1, 2, 42)
            layer(states, position_embeddings=(torch.ones(1, 2, 10), torch.zeros(1, 2, 10)))
        assert torch.equal(routed.score(bench.texts, OPTIONS), expected)
