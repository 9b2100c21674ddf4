"""What a router knows of its sources, and which prompts it warns of."""

import dataclasses
import json
import time
import warnings

import pytest
import torch

import tiny
from icrouting.config import HIDDEN, FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.icr import InContextRouter
from icrouting.routing import artifact, sources
from icrouting.routing.description import describe
from icrouting.routing.features import features_of
from icrouting.routing.router import Router
from icrouting.routing.sources import Source, sources_of
from icrouting.tasks.catalogue import SPECS
from icrouting.tasks.rows import unlabelled
from icrouting.tasks.task import Example, Task, TaskSpec

LAYERS = (3, 4)
OPTIONS = ("negative", "positive")
PROMPT = "Review: joy plot\nSentiment:"
INSTRUCTED = f"Is this review negative or positive?\n{PROMPT}"


@pytest.fixture(scope="module")
def llama():
    return tiny.model("llama")


@pytest.fixture(scope="module")
def icr(llama):
    """An untrained router of one source, which reads the model's own states."""
    decoder = Decoder.of(llama, tiny.tokenizer())
    fit = FitConfig(layers=LAYERS, rank=3, hidden_width=5, encoder=HIDDEN)
    features = features_of(HIDDEN, decoder, "cpu")
    description = describe(decoder, [tiny.task()], fit, LAYERS, features)
    router = Router(features.n_features, 2, 6, 3, 5, torch.Generator().manual_seed(0))
    return InContextRouter(description, tiny.pids(llama), router)


