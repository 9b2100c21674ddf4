"""Prompts made of a router's own templates, and tasks that read otherwise than it was fitted on."""

import dataclasses

import pytest

import tiny
from commands import on
from icrouting import FitConfig, TaskSpec, load_task
from icrouting.cli import main
from icrouting.cli.filling import filled
from icrouting.icr import InContextRouter
from icrouting.routing.sources import Source, read_otherwise, sources_of
from icrouting.tasks.catalogue import SPECS

TICKETS = Source("tickets", "Ticket: {text}\nTeam:", ("Access", "Hardware"), "", 2, 1, 1, 1)
PAIRS = Source("pairs", "{a} and {b}:", ("no", "yes"), "", 1, 1, 1, 1)
BOTH = (TICKETS, PAIRS)


def of_catalogue(name):
    return Source(name, SPECS[name].template, SPECS[name].options or ("A", "B"), "", None, 1, 1, 1)


def test_a_prompt_is_the_template_with_the_fields_in_its_slots_and_brings_the_options():
    made = filled(None, "tickets", ["text=My mouse is gone"], BOTH)
    assert made.prompt == "Ticket: My mouse is gone\nTeam:"
    assert made.options == ("Access", "Hardware")
    assert filled(None, "pairs", ["b=2", "a=1"], BOTH).prompt == "1 and 2:"


def test_a_template_of_one_slot_takes_the_bare_text_with_whatever_signs():
    for text in ("My mouse", "a=b", "text", "{text}"):
        assert filled(None, "tickets", [text], BOTH).prompt == f"Ticket: {text}\nTeam:"


def test_a_router_of_one_task_needs_no_name_of_it():
    assert filled(None, None, ["gone"], [TICKETS]).prompt == "Ticket: gone\nTeam:"


def test_a_typed_prompt_stays_as_it_is_and_brings_no_options():
    made = filled("anything", None, [], None)
    assert (made.prompt, made.options) == ("anything", ())


@pytest.mark.parametrize(
    ("task", "fields", "sources", "said"),
    [
        ("ticket", ["a"], BOTH, "unknown task of this router 'ticket': did you mean tickets"),
        (None, ["a"], BOTH, "fitted on tickets, pairs: name one of them with --task"),
        ("pairs", ["a=1"], BOTH, "--fields lacks b: pairs's template is"),
        ("pairs", ["1", "2"], BOTH, "'1': expected one NAME=TEXT for each of a, b"),
        ("pairs", ["a=1", "b=2", "c=3"], BOTH, "'c=3': expected one NAME=TEXT"),
        ("pairs", ["a=1", "a=2"], BOTH, "'a=2': expected one NAME=TEXT"),
        ("tickets", ["text= "], BOTH, "--fields lacks text"),
        ("tickets", ["a"], None, "keeps no template of its tasks: type the prompt"),
    ],
)
def test_fields_that_do_not_fit_are_refused_with_the_template(task, fields, sources, said):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        filled(None, task, fields, sources)
    assert said in str(error.value)


def test_choices_are_given_as_in_a_csv_and_become_letters():
    made = filled(None, "csqa", ["question=Where?", "choices=here|there"], [of_catalogue("csqa")])
    assert "A. here\nB. there" in made.prompt
    assert made.options == ("A", "B")


@pytest.mark.parametrize("name", SPECS)
def test_every_known_task_is_filled_as_it_is_read(name):
    """Replacements of fields' values among them, which a router does not keep."""
    task = tiny.task("sst2")
    spec = SPECS[name]
    values = {slot: next(iter(spec.words.get(slot, {"some text": ""}))) for slot in spec.slots}
    choices = () if spec.options else ("one", "two")
    row = dataclasses.replace(task.test[0], fields=values, choices=choices)
    fields = [f"{slot}={text}" for slot, text in values.items()]
    if choices:
        fields.append("choices=one|two")
    whole = dataclasses.replace(task, spec=spec)
    made = filled(None, name, fields, [of_catalogue(name)])
    assert (made.prompt, made.options) == (whole.prompt(row), whole.options(row))


def test_a_task_that_reads_otherwise_than_its_source_is_named_with_both():
    task = tiny.task()
    sources = sources_of([task], FitConfig())
    assert read_otherwise(sources, [task]) == []
    spec = task.spec
    other = TaskSpec(spec.name, spec.group, "News: {text}:", ("bad", "good"))
    (line,) = read_otherwise(sources, [dataclasses.replace(task, spec=other)])
    for said in (spec.name, repr(spec.template), "'News: {text}:'", "not bad, good"):
        assert said in line
    unseen = TaskSpec("unseen", "far", "News: {text}:", ("bad", "good"))
    assert read_otherwise(sources, [dataclasses.replace(task, spec=unseen)]) == []


