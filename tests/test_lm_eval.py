import json
import re
import shutil
import sys
import warnings
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tiny
from icrouting.config import HIDDEN, FitConfig
from icrouting.decoder.batches import tokenize
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import dims_of
from icrouting.decoder.loading import load_model
from icrouting.decoder.partial import entering_states
from icrouting.icr import InContextRouter
from icrouting.routing.attach import attach
from icrouting.routing.features import features_of
from icrouting.routing.reader import Reader
from icrouting.routing.rerouting import rerouted
from icrouting.routing.router import Router
from icrouting.tasks.chat import conversation, rendered
from pinned import fetch_or_skip
from test_beginnings import BOS, beginning
from test_chat import CHATML

pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is heavy: pip install 'icrouting[lm-eval]' to test it"
)

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CacheHook
from lm_eval.api.registry import Registry, register_model
from lm_eval.tasks import TaskManager

from icrouting import lm_eval

pytestmark = pytest.mark.slow

CLOSE = 1e-4  # fp32 round-off of sums of a few log-probabilities of size 20
ROOT = Path(__file__).parents[1]
WORDS, PHRASES = ["negative", "positive"], ["a joy", "dull and far too weak", "boring plot"]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/rows.jsonl"}}, cache_dir: "{folder}/cache"}}
test_split: test
doc_to_text: "Review: {{{{text}}}}\\nSentiment:"
"""
CHOICES = (
    "output_type: multiple_choice\ndoc_to_target: label\ndoc_to_choice: {choices}\n"
    "metric_list: [{{metric: acc}}]\n"
)
GENERATE = (
    "output_type: generate_until\ndoc_to_target: label\n"
    "generation_kwargs: {until: [zzz], max_gen_toks: 6}\n"
)
ROLLING = (
    "output_type: loglikelihood_rolling\nmetric_list: [{metric: word_perplexity}]\n"
    "doc_to_target: '{{text}}'\n"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory, encoder_folder):
    """A folder with a model, a router fitted on it, and four harness tasks on the same rows."""
    folder, task = tmp_path_factory.mktemp("harness"), tiny.task()
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    model.config.name_or_path = str(folder / "model")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    small = {
        "rank": 3,
        "n_prompts": 6,
        "demos_per_class": 1,
        "n_queries": 8,
        "epochs": 1,
        "min_steps": 0,
        "patience": 0,
        "hidden_width": 13,
    }
    icr = InContextRouter.fit(
        model, tokenizer, [task], FitConfig(layers=(3, 4), encoder=str(encoder_folder), **small)
    )
    torch.nn.init.normal_(icr.router.alpha[-1].weight, generator=torch.Generator().manual_seed(5))
    icr.save_pretrained(folder / "router")
    rows = [{"text": example.fields["text"], "label": example.label} for example in task.test]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kinds = {"words": CHOICES.format(choices=WORDS), "phrases": CHOICES.format(choices=PHRASES)}
    for name, kind in (kinds | {"generate": GENERATE, "rolling": ROLLING}).items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, folder=folder) + kind)
    register_model("icr")(lm_eval.RoutedLM)
    return folder


def ask(world, task, kind="icr", batch_size=1, apply_template=False, **settings):
    """The harness's answers to a task, one list per document."""
    settings = {"pretrained": str(world / "model"), "device": "cpu", **settings}
    if kind == "icr":
        settings = {"icr": str(world / "router"), **settings}
    manager = TaskManager(include_path=str(world), include_defaults=False)
    results = simple_evaluate(
        model=kind,
        model_args=settings,
        tasks=[task],
        batch_size=batch_size,
        task_manager=manager,
        bootstrap_iters=0,
        apply_chat_template=apply_template,
    )
    return [
        sample["filtered_resps"]
        for sample in sorted(results["samples"][task], key=lambda s: s["doc_id"])
    ]


def likelihoods(*args, **kwargs):
    return torch.tensor([[pair[0] for pair in row] for row in ask(*args, **kwargs)])


def prompts():
    return [tiny.task().prompt(example) for example in tiny.task().test]


