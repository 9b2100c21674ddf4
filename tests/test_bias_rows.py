"""Bias rows: with "last" the bias is added from the prompt's last row on, against the oracle."""

import pytest
import torch

import tiny
from bench import CLOSE, MATTERS, Bench, rows_of
from fitted import small_fit
from icrouting.config import HIDDEN, check_bias_rows
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.partial import late_entry
from icrouting.fitting.queries import training_queries
from icrouting.fitting.training import Trainer
from icrouting.fitting.validation import answered
from icrouting.icr import InContextRouter
from icrouting.methods.controls import Refit
from icrouting.methods.settings import Settings
from icrouting.routing.attach import attach
from icrouting.routing.features import features_of
from reference import reference_routed
from ways import WAYS

OPTIONS = ("negative", "positive")
# Ways that set the routing by hand, past what reads prompts.
BY_HAND = (
    "static, allocated ahead",
    "quantized, `fp8`",
    "a prompt fed in pieces to `model(...)`",
)
TRIED = [
    way
    for way in WAYS
    if way.check and way.group in ("Padding", "Decoding", "Caches") and way.name not in BY_HAND
]


@pytest.fixture(scope="module", params=tiny.CONFIGS)
def bench(request):
    return Bench(HIDDEN, request.param, bias_rows="last")


@pytest.fixture(scope="module")
def llama():
    return Bench(HIDDEN, bias_rows="last")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_unequal_lengths_equals_the_dense_reference(side, bench):
    bench.check_logits(0, 1, 2, side=side)


def test_generation_with_a_cache_equals_the_dense_reference_without_one(bench):
    bench.check_tokens(0, 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("way", TRIED, ids=[f"{way.group}: {way.name}" for way in TRIED])
def test_every_way_of_running_is_biased_in_the_same_rows(way, llama):
    if way.raises:
        with pytest.raises((ValueError, RuntimeError)):
            way.check(llama)
    else:
        way.check(llama)


def test_rows_before_the_prompt_s_last_are_those_of_the_untouched_model(bench):
    inputs = bench.inputs(0)
    plain = bench.model(**inputs).logits[0]
    with bench.attached():
        routed = bench.model(**inputs).logits[0]
    moved = (routed - plain).abs().amax(-1)
    assert moved[:-1].max() <= CLOSE
    assert moved[-1] > MATTERS


def test_the_rows_matter_where_several_layers_are_routed(bench):
    inputs = bench.inputs(0)
    logits = []
    for bias_rows in ("all", "last"):
        with bench.icr.attached(bench.model, bench.tokenizer, bias_rows=bias_rows):
            logits.append(bench.model(**inputs).logits[0, -1])
    assert (logits[0] - logits[1]).abs().max() > 0.01


def test_an_answer_is_the_same_where_the_last_layer_alone_is_routed(llama):
    """Of the last layer nothing but the last row is read."""
    icr = llama.router(layers=(4,))
    scores = []
    for bias_rows in ("all", "last"):
        with icr.attached(llama.model, llama.tokenizer, bias_rows=bias_rows) as routed:
            scores.append(routed.score(llama.texts, OPTIONS))
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=CLOSE)


@pytest.mark.parametrize("label_scoring", ["first", "sum"])
def test_scores_of_a_batch_equal_the_dense_reference(label_scoring, bench):
    options = ["negative plot", "positive team"]
    with bench.attached() as routed:
        got = routed.score(bench.texts, options, label_scoring=label_scoring)
    for row, text in enumerate(bench.texts):
        prompt = bench.tokenizer(text).input_ids
        for place, option in enumerate(options):
            whole = bench.tokenizer(f"{text} {option}").input_ids
            assert len(whole) > len(prompt) + 1, "the option is several tokens"
            logits = bench.slow_logits(row, input_ids=torch.tensor([whole]))[0]
            if label_scoring == "first":
                expected = logits[len(prompt) - 1, whole[len(prompt)]]
            else:
                log_probs = logits.log_softmax(-1)
                places = range(len(prompt), len(whole))
                expected = sum(log_probs[at - 1, whole[at]] for at in places)
            assert abs(got[row, place] - expected) <= 5 * CLOSE


