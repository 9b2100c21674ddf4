"""Controls of ICR: each is the router of `stages.fit` with one thing changed, and nothing else."""

import dataclasses

import pytest
import torch
from accelerate import DistributedType

import tiny
from fitted import fit_method
from icrouting.config import FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.scoring import option_ids, score_options
from icrouting.evaluation.evaluate import Evaluation
from icrouting.fitting import stages
from icrouting.fitting.queries import training_queries
from icrouting.fitting.training import Trainer
from icrouting.icr import InContextRouter
from icrouting.methods import Settings, controls, make
from icrouting.routing.features import features_of
from icrouting.routing.router import Router
from icrouting.runtime import processes
from icrouting.tasks.prompts import Prompt

TASK = tiny.task("toy", n_test=30)
FAMILIES = ("llama", "qwen3", "gemma3", "gpt_neox")
KINDS = (
    controls.Refit,
    controls.RandomBasis,
    controls.LearnedDirections,
    controls.ConstantFeatures,
    controls.RandomFeatures,
    controls.UniformAlpha,
    controls.UniformGates,
)
PROMPTS = [
    TASK.prompt(example) + "." * (3 * i % 7) + ":" for i, example in enumerate(TASK.test[:7])
]  # mixed lengths


@pytest.fixture(scope="module")
def config(encoder_folder):
    return FitConfig(
        layers=(3, 4),
        rank=3,
        n_prompts=12,
        demos_per_class=2,
        encoder=str(encoder_folder),
        hidden_width=13,
        n_queries=24,
        lr=0.03,
        epochs=3,
        min_steps=0,
        patience=0,
        w_gate=0.0,
    )


@pytest.fixture(scope="module")
def icr(config, tokenizer):
    return InContextRouter.fit(tiny.model("llama"), tokenizer, [TASK], config)


@pytest.fixture(scope="module")
def settings(icr, tmp_path_factory):
    folder = tmp_path_factory.mktemp("router")
    icr.save_pretrained(folder)
    return Settings(router=str(folder))


@pytest.fixture(scope="module")
def fits(settings, tokenizer):
    """Every control, fitted once."""
    return {kind: fitted(kind, settings, tiny.model("llama"), tokenizer) for kind in KINDS}


def fitted(kind, settings, model, tokenizer):
    method = kind(settings)
    return fit_method(method, model, tokenizer, [TASK])


def scores_under(method, prompts=PROMPTS):
    with method.applied(TASK):
        return score_options(
            method.model,
            method.tokenizer,
            [Prompt("", text) for text in prompts],
            TASK.spec.options,
        )


def routing_under(method, prompts=PROMPTS):
    """What the model is routed by, as it is seen by the routed layers."""
    from icrouting.routing.reader import Reader

    seen, of_states = [], Reader.of_states
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "of_states", lambda *a: seen.append(of_states(*a)) or seen[-1])
        scores_under(method, prompts)
    return torch.cat([r.routing_vector for r in seen]), torch.cat([r.head_gates for r in seen])


@pytest.mark.slow
def test_a_control_that_changes_nothing_is_icr(icr, fits, tokenizer):
    refit, model = fits[controls.Refit], tiny.model("llama")
    with icr.attached(model, tokenizer):
        expected = score_options(model, tokenizer, PROMPTS, TASK.spec.options)
    assert torch.equal(scores_under(refit), expected)
    assert not torch.allclose(
        score_options(model, tokenizer, PROMPTS, TASK.spec.options), expected, atol=1e-3
    )


@pytest.mark.slow
def test_a_whitened_router_is_refitted_whitened(config, tokenizer, tmp_path):
    model = tiny.model("llama")
    whitened = InContextRouter.fit(
        model, tokenizer, [TASK], dataclasses.replace(config, basis="whitened")
    )
    whitened.save_pretrained(tmp_path)
    refit = fitted(controls.Refit, Settings(router=str(tmp_path)), model, tokenizer)
    with whitened.attached(model, tokenizer):
        expected = score_options(model, tokenizer, PROMPTS, TASK.spec.options)
    assert torch.equal(scores_under(refit), expected)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.slow
