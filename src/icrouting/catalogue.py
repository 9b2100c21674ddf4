"""The known tasks as data: the paper's twelve (table 6) and the two far tasks of the offline demo."""

from icrouting.tasks import TaskSpec, near_matches

_SENTIMENT = ("negative", "positive")

_SPECS = (
    TaskSpec("agnews", "in-domain", "News: {text}\nType:", ("World", "Sports", "Business", "Technology")),
    TaskSpec("sst2", "in-domain", "Review: {text}\nSentiment:", _SENTIMENT),
    TaskSpec(
        "trec",
        "in-domain",
        "Question: {text}\nAnswer Type:",
        ("Abbreviation", "Entity", "Description", "Person", "Location", "Number"),
    ),
    TaskSpec("csqa", "in-domain", "Question: {question}\n{choices}\nAnswer ({letters}):"),
    TaskSpec("piqa", "in-domain", "Goal: {question}\n{choices}\nAnswer ({letters}):"),
    TaskSpec(
        "sst5",
        "near",
        "Sentence: {text}\nSentiment:",
        ("terrible", "negative", "neutral", "positive", "great"),
    ),
    TaskSpec("mr", "near", "Review: {text}\nSentiment:", _SENTIMENT),
    TaskSpec(
        "mrpc",
        "near",
        "Sentence 1: {text1}\nSentence 2: {text2}\nA. Paraphrase\nB. Not paraphrase\nAnswer (A/B):",
        ("B", "A"),
    ),
    TaskSpec(
        "cb",
        "far",
        "Premise: {premise}\nHypothesis: {hypothesis}\nA. Entailment\nB. Contradiction\nC. Neutral\nAnswer (A/B/C):",
        ("A", "B", "C"),
    ),
    TaskSpec(
        "copa",
        "far",
        "Context: {question}\n{relation}\n{choices}\nAnswer ({letters}):",
        words={
            "relation": {
                "cause": "What was the cause of this?",
                "effect": "What happened as a result?",
            }
        },
    ),
    TaskSpec("creak", "far", "Claim: {text}\nLabel:", ("no", "yes")),
    TaskSpec("ai2scie", "far", "Question: {question}\n{choices}\nAnswer ({letters}):"),
    TaskSpec("subj", "far", "Sentence: {text}\nLabel:", ("objective", "subjective")),
    TaskSpec("emotion", "far", "Tweet: {text}\nEmotion:", ("anger", "joy", "optimism", "sadness")),
)

SPECS = {spec.name: spec for spec in _SPECS}
PAPER_TASKS = tuple(spec.name for spec in _SPECS[:12])


def find(name: str) -> TaskSpec:
    """Returns the spec of a catalogue task; ValueError with near matches if there is none."""
    if name not in SPECS:
        raise ValueError(f"unknown task {name!r}: {near_matches(name, list(SPECS))}")
    return SPECS[name]
