import dataclasses
import json
import re
from itertools import pairwise

import pytest
import torch

import tiny
from icrouting.config import HIDDEN, FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.partial import entering_states, late_entry
from icrouting.decoder.scoring import score_options
from icrouting.fitting import stages
from icrouting.fitting.queries import training_queries
from icrouting.fitting.training import Query, Trainer, alpha_scale
from icrouting.fitting.trunk import run_trunk
from icrouting.icr import InContextRouter
from icrouting.routing.encoder import load_encoder
from icrouting.routing.features import features_of
from icrouting.routing.router import Router, Routing
from icrouting.runtime.locks import locked
from icrouting.tasks.prompts import Prompt

LAYERS = (3, 4)


@pytest.fixture(scope="module", params=["sentence encoder", "hidden"])
def config(encoder_folder, request):
    """Every law holds for both kinds of features."""
    return FitConfig(
        layers=LAYERS,
        rank=3,
        n_prompts=12,
        demos_per_class=2,
        encoder=str(encoder_folder) if request.param == "sentence encoder" else HIDDEN,
        hidden_width=13,
        n_queries=24,
        lr=0.01,
        epochs=3,
        min_steps=0,
        patience=0,
        w_gate=0.0,
    )


@pytest.fixture(scope="module")
def fitted(config, tokenizer):
    return InContextRouter.fit(tiny.model("llama"), tokenizer, [tiny.task()], config)


@pytest.fixture
def model():
    return tiny.model("llama")


def texts():
    return [tiny.task().prompt(example) for example in tiny.task().test]


OPTIONS = ("negative", "positive")


def features_of_texts(encoder, model, tokenizer, prompts, token_lists=None):
    """The slow obvious way: the encoder on each text, or whole plain passes one by one.

    Of a pass it is the last token's state.
    """
    if encoder != HIDDEN:
        return load_encoder(encoder, "cpu")(prompts)
    rows = token_lists or tokenizer(prompts).input_ids
    with torch.no_grad():
        passes = [model(input_ids=torch.tensor([row]), output_hidden_states=True) for row in rows]
    return torch.stack([output.hidden_states[LAYERS[0]][0, -1] for output in passes])


def weights(icr):
    return torch.cat([parameter.flatten() for parameter in icr.router.parameters()])


@pytest.mark.slow
def test_training_lowers_the_loss_on_its_own_queries(config, model, tokenizer):
    task = tiny.task()
    fitted = InContextRouter.fit(
        model, tokenizer, [task], dataclasses.replace(config, epochs=12, lr=0.03)
    )
    prompts, labels = (
        [task.prompt(e) for e in task.train],
        torch.tensor([e.label for e in task.train]),
    )
    plain = torch.nn.functional.cross_entropy(
        score_options(model, tokenizer, prompts, OPTIONS), labels
    )
    with fitted.attached(model, tokenizer) as routed:
        trained = torch.nn.functional.cross_entropy(routed.score(prompts, OPTIONS), labels)
    assert trained < 0.95 * plain


def test_an_untrained_router_leaves_logits_unchanged(config, model, tokenizer, monkeypatch):
    monkeypatch.setattr(Trainer, "run", lambda self: None)
    untrained = InContextRouter.fit(model, tokenizer, [tiny.task()], config)
    plain = score_options(model, tokenizer, texts(), OPTIONS)
    with untrained.attached(model, tokenizer) as routed:
        assert (routed.score(texts(), OPTIONS) - plain).abs().max() == 0.0


def test_zero_strength_gives_the_logits_of_the_untouched_model(fitted, model, tokenizer):
    inputs = tokenizer(texts(), return_tensors="pt", padding=True)
    plain = model(**inputs).logits
    with fitted.attached(model, tokenizer, strength=0.0):
        assert (model(**inputs).logits - plain).abs().max() == 0.0
    with fitted.attached(model, tokenizer, strength=1e-30):  # wider heads may round differently
        assert (model(**inputs).logits - plain)[inputs["attention_mask"].bool()].abs().max() <= 1e-5


@pytest.mark.slow
def test_fitting_is_seeded(fitted, config, model, tokenizer):
    assert torch.equal(
        weights(InContextRouter.fit(model, tokenizer, [tiny.task()], config)), weights(fitted)
    )
    other = dataclasses.replace(config, seed=43)
    assert not torch.equal(
        weights(InContextRouter.fit(model, tokenizer, [tiny.task()], other)), weights(fitted)
    )


