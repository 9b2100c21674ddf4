"""Prompts in the words of a tokenizer's chat template, from the task to the scores."""

import dataclasses
import hashlib
import json
import warnings

import numpy as np
import pytest
import torch

import fitted
import tiny
from fitted import SMALL, fit_method
from icrouting.config import HIDDEN, FitConfig
from icrouting.decoder.batches import tokenize
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.scoring import option_ids, score_options
from icrouting.decoder.texts import prompts_of, whole_prompts_of
from icrouting.evaluation.predictor import Predictor
from icrouting.icr import InContextRouter
from icrouting.methods import METHODS, Settings, make
from icrouting.methods.saved import load_method, save_method
from icrouting.tasks.chat import Chat, conversation, rendered
from icrouting.tasks.prompts import behind, demonstration, few_shot, zero_shot
from icrouting.tasks.task import rows_digest
from pinned import fetch_or_skip
from test_beginnings import BOS, beginning

OPTIONS = ("negative", "positive")
# In the manner of SmolLM2 and Qwen2, with a system turn of its own where none is given.
CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|system|>\nBe good.<|end|>\n{% endif %}"
    "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
# In the manner of Llama 2: a space before the assistant's text, and no prompt for it.
SPACED = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} </s>"
    "{% else %}[INST] {{ m.content | trim }} [/INST]{% endif %}{% endfor %}"
)
OPEN_SPACE = TURNS + "{% if add_generation_prompt %}Answer: {% endif %}"
# In the manner of Gemma.
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
# In the manner of Llama 3.
DATED = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "Today: {{ date_string }}\n" + CHATML
)
# In the manner of Qwen3: the last of the assistant's turns is written otherwise.
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Says first what is asked last.
FORETELLING = "About: {{ messages[-1].content }}\n" + CHATML
TEMPLATES = {
    "chatml": CHATML,
    "spaced": SPACED,
    "open space": OPEN_SPACE,
    "no system": NO_SYSTEM,
    "dated": DATED,
    "thinking": THINKING,
}


