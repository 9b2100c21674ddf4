"""Whatever a user does with a model that is attached now and then, no number is wrong.

Hypothesis draws sequences of steps. Each use must give what the routed model gives while it is
attached, what the plain model gives while it is not, or an error where one is due.
"""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import nn

from bench import CLOSE, MATTERS, Bench
from icrouting.config import HIDDEN
from icrouting.decoder.scoring import score_options

OPTIONS = ("negative", "positive")
NEW = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
BENCH = Bench(HIDDEN)
ROWS = st.integers(0, 2)
PLAIN_KERNELS = ["sdpa", "eager"]


def swapped(model):
    """Another query projection, which changes what the model computes."""
    attention = model.model.layers[3].self_attn
    other = nn.Linear(42, 60, bias=False).requires_grad_(False)
    other.weight.copy_(attention.q_proj.weight.flip(0))
    return other


USES = {
    "score": lambda model, row: score_options(model, BENCH.tokenizer, [BENCH.texts[row]], OPTIONS),
    "call": lambda model, row: model(**BENCH.inputs(row)).logits,
    "stack": lambda model, row: model.model(**BENCH.inputs(row)).last_hidden_state,
    "generate": lambda model, row: model.generate(
        **BENCH.inputs(row), **NEW, output_logits=True, return_dict_in_generate=True
    ).logits[-1],
}


def table_of(model):
    """What every use gives for every row."""
    with torch.no_grad():
        return {(name, row): use(model, row) for name, use in USES.items() for row in range(3)}


def plain_tables():
    model = BENCH.fresh()
    original = table_of(model)
    model.model.layers[3].self_attn.q_proj = swapped(model)
    return {"original": original, "other": table_of(model)}


PLAIN = plain_tables()
with BENCH.attached():
    ROUTED = table_of(BENCH.model)