@pytest.mark.parametrize("stop_at", [1, 4, 8])
@pytest.mark.slow
def test_a_fit_stopped_in_training_goes_on_to_the_same_router(
    stop_at, fitted, config, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr("icrouting.fitting.training.CHECKPOINT_EVERY", 3)
    update, steps = Trainer._update, []

    def interrupted(self, terms):
        if len(steps) == stop_at:
            raise KeyboardInterrupt
        steps.append(1)
        update(self, terms)

    monkeypatch.setattr(Trainer, "_update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        InContextRouter.fit(tiny.model("llama"), tokenizer, [tiny.task()], config, folder=tmp_path)
    monkeypatch.setattr(Trainer, "_update", update)
    resumed = InContextRouter.fit(
        tiny.model("llama"), tokenizer, [tiny.task()], config, folder=tmp_path
    )
    assert torch.equal(weights(resumed), weights(fitted))
    lines = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))


def test_a_fit_stopped_in_extraction_keeps_the_prompts_it_ran(
    fitted, config, model, tokenizer, tmp_path, monkeypatch
):
    from icrouting.fitting import extraction

    monkeypatch.setattr(
        extraction, "decided", lambda is_due: True
    )  # after every block, however slow the disk
    monkeypatch.setattr(extraction, "BLOCK", 4)
    capture, ran = extraction.capture_last_tokens, []

    def interrupted(*args, **kwargs):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(0)
        for piece in capture(*args, **kwargs):
            ran[-1] += piece[0].shape[1]
            yield piece

    monkeypatch.setattr(extraction, "capture_last_tokens", interrupted)
    with pytest.raises(KeyboardInterrupt):
        InContextRouter.fit(model, tokenizer, [tiny.task()], config, folder=tmp_path)
    ran.append(0)
    resumed = InContextRouter.fit(model, tokenizer, [tiny.task()], config, folder=tmp_path)
    assert sum(ran) == config.n_prompts, "no prompt ran twice"
    projector = resumed.pids.query_pids @ resumed.pids.query_pids.mT
    assert torch.allclose(projector, fitted.pids.query_pids @ fitted.pids.query_pids.mT, atol=1e-4)


def test_a_fit_that_computed_nothing_binds_nobody(config, model, tokenizer, tmp_path, monkeypatch):
    def failing(*args, **kwargs):
        raise ValueError("a prompt that is too long")

    with monkeypatch.context() as patched, pytest.raises(ValueError, match="too long"):
        patched.setattr("icrouting.fitting.stages.extract", failing)
        InContextRouter.fit(model, tokenizer, [tiny.task()], config, folder=tmp_path)
    monkeypatch.setattr(Trainer, "run", lambda self: None)
    other = dataclasses.replace(config, lr=0.5)
    InContextRouter.fit(model, tokenizer, [tiny.task()], other, folder=tmp_path)
    assert json.loads((tmp_path / "fit.json").read_text())["lr"] == 0.5


def test_an_encoder_that_is_not_there_leaves_no_folder(config, model, tokenizer, tmp_path):
    mistyped = dataclasses.replace(config, encoder="pinned:minilmm")
    with pytest.raises(ValueError, match="unknown pinned encoder"):
        InContextRouter.fit(model, tokenizer, [tiny.task()], mistyped, folder=tmp_path / "fit")
    assert not (tmp_path / "fit").exists()


