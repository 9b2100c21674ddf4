"""ICR behind a gate: like ICR on prompts like its training queries, like nothing on others."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from benchmarks import novelty
from fitted import fit_method
from icrouting.config import FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import stack_of
from icrouting.decoder.scoring import score_options
from icrouting.evaluation.evaluate import Evaluation
from icrouting.icr import InContextRouter
from icrouting.methods import Settings, make
from icrouting.methods.saved import load_method, save_method
from test_chat import speaking

TASK = tiny.task("toy", n_test=30)
FIRST = 3
KNOWN = [TASK.prompt(example) for example in TASK.train[:4]]
NEW = [
    f"{TASK.prompt(example)} quite{'!' * (i + 1)}" for i, example in enumerate(TASK.test[:4])
]  # ends otherwise
MIXED = [KNOWN[0], NEW[0], NEW[1], KNOWN[1], KNOWN[2], NEW[2], KNOWN[3], NEW[3]]


@pytest.fixture(scope="module", params=["sentence encoder", "hidden"])
def settings(request, encoder_folder, tokenizer, tmp_path_factory):
    encoder = str(encoder_folder) if request.param == "sentence encoder" else "hidden"
    config = FitConfig(
        layers=(FIRST, 4),
        rank=3,
        n_prompts=12,
        demos_per_class=2,
        encoder=encoder,
        n_queries=24,
        lr=0.03,
        min_steps=0,
        patience=0,
        w_gate=0.0,
    )
    folder = tmp_path_factory.mktemp("router")
    InContextRouter.fit(tiny.model("llama"), tokenizer, [TASK], config).save_pretrained(folder)
    return Settings(router=str(folder))


@pytest.fixture
def model():
    return tiny.model("llama")


def fitted(settings, model, tokenizer):
    (method,) = make(["icr-gated"], settings)
    return fit_method(method, model, tokenizer, [TASK])


def scores(model, tokenizer, prompts=MIXED):
    return score_options(model, tokenizer, prompts, TASK.spec.options)


def last_states(model, tokenizer, prompts):
    """The slow obvious way: whole passes, what enters the first routed layer, its last token."""
    with torch.no_grad():
        rows = [
            model(torch.tensor([ids]), output_hidden_states=True)
            for ids in tokenizer(prompts).input_ids
        ]
    return torch.stack([row.hidden_states[FIRST][0, -1] for row in rows])


def distances(states, known):
    """The textbook formula, for one task."""
    states, known = states.double(), known.double()
    cov = torch.cov(known.T, correction=0)
    ball = torch.eye(len(cov), dtype=cov.dtype) * cov.trace() / len(cov)
    gaps = states - known.mean(0)
    return torch.stack([gap @ torch.linalg.inv(0.9 * cov + 0.1 * ball) @ gap for gap in gaps])


def is_new(method, model, tokenizer):
    """The slow obvious way.

    Some of a random model's states of other prompts may lie among the known ones.
    """
    found = distances(last_states(model, tokenizer, MIXED), method.known) > method.limit
    assert found.any()
    assert not found.all()
    return found


@pytest.mark.slow
def test_the_limit_is_where_a_hundredth_of_other_rows_would_be_shut_out(settings, model, tokenizer):
    method = fitted(settings, model, tokenizer)
    drawn = np.random.default_rng(0)
    drawn.integers(2**32)  # the method's entropy
    rows = drawn.permutation(len(TASK.train))[:260]
    states = last_states(model, tokenizer, [TASK.prompt(TASK.train[i]) for i in rows])
    n_known = len(rows) * 200 // 260
    assert 2 < n_known < len(rows)
    assert torch.allclose(method.known, states[:n_known], atol=1e-5)
    expected = np.quantile(distances(states[n_known:], states[:n_known]), 0.99)
    assert float(method.limit) == pytest.approx(float(expected), rel=1e-3)


def test_the_nearest_of_several_tasks_counts(settings, model, tokenizer):
    (method,) = make(["icr-gated"], settings)
    others = [TASK, tiny.task("other", n_test=30)]
    tasks = {task.name: len(task.train) for task in others}
    method._router = replace(
        method._router, description=replace(method._router.description, tasks=tasks)
    )
    method.fit(model, tokenizer, others, np.random.default_rng(0))
    states = last_states(model, tokenizer, MIXED)
    by_task = [distances(states, method.known[method.owners == owner]) for owner in (0, 1)]
    assert method.owners.unique().tolist() == [0, 1]
    assert torch.equal(
        method.is_known([row[None] for row in states]), torch.stack(by_task).amin(0) <= method.limit
    )


def test_known_prompts_are_routed_and_new_ones_are_not(settings, model, tokenizer):
    method, plain = fitted(settings, model, tokenizer), scores(model, tokenizer)
    with InContextRouter.from_pretrained(settings.router).attached(model, tokenizer):
        routed = scores(model, tokenizer)
    assert (routed - plain).abs().amax(1).min() > 1e-2, "the test's router does nothing"
    with method.attached(model, tokenizer, TASK):
        gated = scores(model, tokenizer)
        alone = torch.cat([scores(model, tokenizer, [prompt]) for prompt in MIXED])
    assert torch.allclose(
        gated, torch.where(is_new(method, model, tokenizer)[:, None], plain, routed), atol=1e-5
    )
    assert torch.allclose(alone, gated, atol=1e-5)
    assert torch.equal(scores(model, tokenizer), plain)
    assert not stack_of(model)._forward_hooks


@pytest.mark.slow
def test_generation_keeps_what_the_prompt_decided(settings, model, tokenizer):
    def said(prompt):
        inputs = tokenizer(prompt, return_tensors="pt")
        return model.generate(
            **inputs, max_new_tokens=6, do_sample=False, num_beams=2, pad_token_id=0
        )[0].tolist()

    plain, method = [said(prompt) for prompt in MIXED], fitted(settings, model, tokenizer)
    new = is_new(method, model, tokenizer)
    with InContextRouter.from_pretrained(settings.router).attached(model, tokenizer):
        routed = [said(prompt) for prompt in MIXED]
    with method.attached(model, tokenizer, TASK):
        found = [said(prompt) for prompt in MIXED]
    assert plain != routed, "the test's router does nothing"
    assert found == [plain[row] if is_left else routed[row] for row, is_left in enumerate(new)]


def test_the_routing_of_a_new_prompt_reads_zero(settings, model, tokenizer):
    method, icr = (
        fitted(settings, model, tokenizer),
        InContextRouter.from_pretrained(settings.router),
    )
    with icr.attached(model, tokenizer, gate=method.is_known) as routed:
        vectors = routed.routing(MIXED).routing_vector
    assert torch.equal(vectors.abs().amax((1, 2)) == 0, is_new(method, model, tokenizer))


def test_a_saved_gate_is_the_same(settings, model, tokenizer, tmp_path):
    method = fitted(settings, model, tokenizer)
    save_method(method, tmp_path)
    with method.attached(model, tokenizer, TASK):
        expected = scores(model, tokenizer)
    again = load_method(tmp_path, model, tokenizer)
    with again.attached(model, tokenizer, TASK):
        assert torch.equal(scores(model, tokenizer), expected)
    assert again.n_cached(TASK) == method.known.numel() + make(["icr"], settings)[0].n_cached(TASK)


def test_another_router_is_refused(settings, model, tokenizer, tmp_path):
    method = fitted(settings, model, tokenizer)
    save_method(method, tmp_path / "gate")
    config = FitConfig(
        layers=(FIRST, 4),
        rank=2,
        n_prompts=12,
        encoder="hidden",
        n_queries=8,
        min_steps=0,
        patience=0,
    )
    InContextRouter.fit(model, tokenizer, [TASK], config).save_pretrained(settings.router)
    with pytest.raises(ValueError, match="was learned with"):
        load_method(tmp_path / "gate", model, tokenizer)


def test_a_router_from_layer_0_on_cannot_be_gated(settings, model, tokenizer):
    (method,) = make(["icr-gated"], settings)
    method._router = replace(method._router, pids=replace(method._router.pids, layers=(0, 4)))
    with pytest.raises(ValueError, match="tells no prompts apart"):
        method.fit(model, tokenizer, [TASK], np.random.default_rng(0))


@pytest.mark.parametrize("sources", [[], [tiny.task("other")], [TASK, tiny.task("other")]], ids=len)
def test_other_sources_than_the_routers_are_refused(sources, settings, model, tokenizer):
    (method,) = make(["icr-gated"], settings)
    with pytest.raises(ValueError, match="source task"):
        method.fit(model, tokenizer, sources, np.random.default_rng(0))


def test_too_few_rows_are_refused(settings, model, tokenizer):
    (method,) = make(["icr-gated"], settings)
    with pytest.raises(ValueError, match=r"26 rows .*'toy'.*give {'toy': 25}"):
        method.fit(
            model, tokenizer, [replace(TASK, train=TASK.train[:25])], np.random.default_rng(0)
        )


def test_what_is_taken_up_anew_is_what_counts(settings, model, tokenizer, tmp_path):
    method, file = fitted(settings, model, tokenizer), tmp_path / "gate.safetensors"
    method.is_known([torch.zeros(1, method.known.shape[1])])
    again = replace(TASK, train=TASK.train[10:])
    (other,) = make(["icr-gated"], settings)
    other.fit(model, tokenizer, [again], np.random.default_rng(1), file)
    method.fit(model, tokenizer, [again], np.random.default_rng(1), file)
    rows = [state[None] for state in last_states(model, tokenizer, MIXED)]
    assert torch.equal(method._distances(torch.cat(rows)), other._distances(torch.cat(rows)))


def test_the_gate_reads_rows_as_the_router_learned_from_them(settings, model):
    speaker = speaking()
    (plain,) = make(["icr-gated"], settings)
    fit_method(plain, model, speaker, [TASK])
    (asked_in_chats,) = make(["icr-gated"], settings)
    fit_method(asked_in_chats, model, speaker, [TASK.in_chat()])
    assert torch.equal(asked_in_chats.known, plain.known)


@pytest.mark.parametrize("outer", ["icr", "icr-gated"])
def test_nothing_joins_what_routes_and_a_refusal_leaves_it_in_force(
    outer, settings, model, tokenizer
):
    gated, router = (
        fitted(settings, model, tokenizer),
        InContextRouter.from_pretrained(settings.router),
    )
    (icr,), plain = make(["icr"], settings), scores(model, tokenizer)
    attached = {
        "icr": lambda: router.attached(model, tokenizer),
        "icr-gated": lambda: gated.attached(model, tokenizer, TASK),
    }
    inner = (
        *attached.values(),
        lambda: icr.attached(model, tokenizer, TASK),
        lambda: nullcontext(InContextRouter.fit(model, tokenizer, [TASK], router.description.fit)),
        lambda: nullcontext(fitted(settings, model, tokenizer)),
    )
    with attached[outer]():
        routed = scores(model, tokenizer)
        for join in inner:
            with pytest.raises(ValueError, match=f"{outer} is attached to this model"), join():
                pass
        assert torch.equal(scores(model, tokenizer), routed)
    assert torch.equal(scores(model, tokenizer), plain)
    with icr.attached(model, tokenizer, TASK):  # and holds it no longer
        pass


def test_every_seed_has_a_gate_of_its_own(settings, model, tokenizer, tmp_path):
    (method,) = make(["icr-gated"], settings)
    evaluation = Evaluation(
        Decoder.of(model, tokenizer),
        [method],
        [TASK],
        tmp_path / "records.jsonl",
        tmp_path / "fits",
    )
    known = []
    for seed in (0, 1):
        evaluation.fit(seed)
        known.append(method.known)
    assert len(list((tmp_path / "fits").iterdir())) == 2
    assert not torch.equal(*known)


def test_the_distance_is_that_of_the_benchmark_which_chose_it(settings, model, tokenizer):
    """`benchmarks/novelty.py` inverts covariances whole, and divides them by one row less."""
    method = fitted(settings, model, tokenizer)
    n = len(method.known)
    states = last_states(model, tokenizer, MIXED)
    whole = -torch.from_numpy(novelty.gaussian({TASK.name: method.known})(states))
    assert torch.allclose(method._distances(states), whole * n / (n - 1), rtol=1e-6)


@pytest.mark.parametrize(
    "gate", [lambda states: torch.ones(1), lambda states: [float("nan")] * len(states)]
)
def test_a_gate_that_gives_no_finite_factor_for_every_prompt_is_refused(
    gate, settings, model, tokenizer
):
    icr = InContextRouter.from_pretrained(settings.router)
    prompts = tokenizer(
        ["Review: joy\nSentiment:", "Review: dull plot\nSentiment:"],
        return_tensors="pt",
        padding=True,
    )
    with (
        icr.attached(model, tokenizer, gate=gate),
        pytest.raises(ValueError, match="a finite factor for each of 2"),
    ):
        model(**prompts)