class AnyUse(RuleBasedStateMachine):
    """A model, what was done to it, and whether it is attached."""

    def __init__(self):
        super().__init__()
        self.model = BENCH.fresh()
        self.attention = self.model.model.layers[3].self_attn
        self.original = self.attention.q_proj
        # Of the query projection: "original", or "other" where it computes something else.
        self.weights = "original"
        self.entered = None
        self.routed = None
        self.left = []
        self.is_kernel_changed = False

    @property
    def is_attached(self):
        return self.entered is not None

    @property
    def is_spoiled(self):
        """Whether what is attached cannot be routed any more."""
        return self.attention.q_proj is not self.hooked or self.is_kernel_changed

    def expect(self, use, name, row):
        """Checks one use's result, or that it is an error."""
        if self.is_attached and self.is_spoiled:
            with pytest.raises(RuntimeError, match="while the model is attached"):
                use()
            return
        expected = ROUTED[name, row] if self.is_attached else PLAIN[self.weights][name, row]
        assert (use() - expected).abs().max() <= CLOSE, (name, row)

    @rule(name=st.sampled_from(list(USES)), row=ROWS)
    def use(self, name, row):
        with torch.no_grad():
            self.expect(lambda: USES[name](self.model, row), name, row)

    @precondition(lambda self: self.is_attached)
    @rule(row=ROWS)
    def score(self, row):
        self.expect(lambda: self.routed.score([BENCH.texts[row]], OPTIONS), "score", row)

    @rule(requests=st.lists(st.tuples(st.sampled_from(list(USES)), ROWS), min_size=2, max_size=4))
    def use_in_threads(self, requests):
        def run(name, row):
            with torch.no_grad():
                return USES[name](self.model, row)

        with ThreadPoolExecutor(len(requests)) as pool:
            futures = [pool.submit(run, name, row) for name, row in requests]
        for future, (name, row) in zip(futures, requests, strict=True):
            self.expect(future.result, name, row)

    @precondition(lambda self: not self.is_attached)
    @rule()
    def enter(self):
        entering = BENCH.attached(self.model)
        if self.weights == "other":
            with pytest.raises(ValueError, match="fitted on"):
                entering.__enter__()
            return
        self.routed = entering.__enter__()
        self.entered = entering
        self.hooked = self.attention.q_proj

    @precondition(lambda self: self.is_attached)
    @rule()
    def enter_again(self):
        # Weights that are others by now are the first that is noticed.
        with pytest.raises(ValueError, match=r"attached to this model|fitted on"):
            BENCH.attached(self.model).__enter__()

    @precondition(lambda self: self.is_attached)
    @rule(fails=st.booleans())
    def leave(self, fails):
        if fails:
            with pytest.raises(KeyError):
                self.entered.gen.throw(KeyError("boom"))
        else:
            self.entered.__exit__(None, None, None)
        self.entered = None
        self.left.append(self.routed)
        self.is_kernel_changed = False

    @precondition(lambda self: self.left)
    @rule(row=ROWS)
    def use_what_was_left(self, row):
        with pytest.raises(RuntimeError, match="no longer attached"):
            self.left[-1].score([BENCH.texts[row]], OPTIONS)

    @rule(how=st.sampled_from(["same", "other", "back"]))
    def swap(self, how):
        current = self.attention.q_proj
        if how == "same":
            self.attention.q_proj = nn.Linear(42, 60, bias=False).requires_grad_(False)
            self.attention.q_proj.weight.copy_(current.weight)
        elif how == "other" and self.weights == "original":
            self.attention.q_proj = swapped(self.model)
            self.weights = "other"
        elif how == "back":
            self.attention.q_proj = self.original
            self.weights = "original"

    @precondition(lambda self: self.is_attached)
    @rule(kernel=st.sampled_from(PLAIN_KERNELS), on=st.sampled_from(["model", "stack", "config"]))
    def set_kernel(self, kernel, on):
        if on == "config":
            self.model.config._attn_implementation = kernel
        else:
            part = {"model": self.model, "stack": self.model.model}[on]
            part.set_attn_implementation(kernel)
        self.is_kernel_changed = True

    @rule(row=ROWS)
    def copy(self, row):
        if self.is_attached:
            with pytest.raises(RuntimeError, match="cannot be copied"):
                copy.deepcopy(self.model)
            return
        copied = copy.deepcopy(self.model)
        assert (USES["call"](copied, row) - PLAIN[self.weights]["call", row]).abs().max() <= CLOSE

    @rule(row=ROWS, layer=st.integers(0, 4))
    def fail(self, row, layer):
        def boom(module, args):
            raise ZeroDivisionError

        if self.is_attached and self.is_spoiled:
            return
        with (
            self.model.model.layers[layer].register_forward_pre_hook(boom),
            pytest.raises(ZeroDivisionError),
        ):
            USES["call"](self.model, row)

    @invariant()
    def is_as_it_was_found(self):
        if not self.is_attached:
            assert self.model.config._attn_implementation == "sdpa"
            assert not {"forward", "generate"} & set(vars(self.model))
            assert not any(module._forward_hooks for module in self.model.modules())

    def teardown(self):
        if self.is_attached:
            self.entered.__exit__(None, None, None)
        self.is_as_it_was_found()


TestAnyUse = AnyUse.TestCase
TestAnyUse.settings = settings(max_examples=20, stateful_step_count=15, deadline=None)
TestAnyUse.pytestmark = [pytest.mark.slow]


def test_the_tables_tell_what_must_be_told_apart():
    """Else the machine above would hold nothing."""
    for name, row in ROUTED:
        routed, plain = ROUTED[name, row], PLAIN["original"][name, row]
        assert (routed - plain).abs().max() > MATTERS
        assert (PLAIN["other"][name, row] - plain).abs().max() > MATTERS
        assert (ROUTED[name, (row + 1) % 3][..., -1, :2] - routed[..., -1, :2]).abs().max() > CLOSE