def warned_of(icr, model, use, strength=1.0):
    """The warnings that one attachment gives while it is used."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with icr.attached(model, tiny.tokenizer(), strength=strength) as routed:
            use(routed)
    # Other warnings there may be: this router is untrained.
    messages = [str(warning.message) for warning in caught]
    return [message for message in messages if "form of none" in message]


def source(template="Review: {text}\nSentiment:", n_lines=None):
    return Source("toy", template, OPTIONS, PROMPT, n_lines, 1, 2, 1)


def test_a_saved_router_keeps_what_its_sources_read_like_and_how_many_rows_it_used(saved_router):
    (toy,) = InContextRouter.from_pretrained(saved_router).description.sources
    task = tiny.task()
    assert toy.name == "toy"
    assert toy.template == task.spec.template
    assert toy.options == OPTIONS
    assert toy.example in [task.prompt(row) for row in task.train]
    assert toy.n_lines == 2
    # Of 100 prompts and 1000 queries that were asked for, there are 40 rows.
    assert (toy.n_prompts, toy.n_demos, toy.n_queries) == (40, 10, 40)


def test_a_class_with_fewer_rows_gives_fewer_demonstrations():
    task = tiny.task()
    odd = [row for row in task.train if row.label]
    even = [row for row in task.train if not row.label]
    rows = dataclasses.replace(task, train=(*odd[:2], *even[:9]))
    (known,) = sources_of([rows], FitConfig(demos_per_class=5))
    assert known.n_demos == 2 + 5


def test_rows_with_choices_of_their_own_are_known_by_letters():
    spec = TaskSpec("quiz", "far", "{question}\n{choices}\nAnswer ({letters}):")
    row = Example({"question": "why?"}, ("so", "not so", "who knows"), 2)
    (known,) = sources_of([Task(spec, (row, row), ())], FitConfig())
    assert known.options == ("A", "B", "C")
    assert known.example == "why?\nA. so\nB. not so\nC. who knows\nAnswer (A/B/C):"


def test_rows_with_choices_that_the_template_does_not_show_keep_all_their_letters():
    spec = TaskSpec("quiz", "far", "{question}\nAnswer:")
    short = Example({"question": "why?"}, ("so", "not so"), 1)
    long = Example({"question": "why then?"}, ("so", "not so", "who knows"), 2)
    task = Task(spec, (short, long), ())
    (known,) = sources_of([task], FitConfig())
    kept = Source(**known.as_kept())
    asked = {"question": "why then?", "choices": "so|not so|who knows"}
    assert Task(kept.spec, (), ()).options(unlabelled(asked, kept.spec)) == ("A", "B", "C")


def test_a_source_that_shows_its_choices_is_kept_as_before():
    row = Example({"question": "why?"}, ("so", "not so"), 1)
    spec = TaskSpec("quiz", "far", "{question}\n{choices}\nAnswer:")
    (shown,) = sources_of([Task(spec, (row, row), ())], FitConfig())
    (usual,) = sources_of([tiny.task()], FitConfig())
    assert "has_unshown_choices" not in {*shown.as_kept(), *usual.as_kept()}
    assert shown.spec.options == ()


def test_a_source_without_words_reads_as_the_known_task_of_its_template():
    copa = SPECS["copa"]
    row = Example({"question": "It rained.", "relation": "cause"}, ("So.", "Clouds."), 0)
    old = Source("copa", copa.template, ("A", "B"), "x", 1, 1, 1, 1)
    asked = Task(old.spec, (), ()).question(row)
    assert asked == Task(copa, (), ()).question(row)
    assert "What was the cause of this?" in asked
    assert "words" not in old.as_kept()
    assert Source("mine", copa.template, ("A", "B"), "x", 1, 1, 1, 1).spec.words == {}


def test_a_router_of_an_earlier_version_loads_and_is_saved_as_it_was(saved_router, tmp_path):
    config = json.loads((saved_router / "config.json").read_text())
    del config["sources"]
    config["checksum"] = artifact._checksum(config)
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text(json.dumps(config, indent=1))
    weights = (saved_router / "model.safetensors").read_bytes()
    (old / "model.safetensors").write_bytes(weights)
    icr = InContextRouter.from_pretrained(old)
    assert icr.description.sources is None
    icr.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (old / "config.json").read_bytes()


def test_a_router_of_an_earlier_version_warns_of_no_prompt(icr, llama):
    description = dataclasses.replace(icr.description, sources=None)
    old = dataclasses.replace(icr, description=description)
    assert warned_of(old, llama, lambda routed: routed.score([INSTRUCTED], OPTIONS)) == []


def test_a_line_above_the_template_is_warned_of(icr, llama):
    (message,) = warned_of(icr, llama, lambda routed: routed.score([INSTRUCTED], OPTIONS))
    assert "has the form of none of the tasks that the router was fitted on (toy)" in message
    assert r"where toy reads 'Review: {text}\nSentiment:'" in message


def test_a_prompt_of_a_source_is_not_warned_of(icr, llama):
    task = tiny.task()
    prompts = [task.prompt(row) for row in (*task.train, *task.test)]
    assert warned_of(icr, llama, lambda routed: routed.score(prompts, OPTIONS)) == []


@pytest.mark.parametrize(
    "prompt",
    [
        "Review: joy plot\nThe sentiment:",
        "Text: joy plot\nSentiment:",
        "joy plot",
        "Review: bad\nSentiment: negative\nReview: joy plot\nSentiment:",
    ],
    ids=["another cue", "another head", "no template", "demonstrations above"],
)
def test_a_prompt_of_another_form_is_warned_of(prompt, icr, llama):
    assert len(warned_of(icr, llama, lambda routed: routed.routing([prompt]))) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda model, inputs: model(**inputs),
        lambda model, inputs: model.generate(**inputs, max_new_tokens=2),
    ],
    ids=["model(...)", "generate"],
)
def test_plain_calls_are_warned_of_too(call, icr, llama):
    inputs = tiny.tokenizer()([INSTRUCTED], return_tensors="pt")
    assert len(warned_of(icr, llama, lambda _: call(llama, inputs))) == 1


def test_one_attachment_warns_once(icr, llama):
    def thrice(routed):
        for _ in range(3):
            routed.score([INSTRUCTED], OPTIONS)

    assert len(warned_of(icr, llama, thrice)) == 1
    assert len(warned_of(icr, llama, thrice)) == 1


def test_what_is_not_routed_is_not_warned_of(icr, llama):
    use = lambda routed: routed.score([INSTRUCTED], OPTIONS)  # noqa: E731
    assert warned_of(icr, llama, use, strength=0.0) == []


def test_a_tokenizer_that_changes_texts_says_nothing_of_their_form(icr, llama, monkeypatch):
    monkeypatch.setattr(
        "icrouting.routing.sources.query_texts",
        lambda tokenizer, token_lists: ["lower case"] * len(token_lists),
    )
    assert warned_of(icr, llama, lambda routed: routed.score([INSTRUCTED], OPTIONS)) == []


@pytest.mark.parametrize(
    ("template", "prompt", "fits"),
    [
        ("{a} is {b}.", "tea is hot.", True),
        ("{a} is {b}.", "tea was hot.", False),
        ("{a}{b}:", ":", True),
        ("{{literal}} {a}:", "{literal} braces:", True),
        ("Say it:", "Say it:", True),
        ("Say it:", "Say it: Say it:", False),
        # The head and the cue may not be the same characters.
        ("a:{text}:b a:", "a:b a:", False),
    ],
)
def test_a_prompt_has_the_form_of_a_template_with_any_texts_in_its_slots(template, prompt, fits):
    assert source(template).has_form(prompt) is fits


def test_where_all_prompts_have_one_line_more_lines_are_another_form():
    headless = "{text} Sentiment:"
    assert source(headless, n_lines=1).has_form("joy plot Sentiment:")
    assert not source(headless, n_lines=1).has_form("Judge this.\njoy plot Sentiment:")
    assert source(headless, n_lines=None).has_form("Judge this.\njoy plot Sentiment:")


def test_a_long_prompt_is_looked_at_in_no_time():
    slots = source("{a} {b} {c} {d} {e} {f} {g}:")
    prompt = "a " * 100_000
    started = time.perf_counter()
    assert not slots.has_form(prompt)
    assert time.perf_counter() - started < 0.1


def card_of(icr, **changes):
    """The card of a router whose description is changed."""
    changed = dataclasses.replace(icr.description, **changes)
    return dataclasses.replace(icr, description=changed).generate_model_card().text


def test_the_card_counts_what_was_used_and_not_what_was_asked_for(icr):
    assert "| toy | 40 | 40 | 10 |" in card_of(icr)
    assert "1000" not in card_of(icr)


def test_the_card_of_an_earlier_version_counts_what_was_used(icr):
    assert "| toy | 40 | 40 |\n" in card_of(icr, sources=None)


def test_a_card_counts_at_most_where_prompts_may_have_been_left_out(icr):
    lenient = dataclasses.replace(icr.description.fit, skip_nan=True)
    assert "few-shot prompts, at most | queries, at most |" in card_of(icr, fit=lenient)
    assert "at most" not in card_of(icr)


def test_the_example_of_a_card_is_a_prompt_of_a_source(icr, llama):
    (toy,) = icr.description.sources
    line = f"routed.score([{toy.example!r}], ['negative', 'positive'])"
    assert f"    {line}\n" in card_of(icr)
    assert warned_of(icr, llama, lambda routed: eval(line, {"routed": routed})) == []


def test_the_card_of_an_earlier_version_shows_no_example_of_another_task(icr):
    assert "Review" not in card_of(icr, sources=None)


def test_a_template_stays_in_its_cell(icr):
    (toy,) = icr.description.sources
    odd = dataclasses.replace(toy, template="`a|b`\n{text}:", options=("x|y", *"abcdefghij"))
    rows = [line for line in card_of(icr, sources=(odd,)).splitlines() if line.startswith("| toy")]
    shown = r"`` `a\|b`\n{text}: `` | x\|y, a, b, c, d, e, f, g, h, i, ... (11) |"
    assert rows == [f"| toy | 40 | 40 | 10 | {shown}"]


def test_of_a_long_prompt_the_ends_are_looked_at(icr, llama):
    text = " ".join(f"joy {number}" for number in range(90))
    prompt = f"Review: {text}\nSentiment:"
    assert len(tiny.tokenizer()(prompt).input_ids) > sources.N_TOKENS
    assert warned_of(icr, llama, lambda routed: routed.routing([prompt])) == []
    for odd in (f"Judge it.\n{prompt}", f"{prompt} Well,"):
        (message,) = warned_of(icr, llama, lambda routed, odd=odd: routed.routing([odd]))
        assert repr(odd[:40]) in message
        assert repr(odd[-40:]) in message


def test_after_many_prompts_of_known_form_one_call_in_some_is_looked_at(monkeypatch):
    monkeypatch.setattr(sources, "N_LOOKS", 3)
    monkeypatch.setattr(sources, "RARELY", 4)
    read, looks = sources.FormWatch._read, []

    def counted(self, tokens):
        looks.append(tokens)
        return read(self, tokens)

    monkeypatch.setattr(sources.FormWatch, "_read", counted)
    watch = sources.FormWatch([source()], tiny.tokenizer())
    for _ in range(12):
        watch.look_at(tiny.tokenizer()([PROMPT]).input_ids)
    # The first three, then the fourth, eighth and twelfth.
    assert len(looks) == 6