def speaking(template=CHATML):
    """The tiny tokenizer with a chat template."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def chat_task(tokenizer=None, **changes):
    """The toy task as chats, bound to a tokenizer."""
    task = tiny.task().in_chat()
    task = dataclasses.replace(task, spec=dataclasses.replace(task.spec, **changes))
    return task.bound_to(tokenizer or speaking())


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def llama():
    return tiny.model("llama")


def test_a_prompt_is_what_the_tokenizer_itself_makes_of_the_turn():
    tokenizer = speaking()
    task = chat_task(tokenizer)
    row = task.test[0]
    question = tiny.task().prompt(row)
    assert task.question(row) == question
    assert task.prompt(row) == tokenizer.apply_chat_template(
        [user(question)], tokenize=False, add_generation_prompt=True
    )
    assert task.prompt(row).endswith("Sentiment:<|end|>\n<|assistant|>\n")


def test_the_system_turn_stands_first():
    task = chat_task(system="Judge.")
    assert task.prompt(task.test[0]).startswith("<|system|>\nJudge.<|end|>\n<|user|>\nReview:")


@pytest.mark.parametrize("name", TEMPLATES)
def test_context_and_query_are_the_rendered_whole_and_the_context_is_every_query_s(name):
    tokenizer = speaking(TEMPLATES[name])
    task = chat_task(tokenizer)
    demos = [(task, row) for row in task.train[:3]]
    prompts = [few_shot(task, row, demos) for row in task.test[:3]]
    turns = [turn for _, row in demos for turn in (user(task.question(row)), row)]
    turns = [turn if isinstance(turn, dict) else assistant(task.answer(turn)) for turn in turns]
    for prompt, row in zip(prompts, task.test[:3], strict=True):
        whole = rendered(tokenizer, [*turns, user(task.question(row))])
        assert prompt.text == whole.removesuffix(task.joint)
        assert task.question(row) in prompt.query
    assert len({prompt.context for prompt in prompts}) == 1
    assert prompts[0].context.count("Review:") == 3


def test_without_demonstrations_a_chat_has_no_context():
    task = chat_task()
    assert few_shot(task, task.test[0], []) == zero_shot(task, task.test[0])


def test_demonstrations_of_a_plain_task_are_turns_in_a_chat():
    task, plain = chat_task(), tiny.task("plain")
    prompt = few_shot(task, task.test[0], [(plain, plain.train[1])])
    assert "<|assistant|>\npositive<|end|>\n<|user|>\n" in prompt.context


def test_plain_demonstrations_read_as_they_always_did():
    task = tiny.task()
    demo, row = task.train[1], task.test[0]
    assert demonstration(task, demo) == f"{task.prompt(demo)} positive\n"
    prompt = few_shot(task, row, [(task, demo)])
    assert (prompt.context, prompt.query) == (demonstration(task, demo), task.prompt(row))
    assert behind(task, row, [("Say", "yes")]).context == "Say yes\n"
    assert prompt.joint == " "


@pytest.mark.parametrize(
    ("name", "joint"),
    [("chatml", ""), ("spaced", " "), ("open space", " "), ("dated", ""), ("thinking", "")],
)
def test_a_space_stands_before_an_answer_where_the_template_puts_one(name, joint):
    task = chat_task(speaking(TEMPLATES[name]))
    prompt = zero_shot(task, task.test[0])
    assert (task.joint, prompt.joint) == (joint, joint)
    assert not prompt.text.endswith(" ")


@pytest.mark.parametrize("name", ["chatml", "spaced", "open space"])
def test_options_are_known_by_the_token_that_goes_on_from_the_rendered_chat(name, llama):
    tokenizer = speaking(TEMPLATES[name])
    task = chat_task(tokenizer)
    prompt = zero_shot(task, task.test[0])
    scores = score_options(llama, tokenizer, [prompt], OPTIONS)
    before = tokenizer(prompt.text).input_ids
    logits = llama(torch.tensor([before])).logits[0, -1]
    for option, scored in zip(OPTIONS, scores[0], strict=True):
        after = tokenizer(f"{prompt.text}{task.joint}{option}").input_ids
        assert scored == pytest.approx(float(logits[after[len(before)]]), abs=1e-4)


def test_options_of_a_chat_begin_without_the_space(llama):
    tokenizer = speaking()
    task = chat_task(tokenizer)
    text = task.prompt(task.test[0])
    with_space = option_ids(tokenizer, text, OPTIONS)
    without = option_ids(tokenizer, text, OPTIONS, task.joint)
    assert [tokenizer.decode([token]) for token in with_space] == [" negative", " positive"]
    assert set(with_space).isdisjoint(without)


def test_a_conversation_is_scored_as_the_text_that_it_renders_to(llama):
    tokenizer = speaking()
    task = chat_task(tokenizer)
    questions = [task.question(row) for row in task.test[:3]]
    conversations = [conversation(question) for question in questions]
    prompts = [zero_shot(task, row) for row in task.test[:3]]
    from_turns = score_options(llama, tokenizer, conversations, OPTIONS)
    assert torch.equal(from_turns, score_options(llama, tokenizer, prompts, OPTIONS))


def test_texts_and_conversations_may_stand_side_by_side(llama):
    tokenizer = speaking()
    plain, chatted = "Review: dull\nSentiment:", conversation("Review: joy\nSentiment:")
    both = score_options(llama, tokenizer, [plain, chatted], OPTIONS)
    alone = [score_options(llama, tokenizer, [each], OPTIONS)[0] for each in (plain, chatted)]
    assert (both - torch.stack(alone)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        (conversation("hi"), TypeError, r"put it into a list, \[messages\]"),
        ([[{"role": "user"}]], TypeError, 'expected messages such as {"role"'),
        ([[{"role": "user", "content": ["hi"]}]], TypeError, "expected messages such as"),
        ([[user("hi"), assistant("ho")]], ValueError, "ends with the assistant's: 'ho'"),
    ],
)
def test_what_is_no_conversation_to_answer_is_refused(prompts, error, message):
    with pytest.raises(error, match=message):
        whole_prompts_of(prompts, speaking())
    with pytest.raises(error, match=message):
        prompts_of(prompts, speaking())


def test_a_tokenizer_without_a_chat_template_is_refused(llama):
    message = "this tokenizer has no chat template: .* or leave `chat` out"
    with pytest.raises(ValueError, match=message):
        tiny.task().in_chat().bound_to(tiny.tokenizer())
    with pytest.raises(ValueError, match=message):
        score_options(llama, tiny.tokenizer(), [conversation("hi")], OPTIONS)


def test_a_template_that_takes_no_system_turn_is_named():
    with pytest.raises(
        ValueError, match=r"refuses .* system, user .*not supported.* leave `system`"
    ):
        chat_task(speaking(NO_SYSTEM), system="Judge.")


def test_a_template_whose_demonstrations_depend_on_the_question_is_refused():
    task = chat_task(speaking(FORETELLING))
    with pytest.raises(ValueError, match="otherwise for one question than for another"):
        few_shot(task, task.test[0], [(task, task.train[0])])


def test_a_template_that_hides_the_question_is_refused():
    with pytest.raises(ValueError, match="does not show the user's turn"):
        chat_task(speaking("Hello.{% if add_generation_prompt %}\n{% endif %}"))


def test_a_prompt_that_names_the_day_names_the_same_one_on_every_day():
    prompt = Chat(speaking(DATED)).prompt("hi")
    assert prompt.startswith("Today: 26 Jul 2024\n")


def test_a_chat_that_is_bound_to_no_tokenizer_has_no_prompt():
    task = tiny.task().in_chat()
    with pytest.raises(ValueError, match=r"`task.bound_to\(tokenizer\)`"):
        task.prompt(task.test[0])
    with pytest.raises(ValueError, match="bound_to"):
        few_shot(task, task.test[0], [])


def test_binding_twice_is_binding_once_and_a_plain_task_is_left_as_it_is():
    tokenizer = speaking()
    task = chat_task(tokenizer)
    assert task.bound_to(tokenizer) is task
    assert task.bound_to(speaking()) is not task
    plain = tiny.task()
    assert plain.bound_to(tokenizer) is plain


def test_the_rows_digest_of_a_plain_task_is_what_it_was_before_there_were_chats():
    task = tiny.task()
    spec = task.spec
    old = (
        f"TaskSpec(name={spec.name!r}, group={spec.group!r}, template={spec.template!r}, "
        f"options={spec.options!r}, words={spec.words!r})"
    )

    def old_rows(rows):
        texts = [
            f"Example(fields={row.fields!r}, choices={row.choices!r}, label={row.label!r})"
            for row in rows
        ]
        return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"

    rows = [old_rows(part) for part in (task.train, task.validation, task.test)]
    content = f"({', '.join([old, *rows])})"
    assert rows_digest([task]) == hashlib.sha256(content.encode()).hexdigest()[:16]


def test_chats_and_system_turns_are_part_of_the_rows_digest_and_a_tokenizer_is_not():
    plain = tiny.task()
    digests = [rows_digest([task]) for task in (plain, plain.in_chat(), chat_task(system="Judge."))]
    assert len(set(digests)) == 3
    assert rows_digest([chat_task()]) == rows_digest([plain.in_chat()])


def test_a_system_turn_without_a_chat_is_refused():
    with pytest.raises(ValueError, match="system is a turn of a chat"):
        dataclasses.replace(tiny.task().spec, system="Judge.")


@pytest.mark.parametrize("is_added", [True, False], ids=["tokenizer adds", "adds none"])
@pytest.mark.parametrize("is_brought", [True, False], ids=["template brings", "brings none"])
def test_a_chat_has_one_beginning_whether_template_or_tokenizer_gives_it(is_added, is_brought):
    tokenizer = beginning(f"{BOS} $A" if is_added else "$A")
    tokenizer.chat_template = ("{{ bos_token }}" if is_brought else "") + CHATML
    task = chat_task(tokenizer)
    prompts = [zero_shot(task, task.test[0]), few_shot(task, task.test[0], [(task, task.train[0])])]
    (first,) = tokenizer(BOS, add_special_tokens=False).input_ids
    for tokens in tokenize(tokenizer, [prompt.text for prompt in prompts]):
        assert tokens.count(first) == int(is_added or is_brought)
        assert (tokens[0] == first) is (is_added or is_brought)


# A router of chats.
CONFIG = FitConfig(
    (3, 4),
    rank=2,
    n_prompts=8,
    n_queries=8,
    epochs=1,
    min_steps=0,
    patience=0,
    demos_per_class=1,
    encoder=HIDDEN,
)


@pytest.fixture(scope="module")
def icr(llama):
    return InContextRouter.fit(llama, speaking(), [tiny.task().in_chat()], CONFIG)


def test_a_fit_reads_the_rendered_chats(icr, llama):
    plain = InContextRouter.fit(llama, speaking(), [tiny.task()], CONFIG)
    again = InContextRouter.fit(llama, speaking(), [chat_task()], CONFIG)
    assert icr.digest() == again.digest() != plain.digest()
    assert icr.description.rows != plain.description.rows


def test_a_saved_router_knows_that_its_sources_are_chats(icr, tmp_path):
    icr.save_pretrained(tmp_path)
    (toy,) = InContextRouter.from_pretrained(tmp_path).description.sources
    assert (toy.chat, toy.system, toy.template) == (True, "", tiny.task().spec.template)
    assert toy.n_lines == 2
    card = (tmp_path / "README.md").read_text()
    assert f"routed.score([[{user(toy.example)!r}]], ['negative', 'positive'])" in card
    assert "as a user's turn of a chat" in card


def test_a_saved_method_of_chats_is_for_the_template_that_worded_them(llama, tmp_path):
    (probe,) = make(["probe-hidden"], Settings(**SMALL))
    task = chat_task()
    save_method(fit_method(probe, llama, speaking(), [task]).on(task), tmp_path / "chats")
    assert load_method(tmp_path / "chats", llama, speaking()).sources[0].spec.chat
    with pytest.raises(ValueError, match="another chat template"):
        load_method(tmp_path / "chats", llama, speaking(DATED))
    # Without chats the template says nothing, and the file is the one it always was.
    (plain,) = make(["probe-hidden"], Settings(**SMALL))
    toy = tiny.task()
    save_method(fit_method(plain, llama, speaking(), [toy]).on(toy), tmp_path / "plain")
    load_method(tmp_path / "plain", llama, speaking(DATED))
    assert "chat_template" not in json.loads((tmp_path / "plain" / "method.json").read_text())


def test_a_router_without_chats_writes_the_file_that_it_always_wrote(saved_router):
    (source,) = json.loads((saved_router / "config.json").read_text())["sources"]
    assert "chat" not in source
    assert "system" not in source


def warned_of(icr, llama, prompts, tokenizer=None):
    """The warnings of a prompt's form that one attachment gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with icr.attached(llama, tokenizer or speaking()) as routed:
            routed.score(prompts, OPTIONS)
    messages = [str(warning.message) for warning in caught]
    return [message for message in messages if "form of none" in message]