def routed_by_context(world, prompts, options):
    """Log-likelihoods of whole passes over context and continuation.

    The routing is that of the context alone.
    """
    model, tokenizer = load_model(world / "model", dtype=torch.float32)
    icr = InContextRouter.from_pretrained(world / "router")
    rows = []
    for prompt in prompts:
        with icr.attached(model, tokenizer) as routed:
            routing = routed.routing([prompt])
        context = tokenizer(prompt).input_ids
        with attach(model, icr.pids) as attachment:
            attachment.routing = routing
            row = []
            for option in options:
                tokens = tokenizer(f"{prompt} {option}").input_ids[len(context) :]
                logprobs = model(torch.tensor([context + tokens])).logits[0].log_softmax(-1)
                row.append(
                    sum(
                        float(logprobs[len(context) + n - 1, token])
                        for n, token in enumerate(tokens)
                    )
                )
        rows.append(row)
    return torch.tensor(rows)


def test_options_are_scored_as_by_our_own_scoring(world):
    model, tokenizer = load_model(world / "model", dtype=torch.float32)
    with InContextRouter.from_pretrained(world / "router").attached(model, tokenizer) as routed:
        ours = routed.score(prompts(), WORDS)
    theirs = likelihoods(world, "words")
    assert ((theirs[:, 1] - theirs[:, 0]) - (ours[:, 1] - ours[:, 0])).abs().max() < CLOSE


def test_a_beginning_that_the_prompt_brings_is_read_once_as_by_our_own_scoring(world, tmp_path):
    shutil.copytree(world / "model", tmp_path / "model")
    beginning(f"{BOS} $A").save_pretrained(tmp_path / "model")
    model, tokenizer = load_model(tmp_path / "model", dtype=torch.float32)
    texts = [prompts()[0], BOS + prompts()[1]]
    with InContextRouter.from_pretrained(world / "router").attached(model, tokenizer) as routed:
        ours = routed.score(texts, WORDS)
    lm = lm_eval.RoutedLM(str(tmp_path / "model"), str(world / "router"), device="cpu")
    answers = lm.loglikelihood(requests(*((text, f" {word}") for text in texts for word in WORDS)))
    theirs = torch.tensor([answer[0] for answer in answers]).view(2, 2)
    assert ((theirs[:, 1] - theirs[:, 0]) - (ours[:, 1] - ours[:, 0])).abs().max() < CLOSE


@pytest.fixture(scope="module")
def chat_world(world, tmp_path_factory):
    """The same with a tokenizer that puts a beginning before texts, as its chat template does."""
    folder = tmp_path_factory.mktemp("chats")
    shutil.copytree(world, folder, dirs_exist_ok=True)
    tokenizer = beginning(f"{BOS} $A")
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    tokenizer.save_pretrained(folder / "model")
    model, _ = load_model(folder / "model", dtype=torch.float32)
    small = {"rank": 3, "n_prompts": 6, "n_queries": 6, "epochs": 1, "demos_per_class": 1}
    config = FitConfig(**small, encoder=HIDDEN)
    icr = InContextRouter.fit(model, tokenizer, [tiny.task().in_chat()], config)
    icr.save_pretrained(folder / "router")
    return folder


