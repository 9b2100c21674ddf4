"""Analyses of a router: use, interventions, and what demonstrations do beside it."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import tiny
from icrouting.analysing import few_shot, importance, intervention
from icrouting.analysing.attention import attention, attention_rows, moved, n_shared_end
from icrouting.analysing.config import AnalysisConfig
from icrouting.analysing.intervention import EVERYTHING, NOTHING, Unit
from icrouting.analysing.passes import kl, routed_passes
from icrouting.analysing.study import MEAN, Study, with_interval
from icrouting.decoder.batches import pad
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.passes import next_token_logits
from icrouting.routing.attach import attach
from icrouting.routing.effect import run_both
from icrouting.routing.router import Routing
from inspected import sharp_router

# fp32 round-off between kernels and batches
CLOSE = 1e-4


def study_of(family, tokenizer, encoder_folder, **config):
    model = tiny.model(family)
    with pytest.MonkeyPatch.context() as monkeypatch:
        icr = sharp_router(model, tokenizer, encoder_folder, monkeypatch)
    decoder = Decoder.of(model, tokenizer)
    tasks = [tiny.task(), tiny.task("mr")]
    return Study.of(icr, decoder, tasks, AnalysisConfig(n_test=4, n_prompts=8, **config))


@pytest.fixture(scope="module")
def study(tokenizer, encoder_folder):
    return study_of("llama", tokenizer, encoder_folder)


@pytest.fixture(scope="module")
def switched_off(study):
    return intervention.intervention(study)["intervention"]


@pytest.fixture(scope="module")
def pairs(study):
    return few_shot.few_shot(study)["pairs"]


@pytest.fixture(scope="module")
def moves(study):
    return attention(study)["attention"]


def slow_log_probs(study, row, routing=None):
    """One prompt alone through the whole attached model, without a trunk or a batch."""
    model = study.decoder.model
    batch = pad([study.queries[row]], 0)
    if routing is None:
        with torch.no_grad():
            return next_token_logits(model, batch)[0].double().log_softmax(-1)
    with attach(model, study.icr.pids) as attachment, torch.no_grad():
        attachment.routing = routing
        return next_token_logits(model, batch)[0].double().log_softmax(-1)


def row_of(routing, row):
    return Routing(routing.routing_vector[[row]], routing.head_gates[[row]])


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_switching_off_nothing_changes_nothing(family, tokenizer, encoder_folder):
    table = intervention.intervention(study_of(family, tokenizer, encoder_folder))["intervention"]
    assert (table[table.off == NOTHING].kl == 0.0).all()


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_switching_off_everything_is_zero_shot(family, tokenizer, encoder_folder):
    table = intervention.intervention(study_of(family, tokenizer, encoder_folder))["intervention"]
    assert (table[table.off == EVERYTHING].kl_zero_shot == 0.0).all()


def test_what_is_run_from_the_first_routed_layer_on_is_the_whole_attached_model(study):
    zero, routed = study.zero_and_routed
    for row in range(len(study.items)):
        whole = slow_log_probs(study, row, row_of(study.routing, row))
        assert (routed[row] - whole).abs().max() < CLOSE
        assert (zero[row] - slow_log_probs(study, row)).abs().max() < CLOSE


def test_a_routed_prompt_is_answered_as_the_attached_router_answers_it(study):
    _, routed = study.zero_and_routed
    item = study.items[0]
    with study.icr.attached_to(study.decoder, gate=False) as attached:
        scores = attached.score([item.query.text], study.tasks[item.task].spec.options)
    ids = list(item.option_ids)
    assert (routed[0][ids].log_softmax(-1) - scores[0].log_softmax(-1)).abs().max() < CLOSE


def test_a_layer_off_is_the_model_with_the_other_layer_routed_alone(study, switched_off):
    row = study.rows_of("toy")
    divergences = []
    for place in row:
        whole = row_of(study.routing, place)
        without = Routing(
            whole.routing_vector * torch.tensor([[[0.0]], [[1.0]]]).view(1, 2, 1), whole.head_gates
        )
        plain = slow_log_probs(study, place, whole)
        divergences.append(float(kl(plain[None], slow_log_probs(study, place, without)[None])))
    table = switched_off[(switched_off.off == "layer") & (switched_off.task == "toy")]
    assert table[table.layer == 3].kl.item() == pytest.approx(np.mean(divergences), abs=CLOSE)


def test_a_head_off_closes_its_gate_alone(study):
    without = Unit("head", 1, 2).switched_off(study.routing)
    changed = (without.head_gates != study.routing.head_gates).nonzero()[:, 1:].unique(dim=0)
    assert changed.tolist() == [[1, 2]]
    assert torch.equal(without.routing_vector, study.routing.routing_vector)


def test_a_direction_off_is_out_of_its_layers_routing_vector_alone(study):
    without = Unit("direction", 0, 1).switched_off(study.routing)
    is_changed = without.routing_vector != study.routing.routing_vector
    assert is_changed.nonzero()[:, 1:].unique(dim=0).tolist() == [[0, 1]]
    assert torch.equal(without.head_gates, study.routing.head_gates)


def test_every_unit_is_switched_off_where_that_is_asked_for(study):
    units = intervention.units_of(study.routing, per_layer=0)
    n_layers, n_heads, rank = 2, 6, 3
    assert len(units) == 2 + n_layers * (1 + n_heads + rank) == len(set(units))


def test_the_importance_of_a_layer_is_its_mean_gate_times_its_mean_alpha(study):
    tables = importance.importance(study)
    rows = study.rows_of("mr")
    for place in range(len(study.layers)):
        gates = [float(study.routing.head_gates[row, place, h]) for row in rows for h in range(6)]
        alphas = [
            abs(float(study.routing.routing_vector[row, place, r]))
            for row in rows
            for r in range(3)
        ]
        lines = tables["layers"].query("task == 'mr'")
        assert lines.importance.iloc[place] == pytest.approx(
            np.mean(gates) * np.mean(alphas), rel=1e-5
        )


def test_the_top_head_of_a_layer_is_the_one_whose_gate_is_widest_open(study):
    units = importance.importance(study)["units"]
    tops = units[(units.kind == "head") & units.is_top & (units.task == "toy")]
    gates = study.routing.head_gates[study.rows_of("toy")].mean(0)
    assert tops.number.tolist() == gates.argmax(-1).tolist()


def test_a_router_that_changes_nothing_has_no_layer_that_counts_for_more(tokenizer, study):
    silent = Routing(study.routing.routing_vector * 0, study.routing.head_gates)
    assert importance.layer_importance(silent).tolist() == [0, 0]


def test_kl_is_the_sum_over_tokens_and_zero_for_a_distribution_and_itself():
    one = torch.tensor([[0.5, 0.25, 0.25]]).double().log()
    other = torch.tensor([[0.25, 0.5, 0.25]]).double().log()
    assert float(kl(one, other)) == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2))
    assert float(kl(one, one)) == 0.0


def test_kl_takes_what_both_rule_out_for_nothing():
    one = torch.tensor([[1.0, 0.0]]).double().log()
    assert float(kl(one, one)) == 0.0


def test_the_distance_of_few_shot_from_zero_shot_is_that_of_the_prompts_themselves(study, pairs):
    divergences = []
    for row in study.rows_of("toy"):
        with torch.no_grad():
            shown = next_token_logits(study.decoder.model, pad([study.contexts[row]], 0))
        shown = shown.double().log_softmax(-1)
        divergences.append(float(kl(shown, slow_log_probs(study, row)[None])))
    line = pairs.query(
        "task == 'toy' and scope == 'vocabulary' and first == 'few-shot' and second == 'zero-shot'"
    )
    assert line.kl.item() == pytest.approx(np.mean(divergences), abs=CLOSE)


def test_a_few_shot_prompt_ends_in_its_zero_shot_prompt(study):
    for query, context in zip(study.queries, study.contexts, strict=True):
        assert n_shared_end(query, context) == len(query)


def test_the_mean_over_tasks_weighs_tasks_alike(pairs):
    lines = pairs[(pairs.scope == "options") & (pairs["first"] == "few-shot")]
    routed = lines[lines.second == "routed"].set_index("task").kl
    assert routed[MEAN] == pytest.approx((routed["toy"] + routed["mr"]) / 2)


def test_changes_that_are_the_same_have_a_cosine_of_one():
    plain = torch.randn(9).double()
    change = torch.randn(9).double()
    assert few_shot.change_cosine(plain, plain + change, plain + 2 * change) == pytest.approx(1)


def test_a_change_that_is_none_has_no_cosine():
    plain = torch.zeros(4).double()
    assert np.isnan(few_shot.change_cosine(plain, plain, plain + torch.arange(4)))


def test_attention_rows_are_those_that_routing_is_seen_to_move(study):
    row, tokens = 1, study.queries[1]
    routing = row_of(study.routing, row)
    routed = attention_rows(study.decoder, tokens, len(tokens), study.icr.pids, routing)
    plain = attention_rows(study.decoder, tokens, len(tokens))
    with study.icr.attached_to(study.decoder, gate=False):
        passes = run_both(study.decoder.model, list(tokens), study.layers)
    by_hand = (routed - plain)[list(study.layers)].abs().sum(-1) / 2
    assert (by_hand - passes.mass_moved).abs().max() < CLOSE


def test_the_last_rows_of_attention_are_the_last_of_all_rows(study):
    tokens = study.queries[2]
    whole = attention_rows(study.decoder, tokens, len(tokens))
    assert torch.equal(attention_rows(study.decoder, tokens, 2), whole[:, :, -2:])


def test_below_the_first_routed_layer_routing_moves_no_attention(moves):
    assert (moves[moves.layer < 3].routing == 0.0).all()


def test_in_layer_0_demonstrations_only_take_attention_away(moves):
    # Rotary embedding knows distances alone, so among the query's tokens nothing else changes.
    first = moves[moves.layer == 0]
    assert (first.demonstrations_within < 1e-5).all()
    assert (first.demonstrations_get > 0.1).all()


def test_what_demonstrations_get_is_no_more_than_what_they_move(moves):
    assert (moves.demonstrations_get <= moves.demonstrations + 1e-6).all()


def test_attention_that_moves_alike_is_correlated_by_one():
    plain = torch.eye(5)[None].repeat(2, 1, 1)
    shifted = torch.full((2, 5, 5), 1 / 5).tril()
    shifted = shifted / shifted.sum(-1, keepdim=True)
    figures = moved(plain, shifted, torch.cat([torch.zeros(2, 5, 3), shifted], -1))
    assert figures["alike"] == pytest.approx(1)
    assert figures["demonstrations_get"] == 0


def test_prompts_whose_tokens_do_not_end_their_few_shot_prompts_are_refused(study):
    torn = replace(study)
    torn.__dict__["queries"] = [[*query[:-1], 5] for query in study.queries]
    with pytest.raises(ValueError, match="leave the part attention out"):
        attention(torn)


def test_the_attention_implementation_is_put_back(study):
    before = study.decoder.base.config._attn_implementation
    attention_rows(study.decoder, study.queries[0], 2)
    assert study.decoder.base.config._attn_implementation == before != "eager"


def test_an_interval_of_equal_values_has_no_width():
    assert with_interval("x", [[0.5, 0.5], [0.5]]) == {"x": 0.5, "x_low": 0.5, "x_high": 0.5}


def test_an_interval_holds_its_mean_and_narrows_with_more_values():
    few = with_interval("x", [np.tile([0.0, 1.0], 4)])
    many = with_interval("x", [np.tile([0.0, 1.0], 100)])
    assert few["x_low"] < 0.5 < few["x_high"]
    assert many["x_high"] - many["x_low"] < few["x_high"] - few["x_low"]


def test_a_group_without_values_leaves_no_mean():
    assert np.isnan(with_interval("x", [[1.0], [np.nan]])["x"])


def test_routings_meet_the_prompts_in_the_same_batches(study):
    with routed_passes(study.decoder, study.icr.pids, study.queries) as (_, run):
        assert torch.equal(run(study.routing), run(study.routing))


def test_tables_name_every_task_and_the_mean(switched_off):
    assert isinstance(switched_off, pd.DataFrame)
    assert list(switched_off.task.unique()) == ["toy", "mr", MEAN]