def test_a_control_changes_one_thing(kind, fits, config):
    found = fits[kind].config
    changed = {
        f.name
        for f in dataclasses.fields(config)
        if getattr(found, f.name) != getattr(config, f.name)
    }
    in_router = {"kind"} if kind.kind is not Router else set()
    expected = {
        controls.RandomBasis: {"basis"},
        controls.LearnedDirections: {"basis", "kind"},
        controls.ConstantFeatures: {"encoder"},
        controls.RandomFeatures: {"encoder"},
        controls.UniformAlpha: {"kind"},
        controls.UniformGates: {"kind"},
    }
    assert changed | in_router == expected[kind]
    plain = scores_under(fits[controls.Refit])
    assert not torch.allclose(scores_under(fits[kind]), plain, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_untrained_controls_leave_the_logits_unchanged(
    kind, family, settings, tokenizer, monkeypatch
):
    monkeypatch.setattr(Trainer, "run", lambda self: None)
    model = tiny.model(family)
    plain = score_options(model, tokenizer, PROMPTS, TASK.spec.options)
    method = fitted(kind, settings, model, tokenizer)
    assert torch.equal(scores_under(method), plain)
    # with the weights of alpha moved by hand, the hooks are no silent no-op
    method.weights = method.weights + 0.1
    assert not torch.allclose(scores_under(method), plain, atol=1e-3)
    assert torch.equal(score_options(model, tokenizer, PROMPTS, TASK.spec.options), plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_batch_of_mixed_lengths_scores_like_single_prompts_under_both_paddings(
    kind, fits, tokenizer
):
    method = fits[kind]
    together = scores_under(method)
    alone = torch.cat([scores_under(method, [prompt]) for prompt in PROMPTS])
    assert torch.allclose(together, alone, atol=1e-4)
    padded = tokenizer(PROMPTS, return_tensors="pt", padding=True)  # on the left
    positions = (padded.attention_mask.cumsum(1) - 1).clamp(min=0)
    with method.applied(TASK), torch.no_grad():
        logits = method.model(**padded, position_ids=positions).logits[:, -1]
    ids = torch.tensor([option_ids(tokenizer, prompt, TASK.spec.options) for prompt in PROMPTS])
    assert torch.allclose(logits.gather(1, ids), together, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_learned_gives_the_same_routing(kind, fits, settings):
    method, again = fits[kind], kind(settings)
    again.decoder = method.decoder
    again.restore({name: tensor.clone() for name, tensor in method.tensors().items()})
    for found, expected in zip(routing_under(again), routing_under(method), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(scores_under(again), scores_under(method))


def test_a_random_basis_is_orthonormal_and_not_the_principal_one(fits):
    random, principal = (
        fits[controls.RandomBasis].query_directions,
        fits[controls.Refit].query_directions,
    )
    eye = torch.eye(3).expand(2, 3, 3)
    for directions in (random, principal):
        assert torch.allclose(directions.mT @ directions, eye, atol=1e-5)
    overlap = (
        (random.mT @ principal).square().sum((1, 2))
    )  # 3 for equal subspaces, 3 * 3 / 60 on average by chance
    assert overlap.max() < 1


def test_learned_directions_start_at_the_random_ones_and_move_both(fits):
    start, found = fits[controls.RandomBasis], fits[controls.LearnedDirections]
    for side in ("query_directions", "key_directions"):
        moved = (getattr(found, side) - getattr(start, side)).abs()
        assert moved.amax((1, 2)).min() > 1e-3
    n_pids = start.query_directions.numel() + start.key_directions.numel()
    assert found.n_trained == start.n_trained + n_pids
    assert found.n_cached(TASK) == n_pids


def test_directions_get_the_gradient_of_a_finite_difference(config, tokenizer):
    """The fast way keeps one view of the directions for all steps.

    The slow one runs the loss at moved ones.
    """
    model, task = tiny.model("llama"), TASK
    config = dataclasses.replace(config, epochs=1, basis="random", w_conf=0.0)
    features = features_of(config.encoder, Decoder.of(model, tokenizer), "cpu")
    pids = stages.extract_pids(Decoder.of(model, tokenizer), [task], (3, 4), config, None)
    queries, _ = training_queries(Decoder.of(model, tokenizer), [task], features, 3, config)
    router = controls._TrainedDirections(12, 2, 6, 3, 13, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(
        router.alpha[-1].weight, std=0.3, generator=torch.Generator().manual_seed(1)
    )
    trainer = Trainer(
        Decoder.of(model, tiny.tokenizer()), router.adopt(pids), router, queries, config
    )

    def loss():
        from icrouting.decoder.partial import late_entry
        from icrouting.routing.attach import attach

        with attach(model, trainer.pids) as attachment, late_entry(model, 3) as entry:
            return trainer._terms(entry, attachment, queries[:5])["ce"]

    gradients = torch.autograd.grad(loss(), (router.query_pids, router.key_pids))
    for side, gradient in zip((router.query_pids, router.key_pids), gradients, strict=True):
        place, step = int(gradient.abs().argmax()), 1e-2
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                side.view(-1)[place] += sign * step
                ends.append(float(loss()))
                side.view(-1)[place] -= sign * step
        slow = (ends[0] - ends[1]) / (2 * step)
        assert gradient.flatten()[place] == pytest.approx(slow, rel=0.02)


def test_constant_features_route_all_prompts_alike_and_random_ones_by_the_prompt(fits, tokenizer):
    method = fits[controls.ConstantFeatures]
    alpha, gates = map(
        torch.cat, zip(*(routing_under(method, [prompt]) for prompt in PROMPTS), strict=True)
    )
    assert torch.equal(alpha, alpha[:1].expand_as(alpha))
    assert torch.equal(gates, gates[:1].expand_as(gates))
    for alone, batched in zip((alpha, gates), routing_under(method), strict=True):
        torch.testing.assert_close(
            batched, alone, rtol=0, atol=1e-6
        )  # some processors' products round by the row
    assert alpha.abs().max() > 0.01
    method = fits[controls.RandomFeatures]
    alpha, _ = routing_under(method)
    assert (alpha - alpha[:1]).abs().amax((1, 2))[1:].min() > 0
    read = features_of(method.config.encoder, Decoder.of(method.model, tokenizer), "cpu").read
    tokens = [list(range(n, n + 5)) for n in range(400)]
    features = read(tokens, [])
    assert torch.equal(features[7:9], read(tokens[7:9], []))  # whatever they are batched with
    assert features.shape == (400, 12)
    assert features.mean().abs() < 0.05
    assert (features.std() - 1).abs() < 0.05
    # neighbours share four tokens of five and no direction
    cosines = torch.nn.functional.cosine_similarity(features[1:], features[:-1])
    assert cosines.mean().abs() < 0.05


def test_features_that_say_nothing_have_the_width_of_the_ones_that_they_stand_for(tokenizer):
    model = tiny.model("llama")
    for kind in ("constant", "random"):
        features = features_of(f"{kind}:hidden", Decoder.of(model, tokenizer), "cpu")
        assert features.n_features == model.config.hidden_size
        assert not features.reads_hidden
        assert features.read([[3, 4]], []).shape == (1, 42)


def test_uniform_alpha_is_one_number_and_uniform_gates_are_half(fits):
    alpha, gates = routing_under(fits[controls.UniformAlpha])
    assert torch.equal(alpha, alpha.flatten()[0].expand_as(alpha))
    assert alpha.abs().max() > 0.01
    assert gates.std(0).max() > 1e-4  # they depend on the prompt
    alpha, gates = routing_under(fits[controls.UniformGates])
    assert torch.equal(gates, torch.full_like(gates, 0.5))
    assert alpha.std(0).max() > 1e-4
    full, n_gamma = fits[controls.Refit].n_trained, 12 * 13 + 13 + 13 * 12 + 12
    n_alpha = 12 * 13 + 13 + 13 * 6 + 6
    assert full == n_alpha + n_gamma
    assert fits[controls.UniformAlpha].n_trained == n_gamma + 13  # which are summed
    assert fits[controls.UniformGates].n_trained == n_alpha


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_of_what_can_tell_prompts_apart(kind, fits):
    method = fits[kind]
    texts, labels = (
        [TASK.prompt(row) for row in TASK.train],
        torch.tensor([row.label for row in TASK.train]),
    )
    plain = score_options(method.model, method.tokenizer, texts, TASK.spec.options)
    loss = torch.nn.functional.cross_entropy
    assert loss(scores_under(method, texts), labels) < loss(plain, labels)


def test_without_a_router_the_defaults_are_those_of_a_fit():
    assert controls.Refit(Settings()).config == FitConfig()
    small = controls.Refit(Settings(train_rows=6, encoder="hidden", demos_per_class=2)).config
    assert (small.n_queries, small.n_prompts, small.encoder, small.demos_per_class) == (
        6,
        9,
        "hidden",
        2,
    )


@pytest.mark.slow
def test_controls_are_fitted_once_for_all_seeds_and_labelled_rows_are_bounded(
    settings, tokenizer, tmp_path
):
    methods = make(["icr-constant-once", "icr-uniform-gates"], settings)
    evaluation = Evaluation(
        Decoder.of(tiny.model("llama"), tokenizer),
        methods,
        [TASK],
        tmp_path / "records",
        tmp_path / "fits",
    )
    fits, fit = [], stages.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "fit", lambda *args, **kwargs: fits.append(1) or fit(*args, **kwargs))
        evaluation.run([TASK], (0, 1, 2), 6)
    assert len(fits) == 2
    assert methods[0].cost["labelled"] == len(
        TASK.train
    )  # 24 queries and 12 * 4 demonstrations are more
    names = {file.name for file in (tmp_path / "fits").iterdir()}
    assert names == {"icr-constant-once.safetensors", "icr-uniform-gates-toy.safetensors"}


def test_a_control_is_fitted_by_its_process_alone(monkeypatch):
    """Under `alone`, nothing waits for another process or shares its work with one."""
    state = vars(processes.here())
    before = dict(state)
    as_one_of_three = {
        "num_processes": 3,
        "process_index": 2,
        "distributed_type": DistributedType.MULTI_CPU,
    }
    for name, value in as_one_of_three.items():
        monkeypatch.setitem(state, name, value)
    with pytest.raises(RuntimeError, match="inside"), processes.alone():
        assert processes.is_first()
        assert list(processes.mine(range(5))) == [0, 1, 2, 3, 4]
        assert processes.joined([1]) == [1]
        assert processes.decided(7) == 7
        assert torch.equal(processes.total(torch.ones(2)), torch.ones(2))
        raise RuntimeError("inside")
    assert state == before | as_one_of_three
    assert not processes.is_first()