def test_a_fit_stopped_within_a_step_keeps_the_last_whole_one(
    fitted, config, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr("icrouting.fitting.training.CHECKPOINT_EVERY", 3)
    move, steps = Trainer._move, []

    def interrupted(self, gradient):
        move(self, gradient)
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_move", interrupted)
    model = tiny.model("llama")
    with pytest.raises(KeyboardInterrupt):
        InContextRouter.fit(model, tokenizer, [tiny.task()], config, folder=tmp_path)
    assert "training up to step 3" in stages.progress_in(tmp_path)
    resumed = InContextRouter.fit(model, tokenizer, [tiny.task()], config, folder=tmp_path)
    assert torch.equal(weights(resumed), weights(fitted))


def test_one_process_alone_writes_what_a_fit_is(config, model, tokenizer, tmp_path, monkeypatch):
    """Those behind the first find the file.

    By writing it too, two of them took each other's away.
    """
    monkeypatch.setattr(Trainer, "run", lambda self: None)
    InContextRouter.fit(model, tokenizer, [tiny.task()], config, folder=tmp_path)
    # A new file is another one, even where it says the same.
    written = (tmp_path / "fit.json").stat().st_ino
    InContextRouter.fit(model, tokenizer, [tiny.task()], config, folder=tmp_path)
    assert (tmp_path / "fit.json").stat().st_ino == written


def test_saving_and_loading_give_identical_logits(fitted, model, tokenizer, tmp_path):
    fitted.save_pretrained(tmp_path)
    again = InContextRouter.from_pretrained(tmp_path)
    assert again.description == fitted.description
    assert again.digest() == fitted.digest()
    with fitted.attached(model, tokenizer) as routed:
        expected = routed.score(texts(), OPTIONS)
    with again.attached(model, tokenizer) as routed:
        assert torch.equal(routed.score(texts(), OPTIONS), expected)


def test_in_use_the_routing_vector_has_the_scale_where_training_ended(fitted, model, tokenizer):
    raw = fitted.router(
        features_of_texts(fitted.description.fit.encoder, model, tokenizer, texts())
    )
    with fitted.attached(model, tokenizer) as routed:
        decided = routed.routing(texts())
    assert torch.allclose(decided.routing_vector, 0.8 * raw.routing_vector, atol=1e-6)
    assert torch.allclose(decided.head_gates, raw.head_gates, atol=1e-6)
    with fitted.attached(model, tokenizer, strength=0.5) as routed:
        assert torch.allclose(
            routed.routing(texts()).routing_vector, 0.4 * raw.routing_vector, atol=1e-6
        )


def test_queries_keep_their_own_features_and_the_end_of_a_long_prompt(config, model, tokenizer):
    short, features = (
        dataclasses.replace(config, max_tokens=9),
        features_of(config.encoder, Decoder.of(model, tokenizer), "cpu"),
    )
    queries, (mean, std) = training_queries(
        Decoder.of(model, tokenizer), [tiny.task()], features, 3, short
    )
    assert std.min() > 0
    ends = {task.prompt(example)[-12:] for task in [tiny.task()] for example in task.train}
    for query in queries:
        assert len(query.state.tokens) == 9
        text = tokenizer.decode(query.state.tokens)
        assert text[-12:] in ends
        slow = features_of_texts(config.encoder, model, tokenizer, [text], [query.state.tokens])[0]
        assert torch.allclose(query.features, (slow - mean) / std, atol=1e-4)
    if config.encoder == HIDDEN:
        vectors = torch.stack([query.features for query in queries])
        assert vectors.mean(0).abs().max() < 1e-4
        assert (vectors.std(0, correction=0) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("ce_scope", ["options", "vocabulary"])
def test_a_step_takes_the_four_terms_of_the_paper(ce_scope, config, model, tokenizer):
    """The second step's terms against a slow recomputation from whole prompts.

    There are 2 and 5 options.
    """
    from icrouting.routing.attach import attach

    config = dataclasses.replace(
        config, ce_scope=ce_scope, batch_size=3, epochs=1, w_conf=0.3, w_spar=0.2, w_gate=0.1
    )
    generator, pids = torch.Generator().manual_seed(0), tiny.pids(model)
    prompts, options = texts()[:3], [[5, 9], [5, 9, 11, 30, 31], [7, 8]]
    states = run_trunk(Decoder.of(model, tiny.tokenizer()), tokenizer(prompts).input_ids, 3)
    features = torch.randn(3, 12, generator=generator)
    queries = [Query(s, f, o, 1) for s, f, o in zip(states, features, options, strict=True)]
    router = Router(12, 2, 6, 3, 13, generator)
    torch.nn.init.normal_(router.alpha[-1].weight, generator=generator)
    trainer = Trainer(Decoder.of(model, tiny.tokenizer()), pids, router, queries, config)
    trainer.n_steps, trainer.step = 4, 2
    with attach(model, pids) as attachment, late_entry(model, 3) as entry:
        terms = trainer._terms(entry, attachment, queries)
    routing, logits, plain = router(features), [], []
    with attach(model, pids) as attachment:
        for row, prompt in enumerate(prompts):
            inputs = tokenizer(prompt, return_tensors="pt")
            one = Routing(routing.routing_vector[row : row + 1], routing.head_gates[row : row + 1])
            attachment.routing = one.scaled(alpha_scale(2, 4, 0.8))
            logits.append(model(**inputs).logits[0, -1])
            attachment.routing = one.scaled(0.0)
            plain.append(model(**inputs).logits[0, -1])
    ce = [
        -(line[chosen] if ce_scope == "options" else line).log_softmax(-1)[
            1 if ce_scope == "options" else chosen[1]
        ]
        for line, chosen in zip(logits, options, strict=True)
    ]
    entropies = [
        [torch.distributions.Categorical(logits=line).entropy() for line in side]
        for side in (logits, plain)
    ]
    expected = {
        "ce": sum(ce) / 3,
        "conf": sum((routed - base).clamp_min(0) for routed, base in zip(*entropies, strict=True))
        / 3,
        "spar": (routing.routing_vector.abs().mean((0, 2)) * torch.tensor([1.0, 3.0])).mean(),
        "gate": routing.head_gates.mean(),
    }
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(torch.as_tensor(value).item(), abs=1e-4), name
    trainer._update(terms)
    loss = expected["ce"] + 0.3 * expected["conf"] + 0.2 * expected["spar"] + 0.1 * expected["gate"]
    assert trainer.log[-1]["loss"] == pytest.approx(loss.item(), abs=1e-4)


def test_a_fit_leaves_the_model_as_found(config, tokenizer):
    model = tiny.model("llama").train().requires_grad_(True)
    InContextRouter.fit(model, tokenizer, [tiny.task()], config)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_other_features_are_refused(fitted, model, tokenizer):
    other = dataclasses.replace(fitted.description, encoder="0" * 16)
    swapped = dataclasses.replace(fitted, description=other)
    with (
        pytest.raises(ValueError, match="another sentence encoder"),
        swapped.attached(model, tokenizer),
    ):
        pass


def test_a_fit_into_the_folder_of_one_that_goes_on_is_refused(config, model, tokenizer, tmp_path):
    with (
        locked(tmp_path),
        pytest.raises(ValueError, match=f"another run is writing to {re.escape(str(tmp_path))}"),
    ):
        InContextRouter.fit(model, tokenizer, [tiny.task()], config, folder=tmp_path)
    InContextRouter.fit(model, tokenizer, [tiny.task()], config, folder=tmp_path)


@pytest.mark.parametrize("name", ["pids-pca-3.safetensors", "training.safetensors", "fit.json"])
@pytest.mark.slow
def test_a_damaged_stage_is_named(name, config, model, tokenizer, tmp_path):
    InContextRouter.fit(model, tokenizer, [tiny.task()], config, folder=tmp_path)
    (file,) = tmp_path.rglob(name)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        InContextRouter.fit(model, tokenizer, [tiny.task()], config, folder=tmp_path)


def test_another_base_model_is_refused_by_fingerprint(fitted, tokenizer):
    other = tiny.model("llama", seed=1)
    with (
        pytest.raises(ValueError, match=re.escape(fitted.description.fingerprint)),
        fitted.attached(other, tokenizer),
    ):
        pass


def test_attached_leaves_the_model_as_found_after_an_exception(fitted, model, tokenizer):
    plain, kernel = (
        score_options(model, tokenizer, texts(), OPTIONS),
        model.config._attn_implementation,
    )
    with pytest.raises(RuntimeError), fitted.attached(model, tokenizer) as routed:
        assert not torch.equal(routed.score(texts(), OPTIONS), plain)
        raise RuntimeError
    assert torch.equal(score_options(model, tokenizer, texts(), OPTIONS), plain)
    assert model.config._attn_implementation == kernel
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number_is_refused(strength, fitted, model, tokenizer):
    with (
        pytest.raises(ValueError, match="finite"),
        fitted.attached(model, tokenizer, strength=strength),
    ):
        pass


def test_a_channel_that_says_nothing_is_left_out_and_does_not_blow_up(model, tokenizer):
    features, generator = (
        features_of(HIDDEN, Decoder.of(model, tokenizer), "cpu"),
        torch.Generator().manual_seed(0),
    )
    vectors = torch.randn(20, 42, generator=generator)
    vectors[:, 7] = 300 + 0.5 * vectors[:, 7]  # rounding, in bfloat16
    vectors[:, 9] = 0
    router, other = Router(42, 2, 6, 3, 5, generator), vectors.clone()
    router.absorb(*features.scale(vectors))
    assert router.alpha[0].weight.abs().max() < 10
    other[:, [7, 9]] = 1e4
    assert torch.allclose(router(vectors).head_gates, router(other).head_gates)


def test_in_use_a_router_decides_as_at_the_end_of_training(config, model, tokenizer, monkeypatch):
    run, ends = Trainer.run, []

    def keep_end(self):
        run(self)
        with torch.no_grad():
            ends.append(
                (self.queries, self.router(torch.stack([query.features for query in self.queries])))
            )

    monkeypatch.setattr(Trainer, "run", keep_end)
    fitted = InContextRouter.fit(model, tokenizer, [tiny.task()], config)
    ((queries, end),) = ends
    with fitted.attached(model, tokenizer) as routed:
        decided = routed.reader.of_tokens([query.state.tokens for query in queries])
    assert torch.allclose(decided.head_gates, end.head_gates, atol=1e-4)
    assert torch.allclose(decided.routing_vector, 0.8 * end.routing_vector, atol=1e-4)
    assert end.head_gates.std(0).max() > 1e-3


def test_an_absorbed_scale_decides_as_training_did():
    generator = torch.Generator().manual_seed(0)
    router, vectors = (
        Router(42, 2, 6, 3, 5, generator),
        3 * torch.randn(20, 42, generator=generator) + 7,
    )
    torch.nn.init.normal_(router.alpha[-1].weight, generator=generator)
    mean, std = vectors.mean(0), vectors.std(0)
    trained = router((vectors - mean) / std)
    router.absorb(mean, std)
    decided = router(vectors)
    assert torch.allclose(decided.routing_vector, trained.routing_vector, atol=1e-4)
    assert torch.allclose(decided.head_gates, trained.head_gates, atol=1e-4)
    assert trained.routing_vector.std(0).min() > 0.05


def test_hidden_states_that_have_read_nothing_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="layer 0"):
        InContextRouter.fit(
            model, tokenizer, [tiny.task()], FitConfig(layers=(0, 4), encoder=HIDDEN)
        )


def test_rows_of_equal_tokens_are_read_where_they_stand(fitted, model, tokenizer):
    inputs = tokenizer(texts()[:1] * 2, return_tensors="pt")
    n_tokens = inputs["input_ids"].shape[1]
    inputs["position_ids"] = torch.stack([torch.arange(n_tokens), 3 * torch.arange(n_tokens)])
    with fitted.attached(model, tokenizer):
        together = model(**inputs).logits
        for row in range(2):
            alone = model(
                **{name: tensor[row : row + 1] for name, tensor in inputs.items()}
            ).logits[0]
            assert (together[row] - alone).abs().max() < 1e-4


def test_autocast_leaves_the_router_in_float32(fitted, model, tokenizer):
    with fitted.attached(model, tokenizer) as routed:
        rows = tokenizer(texts()).input_ids
        states = entering_states(Decoder.of(model, tiny.tokenizer()), rows, LAYERS[0])
        expected = routed.reader.of_states(rows, states)
        with torch.autocast("cpu", torch.bfloat16):
            got = routed.reader.of_states(rows, states)
    if fitted.description.encoder == HIDDEN:  # a sentence encoder itself heeds autocast
        assert torch.equal(got.head_gates, expected.head_gates)
    assert got.head_gates.dtype == torch.float32


def test_no_tasks_are_refused(config, model, tokenizer):
    with pytest.raises(ValueError, match="at least one source task"):
        InContextRouter.fit(model, tokenizer, [], config)


def test_two_tasks_of_one_name_are_refused(config, model, tokenizer):
    few = dataclasses.replace(tiny.task(), train=tiny.task().train[:6])
    with pytest.raises(ValueError, match="two of the tasks are called 'toy': give each a name"):
        InContextRouter.fit(model, tokenizer, [tiny.task(), few], config)


def test_layers_outside_the_model_are_refused(config, model, tokenizer):
    wrong = dataclasses.replace(config, layers=(3, 9))
    with pytest.raises(ValueError, match=r"below 5.* got \[3, 9\]"):
        InContextRouter.fit(model, tokenizer, [tiny.task()], wrong)


@pytest.mark.parametrize(
    ("name", "value"), [("rank", 0), ("lr", -1.0), ("basis", "fourier"), ("ce_scope", "all")]
)
def test_settings_are_checked_when_made(name, value):
    with pytest.raises((ValueError, TypeError), match=name):
        FitConfig(**{name: value})


def test_the_routing_vector_fades_from_one_to_its_final_scale():
    scales = [alpha_scale(step, 100, 0.8) for step in range(101)]
    assert scales[0] == 1.0
    assert scales[-1] == pytest.approx(0.8)
    assert all(later < earlier for earlier, later in pairwise(scales))


def test_prompt_is_context_and_query():
    assert Prompt("a\n", "b").text == "a\nb"


def test_a_query_that_is_not_finite_is_named_and_left_out_only_if_asked(config, tokenizer, caplog):
    model, task = tiny.model("llama"), tiny.task()
    token = tokenizer(task.prompt(task.train[0])).input_ids[4]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    odd = {task.prompt(e) for e in task.train if token in tokenizer(task.prompt(e)).input_ids}
    clean = dataclasses.replace(
        task, train=tuple(e for e in task.train if task.prompt(e) not in odd)
    )
    assert 0 < len(odd) < len(task.train)
    config = dataclasses.replace(config, n_queries=1000, epochs=1)
    decoder = Decoder.of(model, tokenizer)
    given = (decoder, [task], features_of(config.encoder, decoder, "cpu"), 3)
    with pytest.raises(
        ValueError, match=r"NaN or infinity in the states of .* leave such prompts out"
    ):
        training_queries(*given, config)
    queries, (mean, _) = training_queries(*given, dataclasses.replace(config, skip_nan=True))
    assert len(queries) == len(clean.train)
    assert mean.isfinite().all()
    assert all(query.features.isfinite().all() for query in queries)
    assert "left out" in caplog.text


def test_a_step_without_a_finite_logit_is_left_out_only_if_asked(model, tokenizer):
    states, generator = (
        run_trunk(Decoder.of(model, tiny.tokenizer()), tokenizer(texts()[:4]).input_ids, 3),
        torch.Generator().manual_seed(0),
    )
    states[2] = dataclasses.replace(states[2], hidden=torch.full_like(states[2].hidden, torch.nan))
    queries = [
        Query(state, torch.randn(12, generator=generator), [5, 9], 1, "a text") for state in states
    ]
    for batch_size, n_steps in ((1, 3), (2, 2)):
        settings = FitConfig((3, 4), 3, batch_size=batch_size, epochs=1, min_steps=0, patience=0)
        trainer = Trainer(
            Decoder.of(model, tiny.tokenizer()),
            tiny.pids(model),
            Router(12, 2, 6, 3, 13, generator),
            queries,
            settings,
        )
        with pytest.raises(ValueError, match="NaN or infinity in the logits"):
            trainer.run()
        settings = dataclasses.replace(settings, skip_nan=True)
        trainer = Trainer(
            Decoder.of(model, tiny.tokenizer()),
            tiny.pids(model),
            Router(12, 2, 6, 3, 13, generator),
            queries,
            settings,
        )
        trainer.run()
        assert len(trainer.log) == n_steps
        assert all(parameter.isfinite().all() for parameter in trainer.router.parameters())


def test_a_gradient_that_is_not_finite_stops_training_before_the_router_is_touched(
    model, tokenizer, monkeypatch
):
    states, generator = (
        run_trunk(Decoder.of(model, tiny.tokenizer()), tokenizer(texts()[:2]).input_ids, 3),
        torch.Generator().manual_seed(0),
    )
    queries = [Query(state, torch.randn(12, generator=generator), [5, 9], 1) for state in states]
    settings, plain = (
        FitConfig((3, 4), 3, batch_size=2, epochs=1, min_steps=0, patience=0, skip_nan=True),
        torch.autograd.grad,
    )
    trainer = Trainer(
        Decoder.of(model, tiny.tokenizer()),
        tiny.pids(model),
        Router(12, 2, 6, 3, 13, generator),
        queries,
        settings,
    )
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *args: [part * torch.nan for part in plain(*args)]
    )
    with pytest.raises(ValueError, match="its gradient is not finite"):
        trainer.run()
    assert all(parameter.isfinite().all() for parameter in trainer.router.parameters())


def test_a_fit_without_one_finite_query_is_refused(config, tokenizer):
    model = tiny.model("llama")
    torch.nn.init.constant_(model.get_output_embeddings().weight, torch.nan)
    features = features_of(config.encoder, Decoder.of(model, tokenizer), "cpu")
    with pytest.raises(ValueError, match="no training query has finite states"):
        training_queries(
            Decoder.of(model, tokenizer),
            [tiny.task()],
            features,
            3,
            dataclasses.replace(config, skip_nan=True),
        )