@pytest.mark.parametrize(
    ("learned", "asked", "said"),
    [
        ({}, {"chat": True}, "plain prompts, not chats"),
        ({"chat": True}, {}, "chats, not plain prompts"),
        ({"chat": True}, {"chat": True, "system": "Judge."}, "the system turn '', not 'Judge.'"),
        ({"words": {"text": {"a": "b"}}}, {}, "the words {'text': {'a': 'b'}}, not {}"),
        ({}, {"label_scoring": "sum"}, "label_scoring 'first', not 'sum'"),
    ],
    ids=str,
)
def test_whatever_reads_otherwise_than_its_source_is_named(learned, asked, said):
    task = tiny.task()
    one = dataclasses.replace(task, spec=dataclasses.replace(task.spec, **learned))
    other = dataclasses.replace(task, spec=dataclasses.replace(task.spec, **asked))
    sources = sources_of([one], FitConfig())
    assert read_otherwise(sources, [one]) == []
    (line,) = read_otherwise(sources, [other])
    assert line == f"toy was fitted on {said}"


def test_words_of_a_source_that_kept_none_are_not_missed():
    task = tiny.task()
    sources = sources_of([task], FitConfig())
    spec = dataclasses.replace(task.spec, words={"text": {"a": "b"}})
    assert read_otherwise(sources, [dataclasses.replace(task, spec=spec)]) == []


def test_inspect_shows_the_filled_prompt_as_it_shows_the_same_one_typed(world, tmp_path):
    asked = ["inspect", "--router", str(world / "router"), "--out", str(tmp_path / "page.html")]
    main.main([*asked, "--fields", "text=joy"])
    page = (tmp_path / "page.html").read_text()
    task = load_task("sst2", world / "data")
    typed = filled(None, None, ["joy"], sources_of([task], FitConfig())).prompt
    main.main([*asked, "--prompt", typed, "--options", *task.spec.options])
    assert (tmp_path / "page.html").read_text() == page


def test_inspect_scores_a_task_s_labels_as_the_task_does(world, tmp_path, capsys):
    router = tmp_path / "router"
    icr = InContextRouter.from_pretrained(world / "router")
    labels = ("account access", "account deletion")
    source = dataclasses.replace(icr.description.sources[0], options=labels, label_scoring="sum")
    description = dataclasses.replace(icr.description, sources=(source,))
    dataclasses.replace(icr, description=description).save_pretrained(router)
    asked = ["--router", str(router), "--fields", "text=joy", "--out", str(tmp_path / "page.html")]
    main.main(["inspect", *asked])
    assert "log p" in capsys.readouterr().out
    assert "log-probability of all its tokens" in (tmp_path / "page.html").read_text()


def test_inspect_takes_labels_that_begin_alike_with_a_typed_prompt(world, tmp_path, capsys):
    router = str(world / "router")
    asked = ["inspect", "--router", router, "--out", str(tmp_path / "page.html"), "--prompt", "a:"]
    labels = ["--options", "account access", "account deletion"]
    main.main([*asked, *labels, "--label-scoring", "mean"])
    assert "the mean log-probability" in (tmp_path / "page.html").read_text()
    with pytest.raises(SystemExit):
        main.main([*asked, *labels])
    assert 'choose label_scoring = "sum"' in capsys.readouterr().err


def test_generate_goes_on_from_the_routers_template(world, capsys, monkeypatch):
    asked = ["--router", str(world / "router"), "--max-new-tokens", "2", "--dtype", "float32"]
    main.main(["generate", *asked, "--task", "sst2", "--fields", "text=joy"])
    assert "routed, strength 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "asked", [[], ["--task", "sst2"], ["--prompt", "a", "--fields", "b"]], ids=str
)
def test_a_prompt_and_fields_exclude_one_another(asked, world, capsys):
    with pytest.raises(SystemExit):
        main.main(["generate", "--router", str(world / "router"), *asked])
    assert "expected --prompt, or --fields" in capsys.readouterr().err


@pytest.mark.slow
def test_eval_says_which_tasks_read_otherwise_than_the_router_was_fitted_on(
    world, tmp_path, capsys
):
    (tmp_path / "sst2.toml").write_text(
        f'template = "Film: {{text}}:"\noptions = ["negative", "positive"]\n'
        f'[splits]\ntrain = "{world}/data/sst2/train.jsonl"\ntest = "{world}/data/sst2/test.jsonl"'
    )
    how = ["--methods", "zero-shot", "--seeds", "0", "--n-test", "3"]
    where = [*on(world), "--router", str(world / "router"), "--out", str(tmp_path / "run")]
    main.main(["eval", *where, "--tasks", str(tmp_path / "sst2.toml"), *how])
    shown = " ".join(capsys.readouterr().out.split())
    assert "sst2 was fitted on" in shown
    assert "and reads 'Film: {text}:' here" in shown