def test_a_router_is_attached_as_it_was_fitted_and_otherwise_where_that_is_asked(llama):
    inputs = llama.inputs(0)
    with llama.attached() as routed:
        assert routed.bias_rows == "last"
        assert "bias from the last prompt row on" in repr(routed)
        assert routed.made_of.endswith(", bias from the last prompt row on")
    with llama.icr.attached(llama.model, llama.tokenizer, bias_rows="all") as routed:
        assert "bias" not in repr(routed) + routed.made_of
        everywhere = llama.model(**inputs).logits
    dense = llama.fresh("eager")
    with reference_routed(dense, llama.icr.pids, rows_of(llama.routing, 0)):
        expected = dense(**inputs).logits
    assert (everywhere - expected).abs().max() <= CLOSE


def test_rows_of_nothing_known_are_refused():
    with pytest.raises(ValueError, match="bias_rows must be 'all' or 'last', got 'first'"):
        check_bias_rows("first")


def trainer_of(tokenizer, **changes):
    """A training about to take its first step, whose router is far from neutral."""
    decoder = Decoder.of(tiny.model("llama"), tokenizer)
    config = small_fit(**{"bias_rows": "last", "w_conf": 0.0, **changes})
    features = features_of(HIDDEN, decoder, "cpu")
    first = config.layers[0]
    queries, _ = training_queries(decoder, [tiny.task()], features, first, config)
    icr = Bench(HIDDEN).router(layers=config.layers)
    return Trainer(decoder, icr.pids, icr.router.requires_grad_(True), queries, config)


def cross_entropy_of(trainer, queries):
    with (
        attach(trainer.decoder.model, trainer.pids) as attachment,
        late_entry(trainer.decoder.model, trainer.pids.layers[0]) as entry,
    ):
        return trainer._terms(entry, attachment, queries)["ce"]


def dense_loss(trainer, queries, scale=1.0):
    """The mean loss over the options, one query at a time, on whole dense passes."""
    dense = tiny.model("llama", "eager")
    losses = []
    for query in queries:
        routing = trainer.router(query.features[None]).scaled(scale)
        tokens = torch.tensor([query.state.tokens])
        first_biased = [tokens.shape[1] - 1] if trainer.config.bias_rows == "last" else None
        with reference_routed(dense, trainer.pids, routing, first_biased):
            logits = dense(input_ids=tokens, use_cache=False).logits[0, -1]
        losses.append(-logits[query.option_ids].log_softmax(-1)[query.label])
    return float(torch.stack(losses).mean().detach())


@pytest.mark.parametrize("bias_rows", ["all", "last"])
def test_training_reads_the_logits_of_the_dense_reference(bias_rows, tokenizer):
    trainer = trainer_of(tokenizer, bias_rows=bias_rows)
    queries = trainer.queries[:5]
    assert len({len(query.state.tokens) for query in queries}) > 1
    loss = float(cross_entropy_of(trainer, queries).detach())
    assert abs(loss - dense_loss(trainer, queries)) < 1e-4


def test_a_router_is_judged_by_the_rows_that_it_is_trained_on(tokenizer):
    trainer = trainer_of(tokenizer)
    queries = trainer.queries[:5]
    decoder = trainer.decoder
    with attach(decoder.model, trainer.pids) as attachment, late_entry(decoder.model, 3) as entry:
        judged = (trainer.router, decoder, entry, attachment, trainer.config)
        loss, _ = answered(queries, *judged)
    assert abs(loss - dense_loss(trainer, queries, trainer.config.final_alpha_scale)) < 1e-4


def test_a_control_of_such_a_router_is_biased_in_the_same_rows(tokenizer, tmp_path):
    model = tiny.model("llama")
    task = tiny.task()
    config = small_fit(bias_rows="last", encoder=HIDDEN)
    icr = InContextRouter.fit(model, tokenizer, [task], config, gate=False)
    icr.save_pretrained(tmp_path)
    control = Refit(Settings(router=str(tmp_path)))
    control.decoder = Decoder.of(model, tokenizer)
    control.layers = torch.tensor(icr.pids.layers)
    control.query_directions = icr.pids.query_directions()
    control.key_directions = icr.pids.key_directions()
    control.weights = torch.nn.utils.parameters_to_vector(
        [parameter for _, parameter in icr.router.named_parameters()]
    )
    prompt = task.prompt(task.test[0])
    tokens = torch.tensor([tokenizer(prompt).input_ids])
    with control.applied(task):
        got = model(input_ids=tokens).logits
    with icr.attached(model, tokenizer):
        expected = model(input_ids=tokens).logits
    assert torch.equal(got, expected)
