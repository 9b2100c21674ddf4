"""Rows that are longer than a model's context: left out of a fit, said by name, and planned so."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from icrouting.config import FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import family_of, stack_of
from icrouting.fitting import plan
from icrouting.fitting.extraction import _drawn, extract
from icrouting.icr import InContextRouter
from icrouting.tasks.prompts import extraction_prompts
from icrouting.tasks.task import Example

LAYERS = (3, 4)
CONFIG = FitConfig(
    LAYERS,
    rank=2,
    n_prompts=40,
    demos_per_class=1,
    n_queries=40,
    encoder="hidden",
    epochs=1,
    min_steps=0,
    patience=0,
)
LONG = Example({"text": "so long a film " * 200}, (), 1)


def with_long(places=(7,), name="toy"):
    """The toy task with rows that no context of 512 tokens holds."""
    task = tiny.task(name)
    rows = list(task.train)
    for place in places:
        rows[place] = LONG
    return replace(task, train=tuple(rows))


@pytest.fixture
def decoder(tokenizer):
    return Decoder.of(tiny.model("llama"), tokenizer)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.slow
def test_a_fit_leaves_out_what_no_context_holds_and_names_the_row(seed, decoder, caplog):
    config = replace(CONFIG, seed=seed, n_queries=6)
    InContextRouter.fit(decoder.model, decoder.tokenizer, [with_long(), tiny.task("b")], config)
    messages = [record.getMessage() for record in caplog.records]
    (message,) = [each for each in messages if "few-shot prompts" in each]
    assert "of 40 few-shot prompts of 'toy', as longer than the model's context of 512" in message
    assert "the longest row of each: training row 8 (" in message
    assert message.endswith("it begins 'so long a film so long a film so long a ')")


def test_what_fits_is_drawn_as_it_was_and_pooled(decoder):
    task = with_long()
    moments = extract(decoder, [task, tiny.task("b")], LAYERS, CONFIG, None)
    expected = []
    rng = np.random.default_rng(CONFIG.seed)
    for each in (task, tiny.task("b")):
        for prompt in extraction_prompts(each, 40, 1, rng, 1):
            if len(decoder.tokenizer(prompt.text).input_ids) <= 512:
                expected.append(prompt)
    assert 40 < len(expected) < 80
    assert list(_drawn(decoder, [task, tiny.task("b")], CONFIG)) == expected
    assert int(moments.tensors()["count"]) == len(expected)


def test_rows_that_fit_the_context_leave_no_line(decoder, caplog):
    assert len(list(_drawn(decoder, [tiny.task()], CONFIG))) == 40
    assert not caplog.records


def test_of_many_long_rows_a_few_are_named(decoder, caplog):
    list(_drawn(decoder, [with_long(range(5))], CONFIG))
    (record,) = caplog.records
    assert "training row 1 (" in record.getMessage()


def test_a_task_of_which_no_prompt_fits_is_refused_by_name(decoder):
    config = replace(CONFIG, demos_per_class=20)
    message = "every few-shot prompt of task 'toy' is longer than the model's context of 512"
    with pytest.raises(ValueError, match=message):
        extract(decoder, [tiny.task()], LAYERS, config, None)
    with pytest.raises(ValueError, match=message):
        plan.plan_fit(decoder.model, decoder.tokenizer, [tiny.task()], config, torch.float32)


@pytest.mark.slow
def test_a_stopped_extraction_goes_on_to_the_same_moments(decoder, tmp_path):
    tasks = [with_long(), tiny.task("b")]
    whole = extract(decoder, tasks, LAYERS, CONFIG, None)
    extract(decoder, tasks, LAYERS, CONFIG, tmp_path)
    again = extract(decoder, tasks, LAYERS, CONFIG, tmp_path)
    for name, tensor in whole.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)


@pytest.mark.slow
def test_the_plan_counts_what_the_fit_runs(decoder):
    # So many demonstrations that no two prompts share theirs.
    model = decoder.model
    tasks = [with_long(), tiny.task("b")]
    config = replace(CONFIG, demos_per_class=3)
    planned = plan.plan_fit(model, decoder.tokenizer, tasks, config, torch.float32)
    n_tokens = []

    def count(module, args, kwargs):
        n_tokens.append(int(kwargs["attention_mask"].sum()))

    # The probe's passes are none of the fit's.
    family_of(model)
    with stack_of(model).register_forward_pre_hook(count, with_kwargs=True):
        InContextRouter.fit(model, decoder.tokenizer, tasks, config)
    n_extraction = sum(texts.tokens for texts in planned.prompts.values())
    n_queries = sum(texts.tokens for texts in planned.queries.values())
    assert sum(n_tokens) == n_extraction + (1 + CONFIG.epochs) * n_queries
    assert planned.prompts["toy"].count < planned.prompts["b"].count == 40
