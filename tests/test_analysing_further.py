"""Analyses of directions, tokens, the space of routings and cost."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

import tiny
from icrouting.analysing import cost, directions, space, tokens
from icrouting.analysing.config import AnalysisConfig
from icrouting.analysing.direction_pictures import clustered
from icrouting.analysing.parts import ANALYSES
from icrouting.analysing.prediction import r2
from icrouting.analysing.study import Study, is_constant
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.passes import run_prefix
from icrouting.fitting.capture import capture_last_tokens
from icrouting.fitting.lengths import Texts
from icrouting.fitting.pca import QKMoments, fit_pids
from icrouting.fitting.reckoning import Sizes, pass_flops
from icrouting.routing.router import Routing
from inspected import sharp_router


@pytest.fixture(scope="module")
def study(tokenizer, encoder_folder):
    model = tiny.model("llama")
    with pytest.MonkeyPatch.context() as monkeypatch:
        icr = sharp_router(model, tokenizer, encoder_folder, monkeypatch)
    tasks = [tiny.task(), tiny.task("mr")]
    config = AnalysisConfig(n_test=8, n_prompts=8)
    return Study.of(icr, Decoder.of(model, tokenizer), tasks, config)


@pytest.fixture(scope="module")
def shared(study):
    return directions.directions(study)


@pytest.fixture(scope="module")
def words(study):
    return tokens.tokens(study)["tokens"]


@pytest.fixture(scope="module")
def costs(study):
    return cost.cost(study)["cost"]


def pictures_of(study):
    pictures = []
    for part in ANALYSES.values():
        pictures += part.pictures(part.tables(study))
    return pictures


@pytest.mark.slow
def test_a_router_that_changes_nothing_is_drawn_and_said_without_a_figure_that_is_none(
    tokenizer, encoder_folder
):
    model = tiny.model("llama")
    with pytest.MonkeyPatch.context() as monkeypatch:
        icr = sharp_router(model, tokenizer, encoder_folder, monkeypatch)
    for parameter in icr.router.parameters():
        parameter.data.zero_()
    config = AnalysisConfig(n_test=3, n_prompts=8)
    study = Study.of(icr, Decoder.of(model, tokenizer), [tiny.task()], config)
    assert not [picture.says for picture in pictures_of(study) if "nan" in picture.says]


@pytest.mark.slow
def test_options_that_share_their_first_token_leave_accuracy_out(tokenizer, study):
    task = tiny.task()
    labels = ("joy of acting", "joy of plot")
    spec = replace(task.spec, options=labels, label_scoring="sum")
    config = AnalysisConfig(n_test=3, n_prompts=8)
    mixed = Study.of(study.icr, study.decoder, [replace(task, spec=spec)], config)
    assert np.isnan(mixed.is_right(mixed.zero_and_routed[0])).all()
    assert not [picture.says for picture in pictures_of(mixed) if "nan" in picture.says]


def random_bases(seed, n_layers=3, width=11, rank=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n_layers, width, rank, generator=generator)).Q


def test_a_subspace_overlaps_itself_whole_whatever_its_basis():
    basis = random_bases(0)
    turned = basis @ torch.linalg.qr(torch.randn(4, 4)).Q
    shared, angles = directions.overlap(basis, turned)
    assert shared == pytest.approx(np.ones(3), abs=1e-5)
    assert (angles < 0.5).all()


def test_subspaces_at_right_angles_overlap_nowhere():
    whole = torch.linalg.qr(torch.randn(1, 9, 8)).Q
    shared, angles = directions.overlap(whole[..., :4], whole[..., 4:])
    assert float(shared) == pytest.approx(0, abs=1e-10)
    assert float(angles) == pytest.approx(90, abs=1e-3)


def test_principal_angles_are_scipys():
    one, other = random_bases(1), random_bases(2)
    shared, angles = directions.overlap(one, other)
    for layer in range(3):
        expected = subspace_angles(one[layer].double().numpy(), other[layer].double().numpy())
        assert float(angles[layer]) == pytest.approx(np.rad2deg(expected.mean()), abs=1e-4)
        assert float(shared[layer]) == pytest.approx((np.cos(expected) ** 2).mean(), abs=1e-6)


def test_random_subspaces_overlap_by_rank_over_width():
    pairs = [directions.overlap(random_bases(s, 1), random_bases(s + 999, 1)) for s in range(300)]
    assert np.mean([float(shared) for shared, _ in pairs]) == pytest.approx(4 / 11, abs=0.02)


def test_directions_are_those_that_the_fit_would_take():
    vectors = torch.randn(30, 2, 12) * torch.linspace(3, 0.2, 12)
    moments = QKMoments(2, 12, 12)
    moments.update(vectors.transpose(0, 1), vectors.transpose(0, 1))
    pids = fit_pids(moments, (0, 1), 4, "pca", torch.Generator())
    shared, _ = directions.overlap(directions.subspaces(vectors, 4), pids.query_pids)
    assert shared == pytest.approx(np.ones(2), abs=1e-5)


def test_the_directions_of_the_routers_own_prompts_are_the_routers(study):
    prompts = []
    rng = np.random.default_rng(study.icr.description.fit.seed)
    task = tiny.task()
    prompts = list(directions.extraction_prompts(task, 12, 1, rng))
    rows = [
        query[:, 0]
        for prompt in prompts
        for query, _ in capture_last_tokens(study.decoder, [prompt], study.layers)
    ]
    basis = directions.subspaces(torch.stack(rows), study.icr.pids.rank)
    shared, _ = directions.overlap(basis, study.icr.pids.query_pids)
    assert shared == pytest.approx(np.ones(2), abs=1e-4)


def test_a_task_correlates_with_itself_by_one(shared):
    table = shared["correlation"]
    assert table[table.task == table.other].rho.tolist() == pytest.approx([1, 1])


def test_the_correlation_is_that_of_ranks(study):
    values = {}
    for task in study.task_names:
        routing = directions.routing_of(study, task)
        importance = directions.direction_importance(routing).flatten().numpy()
        values[task] = importance.argsort().argsort()
    expected = np.corrcoef(values["toy"], values["mr"])[0, 1]
    table = directions.correlation(study)
    rho = table[(table.task == "toy") & (table.other == "mr")].rho.item()
    assert rho == pytest.approx(expected)


def test_a_router_that_uses_all_directions_alike_has_no_correlation(study):
    silent = replace(study)
    silent.__dict__["routing"] = Routing(study.routing.routing_vector * 0, study.routing.head_gates)
    assert directions.correlation(silent).rho.isna().all()


def test_explained_variance_grows_with_rank_to_no_more_than_all(shared):
    for _, lines in shared["spectrum"].groupby(["side", "layer"]):
        assert lines.explained.is_monotonic_increasing
        assert 0 < lines.explained.iloc[-1] <= 1 + 1e-9


def test_two_draws_of_as_many_prompts_as_there_are_is_the_last_line(shared):
    assert shared["stability"].groupby("side").n.max().tolist() == [8, 8]


def test_too_few_prompts_for_two_draws_are_refused_before_any_pass(study):
    few = replace(study, config=AnalysisConfig(n_prompts=6))
    with pytest.raises(ValueError, match="more than 7 few-shot prompts of each task, got 6"):
        directions.directions(few)


def test_rows_of_tasks_are_pooled_in_turn():
    pooled = directions.interleaved({"a": torch.tensor([1, 2, 3]), "b": torch.tensor([10, 20])})
    assert pooled.tolist() == [1, 10, 2, 20]


def test_clusters_put_like_beside_like():
    rho = np.array([[1, 0, 0.9, 0], [0, 1, 0, 0.9], [0.9, 0, 1, 0], [0, 0.9, 0, 1]])
    order = clustered(rho)
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 2}), frozenset({1, 3})}


def slow_score(changes, token):
    """The score of a token, counted out."""
    by_task = [[float(row[token]) for row in change] for change in changes]
    means = [np.mean(values) for values in by_task]
    mean, spread = np.mean(means), np.std(means)
    stability = max(0, mean) / (abs(mean) + spread) if abs(mean) + spread else 0
    positive = np.mean([np.mean([value > 0 for value in values]) for values in by_task])
    borda = 0
    for change, own in zip(changes, means, strict=True):
        others = change.mean(0).tolist()
        borda += sum(other < own for other in others)
    return stability * positive * np.log(1 + borda)


def test_the_score_is_stability_times_positive_rate_times_log_of_borda():
    changes = [torch.randn(5, 7).double(), torch.randn(3, 7).double()]
    table = tokens.score(changes)
    expected = [slow_score(changes, token) for token in range(7)]
    assert table.score.tolist() == pytest.approx(expected)


def test_a_token_that_rises_alike_everywhere_has_a_stability_of_one():
    changes = [torch.tensor([[0.5, -0.1]]).double()] * 3
    assert tokens.score(changes).stability.tolist() == pytest.approx([1, 0])


def test_tokens_that_nothing_moves_have_a_score_of_zero():
    changes = [torch.zeros(4, 6).double()] * 2
    assert tokens.score(changes).score.tolist() == [0] * 6


def test_the_changes_of_tokens_are_those_of_routed_prompts(study, words):
    zero, routed = study.zero_and_routed
    line = words.iloc[0]
    by_task = [(routed - zero)[study.rows_of(task), int(line.id)].mean() for task in study.tasks]
    assert line.routing_change == pytest.approx(float(sum(by_task)) / 2)


def test_ranks_of_tokens_follow_their_scores(words):
    assert words.routing_rank.is_monotonic_increasing
    assert words.routing_score.is_monotonic_decreasing


def test_the_map_of_routings_that_are_all_one_is_a_point():
    routing = Routing(torch.ones(4, 2, 3), torch.ones(4, 2, 6))
    places, shares = space.flat_map(routing)
    assert not places.any()
    assert not shares.any()


def test_distances_on_the_map_are_those_of_routings_that_differ_in_two_numbers():
    routing = Routing(torch.zeros(5, 2, 3), torch.zeros(5, 2, 6))
    drawn = torch.randn(5, 2)
    routing.routing_vector[:, 0, 1] = drawn[:, 0]
    routing.head_gates[:, 1, 4] = drawn[:, 1]
    places, shares = space.flat_map(routing)
    expected = torch.cdist(drawn.double(), drawn.double())
    on_map = torch.cdist(torch.tensor(places), torch.tensor(places))
    assert (on_map - expected).abs().max() < 1e-6
    assert sum(shares) == pytest.approx(1)


def test_coefficients_are_projections_of_the_few_shot_prompts_last_query(study):
    true = space.coefficients(study)
    for row in (0, len(study.items) - 1):
        ((query, _),) = capture_last_tokens(
            study.decoder, [study.items[row].few_shot], study.layers
        )
        expected = torch.einsum("lw,lwr->lr", query[:, 0], study.icr.pids.query_pids)
        assert np.abs(true[row] - expected.numpy()).max() < 1e-3


def test_what_is_told_exactly_has_an_r2_of_one_and_the_mean_one_of_zero():
    true = np.random.default_rng(0).normal(size=(6, 2, 3))
    assert r2(true, true, true.mean(0)) == 1
    assert r2(true, np.broadcast_to(true.mean(0), true.shape), true.mean(0)) == 0


def test_rows_that_are_held_out_are_told_where_there_is_a_line_to_tell_them_by():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(60, 4))
    true = (values @ rng.normal(size=(4, 6))).reshape(60, 2, 3)
    assert space.held_out_r2(values, true) > 0.95
    assert space.held_out_r2(rng.normal(size=(60, 4)), true) < 0.3


def test_zero_demonstrations_are_zero_shot_kept_or_not(costs):
    none = costs[(costs.n_demos == 0) & (costs.prompt != cost.ROUTED)]
    assert none.flop_ratio.tolist() == [1, 1]
    assert none.kept.tolist() == [0, 0]


def test_a_kept_context_holds_as_many_numbers_as_its_cache(study):
    n_tokens = 9
    cache = run_prefix(study.decoder.model, list(range(2, 2 + n_tokens)))
    n_numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    sizes = Sizes.of(study.decoder.base)
    assert n_numbers == 2 * sizes.n_layers * sizes.key_width * n_tokens


def test_a_whole_prompt_costs_what_a_fit_is_reckoned_by(study):
    sizes = Sizes.of(study.decoder.base)
    reckoned = pass_flops(sizes, [Texts(1, 20, 400, 20)], sizes.n_layers)
    head = 2 * sizes.vocab_size * sizes.hidden_size
    assert cost.prompt_flops(sizes, 20) == pytest.approx(reckoned + head)


def test_a_kept_context_costs_attention_of_every_new_token_to_every_kept_one(study):
    sizes = Sizes.of(study.decoder.base)
    pairs = 5 * 7
    more = cost.prompt_flops(sizes, 5, 7) - cost.prompt_flops(sizes, 5)
    # A product and a sum for each number of a query, with keys and then with values.
    assert more == pairs * sizes.n_layers * sizes.query_width * 2 * 2


def test_few_shot_costs_more_with_every_demonstration_and_more_than_kept(costs):
    by_prompt = {name: lines.set_index("n_demos").flop for name, lines in costs.groupby("prompt")}
    assert by_prompt[cost.FEW_SHOT].is_monotonic_increasing
    assert (by_prompt[cost.FEW_SHOT] >= by_prompt[cost.KEPT]).all()


def test_the_numbers_that_routing_keeps_are_those_of_its_directions(study, costs):
    pids = study.icr.pids
    ours = costs[costs.prompt == cost.ROUTED].iloc[0]
    assert ours.kept == pids.query_pids.numel() + pids.key_pids.numel()


def test_numbers_of_which_one_differs_are_not_constant():
    assert is_constant(np.ones(3))
    assert not is_constant(np.array([1.0, 1.0, 2.0]))