def test_a_router_of_chats_does_not_warn_of_its_own_prompts(icr, llama):
    questions = [tiny.task().prompt(row) for row in tiny.task().test]
    assert warned_of(icr, llama, [conversation(question) for question in questions]) == []


def test_a_router_of_chats_warns_of_another_chat_template(icr, llama, tmp_path):
    icr.save_pretrained(tmp_path)
    loaded = InContextRouter.from_pretrained(tmp_path)
    assert loaded == icr
    said = pytest.warns(UserWarning, match="chat template is another one")
    with said, loaded.attached(llama, speaking(SPACED)):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with loaded.attached(llama, speaking()):
            pass
    # An earlier version kept no template.
    unsaid = dataclasses.replace(icr.description, chat_template=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with dataclasses.replace(icr, description=unsaid).attached(llama, speaking(SPACED)):
            pass


def test_a_router_of_chats_warns_of_the_same_text_without_the_chat(icr, llama):
    question = tiny.task().prompt(tiny.task().test[0])
    (message,) = warned_of(icr, llama, [question])
    assert "as a user's turn of a chat" in message


@pytest.mark.parametrize(
    "messages",
    [
        conversation("Is it good?\nReview: joy\nSentiment:"),
        conversation("Review: joy\nSentiment:", system="Judge."),
        conversation("Review: joy\nSentiment:", turns=[("Review: dull\nSentiment:", "negative")]),
    ],
    ids=["another text", "another system turn", "demonstrations"],
)
def test_a_router_of_chats_warns_of_other_chats(messages, icr, llama):
    assert len(warned_of(icr, llama, [messages])) == 1


def test_a_long_chat_is_known_by_its_ends(icr, llama):
    text = " ".join(f"joy {number}" for number in range(60))
    assert warned_of(icr, llama, [conversation(f"Review: {text}\nSentiment:")]) == []
    assert len(warned_of(icr, llama, [f"Review: {text}\nSentiment:"])) == 1


def test_a_chat_is_known_whichever_day_its_template_names(llama):
    dated = speaking(DATED)
    icr = InContextRouter.fit(llama, dated, [tiny.task().in_chat()], CONFIG)
    messages = conversation("Review: joy\nSentiment:")
    for text in (rendered(dated, messages), rendered(dated, messages, today=True)):
        assert warned_of(icr, llama, [text], dated) == []


def test_routing_and_effect_take_conversations(icr, llama):
    tokenizer = speaking()
    question = tiny.task().prompt(tiny.task().test[0])
    messages = conversation(question)
    text = rendered(tokenizer, messages)
    with icr.attached(llama, tokenizer) as routed:
        assert routed.routing([messages]) == routed.routing([text])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert routed.effect([messages]) == routed.effect([text])


def test_a_fit_does_not_go_on_with_another_chat_template(llama, tmp_path, caplog):
    task = tiny.task().in_chat()
    InContextRouter.fit(llama, speaking(), [task], CONFIG, folder=tmp_path)
    InContextRouter.fit(llama, speaking(THINKING), [task], CONFIG, folder=tmp_path)
    assert "chat_template was" in caplog.text
    assert "it is set aside" in caplog.text
    assert (tmp_path / "former-1" / "training.safetensors").exists()


PROMPTING = ("zero-shot", "few-shot", "multi-task-few-shot", "calibration")


def answers_of(name, model, tokenizer, task, encoder_folder, **settings):
    asked = Settings(**SMALL | {"demos_per_class": 1, "encoder": str(encoder_folder), **settings})
    (method,) = make([name], asked)
    fit_method(method, model, tokenizer, [task])
    predictor = Predictor(Decoder.of(model, tokenizer))
    return predictor.predict(method, task.bound_to(tokenizer), range(3), 0)


@pytest.mark.parametrize("name", PROMPTING)
def test_methods_that_prompt_score_the_rendered_chat(name, llama, encoder_folder):
    tokenizer = strict(speaking())
    task = tiny.task().in_chat()
    records = answers_of(name, llama, tokenizer, task, encoder_folder)
    plain = answers_of(name, llama, tiny.tokenizer(), tiny.task(), encoder_folder)
    assert all(np.isfinite(record.option_logits).all() for record in records)
    for chat, bare in zip(records, plain, strict=True):
        assert chat.n_tokens > bare.n_tokens
        assert chat.option_logits != bare.option_logits


def strict(tokenizer):
    """The tokenizer, which refuses a text with an answer behind a space."""

    class Strict(type(tokenizer)):
        def __call__(self, text, *args, **kwargs):
            for each in [text] if isinstance(text, str) else text:
                assert "<|assistant|>\n " not in each
                assert "Sentiment: " not in each
            return super().__call__(text, *args, **kwargs)

    tokenizer.__class__ = Strict
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(METHODS) - set(PROMPTING)))
def test_every_method_answers_chats_and_reads_no_answer_behind_a_space(
    name, llama, icr, encoder_folder, tmp_path
):
    fitted.strict(icr).save_pretrained(tmp_path / "router")
    tokenizer = strict(speaking())
    task = chat_task(tokenizer)
    records = answers_of(
        name, llama, tokenizer, task, encoder_folder, router=str(tmp_path / "router")
    )
    assert len(records) == 3
    assert all(np.isfinite(record.option_logits).all() for record in records)


@pytest.mark.pinned
def test_the_pinned_model_s_own_template_is_used_with_one_beginning():
    fetch_or_skip("smollm2-135m")
    from icrouting.decoder.loading import load_skeleton

    _, tokenizer = load_skeleton("pinned:smollm2-135m")
    task = chat_task(tokenizer)
    row = task.test[0]
    prompt = few_shot(task, row, [(task, demo) for demo in task.train[:2]])
    assert prompt.text.count("<|im_start|>") == 1 + 4 + 2
    assert prompt.text.endswith("Sentiment:<|im_end|>\n<|im_start|>assistant\n")
    (tokens,) = tokenize(tokenizer, [prompt.text])
    assert tokens.count(tokenizer.bos_token_id) == 7
    words = [tokenizer.decode([token]) for token in option_ids(tokenizer, prompt.text, OPTIONS, "")]
    assert words == ["negative", "positive"]
