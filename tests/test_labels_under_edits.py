"""Whole-label scoring of a model that a router or a rival changes, against slow ways."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import tiny
from bench import MATTERS, Bench
from fitted import fit_method
from icrouting.decoder.scoring import option_tokens, score_options
from icrouting.methods.registry import LEARNING
from test_labels import CLOSE, LABELS

TASK = tiny.task("toy", n_test=30)
# Of unlike lengths, so that a batch of them would be padded.
PROMPTS = [TASK.prompt(example) + "." * extra + ":" for extra, example in enumerate(TASK.test[:2])]


class Forced(LogitsProcessor):
    """Lets `generate` choose none but the tokens that are given, one after the other."""

    def __init__(self, tokens, n_prompt):
        self.tokens, self.n_prompt = tokens, n_prompt

    def __call__(self, input_ids, scores):
        token = self.tokens[input_ids.shape[1] - self.n_prompt]
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([token]), 0.0)


def generated_sums(model, tokenizer, texts, labels):
    """What `generate` says of each label's tokens when it has to choose them."""
    rows = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        row = []
        for tokens in option_tokens(tokenizer, text, labels):
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=len(tokens),
                do_sample=False,
                logits_processor=LogitsProcessorList([Forced(tokens, ids.shape[1])]),
                output_logits=True,
                return_dict_in_generate=True,
            )
            assert output.sequences[0, ids.shape[1] :].tolist() == tokens
            steps = [logits[0].float().log_softmax(-1) for logits in output.logits]
            row.append(sum(step[token] for step, token in zip(steps, tokens, strict=True)))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
@pytest.mark.slow
def test_routed_sums_are_those_of_the_dense_reference(family, encoder_folder):
    bench = Bench(encoder_folder, family)
    dense = bench.fresh("eager")
    expected = []
    for row, text in enumerate(bench.texts):
        n_prompt = len(bench.tokenizer(text).input_ids)
        for tokens in option_tokens(bench.tokenizer, text, LABELS):
            ids = torch.tensor([[*bench.tokenizer(text).input_ids, *tokens]])
            log_probs = bench.slow_logits(row, dense, ids)[0].log_softmax(-1)
            steps = range(n_prompt - 1, n_prompt - 1 + len(tokens))
            expected.append(log_probs[list(steps), tokens].sum())
    expected = torch.stack(expected).view(len(bench.texts), -1)
    with bench.attached() as routed:
        whole = routed.score(bench.texts, LABELS, label_scoring="sum")
    plain = score_options(bench.model, bench.tokenizer, bench.texts, LABELS, label_scoring="sum")
    assert (whole - expected).abs().max() < CLOSE
    assert (plain - expected).abs().max() > MATTERS


def test_routed_sums_are_the_same_in_parts(encoder_folder):
    bench = Bench(encoder_folder)
    with bench.attached():
        sums = [
            score_options(
                bench.model,
                bench.tokenizer,
                bench.texts,
                LABELS,
                label_scoring="sum",
                token_budget=budget,
            )
            for budget in (2048, 50)
        ]
    assert (sums[0] - sums[1]).abs().max() < CLOSE


@pytest.mark.parametrize("kind", LEARNING, ids=lambda kind: kind.name)
@pytest.mark.slow
def test_sums_under_a_rival_are_those_of_generation(kind, tokenizer, small_settings):
    model = tiny.model("llama")
    method = fit_method(kind(small_settings), model, tokenizer, [TASK])
    with method.attached(model, tokenizer, TASK):
        whole = score_options(model, tokenizer, PROMPTS, LABELS, label_scoring="sum")
        expected = generated_sums(model, tokenizer, PROMPTS, LABELS)
    assert (whole - expected).abs().max() < CLOSE


@pytest.mark.parametrize("name", ["prefix-tuning", "prompt-tuning", "iterative-vectors"])
@pytest.mark.slow
def test_sums_under_a_rival_on_a_model_of_windows_are_those_of_generation(
    name, tokenizer, small_settings
):
    (kind,) = [kind for kind in LEARNING if kind.name == name]
    model = tiny.model("gemma3")
    method = fit_method(kind(small_settings), model, tokenizer, [TASK])
    with method.attached(model, tokenizer, TASK):
        whole = score_options(model, tokenizer, PROMPTS, LABELS, label_scoring="sum")
        expected = generated_sums(model, tokenizer, PROMPTS, LABELS)
    assert (whole - expected).abs().max() < CLOSE