def test_in_chats_options_are_scored_as_by_our_own_scoring_and_nothing_is_warned_of(chat_world):
    model, tokenizer = load_model(chat_world / "model", dtype=torch.float32)
    asked = [conversation(prompt) for prompt in prompts()]
    icr = InContextRouter.from_pretrained(chat_world / "router")
    with icr.attached(model, tokenizer) as routed:
        ours = routed.score(asked, WORDS)
    lm = lm_eval.RoutedLM(str(chat_world / "model"), str(chat_world / "router"), device="cpu")
    asked_tokens = []
    for messages in asked:
        context = lm.apply_chat_template(list(messages))
        for word in WORDS:
            tokens, continuation = lm._encode_pair(context, word)
            assert tokens == tokenize(tokenizer, [context])[0]
            # Our scores know an option by its first token.
            asked_tokens.append(((context, word), tokens, continuation[:1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers = lm._loglikelihood_tokens(asked_tokens)
    theirs = torch.tensor([answer[0] for answer in answers]).view(-1, 2)
    assert ((theirs[:, 1] - theirs[:, 0]) - (ours[:, 1] - ours[:, 0])).abs().max() < CLOSE


def test_the_harness_own_chats_are_routed(chat_world):
    routed = likelihoods(chat_world, "words", apply_template=True)
    assert (routed - likelihoods(chat_world, "words")).abs().max() > 100 * CLOSE
    _, tokenizer = load_model(chat_world / "model", dtype=torch.float32)
    prompt = rendered(tokenizer, conversation(prompts()[0]))
    lm = lm_eval.RoutedLM(str(chat_world / "model"), str(chat_world / "router"), device="cpu")
    expected = [lm.loglikelihood(requests((prompt, word)))[0][0] for word in WORDS]
    assert routed[0].tolist() == pytest.approx(expected, abs=CLOSE)


@pytest.mark.parametrize("strength", [1, 0])
def test_a_likelihood_that_is_not_finite_is_named(strength, world, monkeypatch):
    lm = lm_eval.RoutedLM(
        str(world / "model"), str(world / "router"), strength, device="cpu", dtype="float32"
    )
    # Behind the router's check of the weights.
    monkeypatch.setattr(Decoder, "check_fitted_on", lambda self, *told: None)
    lm.model.get_output_embeddings().weight.data[7] = torch.nan
    asked = requests((prompts()[0], " negative"), (prompts()[0], " positive"))
    with pytest.raises(ValueError, match=r"log-likelihood behind a context is nan \(it ends"):
        lm.loglikelihood(asked)


def test_long_options_are_routed_by_the_context_alone(world):
    theirs = likelihoods(world, "phrases")
    assert (theirs - routed_by_context(world, prompts(), PHRASES)).abs().max() < CLOSE
    assert (theirs - likelihoods(world, "phrases", "hf")).abs().max() > 100 * CLOSE


@pytest.mark.parametrize("task", ["words", "phrases", "generate"])
def test_zero_strength_is_the_harness_own_model_exactly(task, world):
    assert ask(world, task, strength=0, batch_size=5) == ask(world, task, "hf", batch_size=5)


@pytest.mark.parametrize("batch_size", [5, "auto"])
def test_a_batch_gives_the_answers_of_one_context_at_a_time(batch_size, world):
    for task in ("words", "phrases"):
        together = likelihoods(world, task, batch_size=batch_size, max_batch_size=4)
        assert (together - likelihoods(world, task)).abs().max() < CLOSE
    assert ask(world, "generate", batch_size=5) == ask(world, "generate")


def test_generated_texts_are_those_of_an_attached_model(world):
    model, tokenizer = load_model(world / "model", dtype=torch.float32)
    expected = []
    with InContextRouter.from_pretrained(world / "router").attached(model, tokenizer):
        for prompt in prompts():
            inputs = tokenizer(prompt, return_tensors="pt")
            tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[
                0, inputs["input_ids"].shape[1] :
            ]
            expected.append([tokenizer.decode(tokens, skip_special_tokens=True)])
    assert ask(world, "generate") == expected
    assert ask(world, "generate", "hf") != expected


@pytest.fixture(scope="module")
def routed_lm(world):
    return lm_eval.RoutedLM(str(world / "model"), str(world / "router"), device="cpu", batch_size=3)


def test_without_a_model_the_routers_is_taken(world):
    lm = lm_eval.RoutedLM(icr=str(world / "router"), device="cpu")
    assert lm.model.config.name_or_path == str(world / "model")


def test_without_a_router_the_plugin_asks_for_one(world):
    with pytest.raises(ValueError, match="expected icr=FOLDER"):
        lm_eval.RoutedLM(str(world / "model"))


def requests(*pairs):
    return [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]


def test_one_text_is_routed_anew_wherever_context_and_continuation_part(world, routed_lm):
    """The harness's own batches would run such requests once, with one of the two contexts."""
    long, short = "Review: joy dull\nSentiment: good bad", "Review: joy dull\nSentiment:"
    answers = routed_lm.loglikelihood(
        requests((long, " plot"), (short, " good bad plot"), (long, " film"))
    )
    assert answers[0][0] == pytest.approx(
        float(routed_by_context(world, [long], ["plot"])), abs=CLOSE
    )
    assert answers[1][0] == pytest.approx(
        float(routed_by_context(world, [short], ["good bad plot"])), abs=CLOSE
    )
    assert answers[2][0] == pytest.approx(
        float(routed_by_context(world, [long], ["film"])), abs=CLOSE
    )


def test_contexts_may_have_unequal_numbers_of_continuations(world, routed_lm):
    pairs = [
        (prompts()[0], " joy"),
        *((prompt, f" {option}") for prompt in prompts()[1:3] for option in PHRASES),
    ]
    alone = [routed_lm.loglikelihood(requests(pair))[0][0] for pair in pairs]
    assert [answer[0] for answer in routed_lm.loglikelihood(requests(*pairs))] == pytest.approx(
        alone, abs=CLOSE
    )


def test_greedy_is_said_of_what_generation_would_give(routed_lm):
    inputs = routed_lm.tokenizer(prompts()[0], return_tensors="pt")
    with routed_lm._attached():
        tokens = routed_lm.model.generate(**inputs, max_new_tokens=4, do_sample=False)[
            0, -4:
        ].tolist()
    context = inputs["input_ids"][0].tolist()
    texts = (prompts()[0], "whatever")
    answers = routed_lm._loglikelihood_tokens(
        [(texts, context, tokens), (texts, context, [*tokens[:3], 7])]
    )
    assert [is_greedy for _, is_greedy in answers] == [True, False]


def test_a_context_that_is_too_long_is_cut_on_the_left_alike_for_all_continuations(
    world, routed_lm
):
    short = lm_eval.RoutedLM(
        str(world / "model"), str(world / "router"), device="cpu", max_length=12
    )
    context = routed_lm.tok_encode(prompts()[0])
    assert len(context) > 12
    texts, options = (prompts()[0], " a b"), [[5, 9, 11], [17]]
    cut = short._loglikelihood_tokens([(texts, context, option) for option in options])
    whole = routed_lm._loglikelihood_tokens([(texts, context[-10:], option) for option in options])
    assert [answer[0] for answer in cut] == pytest.approx(
        [answer[0] for answer in whole], abs=CLOSE
    )


def test_a_likelihood_without_a_context_is_refused(world, routed_lm):
    with pytest.raises(ValueError, match="no prompt to be routed by"):
        ask(world, "rolling")
    with pytest.raises(ValueError, match="no prompt to be routed by"):
        routed_lm.loglikelihood(requests(("", "a joy")))
    assert ask(world, "rolling", strength=0) == ask(world, "rolling", "hf")


@pytest.mark.parametrize("family", tiny.ALL_CONFIGS)
def test_every_family_goes_on_from_its_padded_context(family, tokenizer):
    """Sliding windows, absolute positions, experts.

    Logits of whole passes with the context's routing.
    """
    model = tiny.model(family, "eager" if family == "gemma2" else "sdpa")
    directions, generator = tiny.pids(model), torch.Generator().manual_seed(3)
    contexts = [torch.randint(2, tiny.VOCAB, (n,), generator=generator).tolist() for n in (13, 4)]
    options = [torch.randint(2, tiny.VOCAB, (n,), generator=generator).tolist() for n in (1, 5)]
    features = features_of(HIDDEN, Decoder.of(model, tokenizer), "cpu")
    router = Router(
        features.n_features, 2, dims_of(model).n_heads, 3, 13, generator
    ).requires_grad_(False)
    router.alpha[-1].weight.normal_(generator=generator)
    vectors = features.read(
        contexts, entering_states(Decoder.of(model, tiny.tokenizer()), contexts, 3)
    )
    router.absorb(vectors.mean(0), vectors.std(0))  # so that the two contexts are told apart
    reader = Reader(Decoder.of(model, tokenizer), features, router, 3, 1.0)
    routings = [reader.of_tokens([context]) for context in contexts]
    assert (routings[0].routing_vector - routings[1].routing_vector).abs().max() > 0.1

    lm = SimpleNamespace(
        model=model,
        device=model.device,
        max_length=512,
        softmax_dtype=None,
        cache_hook=CacheHook(None),
    )
    groups = [[(None, context, option) for option in options] for context in contexts]
    with torch.no_grad(), rerouted(reader, directions):
        found = [loglikelihood for loglikelihood, _ in lm_eval.RoutedLM._answers(lm, groups)]
    with attach(model, directions) as attachment:
        for context, attachment.routing in zip(contexts, routings, strict=True):
            for option in options:
                logprobs = (
                    model(torch.tensor([context + option]))
                    .logits[0, len(context) - 1 : -1]
                    .log_softmax(-1)
                )
                whole = logprobs.gather(1, torch.tensor(option)[:, None]).sum()
                assert found.pop(0) == pytest.approx(float(whole), abs=CLOSE)


@pytest.mark.parametrize("strength", [1.0, 0])
def test_likelihoods_of_a_bfloat16_model_are_not_rounded_to_it(strength, world):
    answers = likelihoods(world, "words", strength=strength, dtype="bfloat16")
    assert (answers - answers.bfloat16()).abs().max() > 0
    assert (answers - likelihoods(world, "words", strength=strength)).abs().max() < 0.5


def test_the_documented_command_runs_the_documented_task(world, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "lm-eval.md").read_text()
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", page, re.DOTALL))
    (tmp_path / "reviews.yaml").write_text(blocks["yaml"])
    (tmp_path / "reviews.jsonl").write_text(blocks["json"])
    (arguments,) = re.findall(r"python -m icrouting.lm_eval (--.*)", page)
    for documented, here in (("pinned:smollm2-135m", "model"), ("routers/smollm2-135m", "router")):
        arguments = arguments.replace(documented, str(world / here))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(
        sys, "argv", ["lm_eval", *arguments.split(), "--device", "cpu", "--output_path", "out"]
    )
    lm_eval.main()
    assert "reviews" in capsys.readouterr().out
    (results,) = Path("out").rglob("results*.json")
    assert "acc,none" in json.loads(results.read_text())["results"]["reviews"]


def test_the_harness_finds_the_model_by_its_entry_point():
    (entry,) = entry_points(group="lm_eval.models", name="icr")
    models = Registry("model", base_cls=LM)
    models.register("icr", target=entry)
    assert models.get("icr") is lm_eval.RoutedLM


@pytest.mark.pinned
def test_the_committed_router_scores_the_pinned_model_as_by_our_own_scoring():
    fetch_or_skip("smollm2-135m", "minilm")
    model, tokenizer = load_model("pinned:smollm2-135m", dtype=torch.float32)
    texts = ["Review: a joy to watch .\nSentiment:", "Review: dull and far too long .\nSentiment:"]
    router = str(ROOT / "routers" / "smollm2-135m")
    with InContextRouter.from_pretrained(router).attached(model, tokenizer) as routed:
        ours = routed.score(texts, WORDS)
    lm = lm_eval.RoutedLM(
        "pinned:smollm2-135m", router, device="cpu", dtype="float32", batch_size=2
    )
    answers = lm.loglikelihood(requests(*((text, f" {word}") for text in texts for word in WORDS)))
    theirs = torch.tensor([answer[0] for answer in answers]).view(2, 2)
    assert ((theirs[:, 1] - theirs[:, 0]) - (ours[:, 1] - ours[:, 0])).abs().max() < CLOSE


def test_a_router_of_another_model_is_refused_when_loading(world, tmp_path):
    tiny.save(tmp_path, seed=1)
    with pytest.raises(ValueError, match="this router was fitted on"):
        ask(world, "words", pretrained=str(tmp_path))
