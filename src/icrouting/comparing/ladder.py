"""Ladder: the methods of a comparison in order of cost, and what each cannot do."""

from collections.abc import Sequence

from icrouting.evaluation.records import BASELINE
from icrouting.methods.named_prompts import PREFIX
from icrouting.routing.features import sentence_encoder
from icrouting.tasks.task import Task

ICR = "icr"
FEW_SHOT = "few-shot"
# From what a prompt takes and what lies beside the model, up. Of the vectors, the two that gained
# most where they were fitted on each task (docs/who-wins.md) and need no encoder; of LoRA, the arm
# that trains on all rows, as the others here do.
LADDER = (
    *(BASELINE, "calibration", "batch-calibration", FEW_SHOT, "probe-encoder", "probe-hidden"),
    "probe-residual",
    *("task-vectors", "i2cl", ICR, "prefix-tuning", "lora-block-more"),
)

_THIS_TASK = "made for this task's prompts alone"
_LABELS_ONLY = "answers with this task's labels alone, cannot generate, a new label is a new fit"
_SCORES_ALONE = "corrects the scores of options, so it changes no generated text"
# What the answer tells of a method, as the end of "it ...".
LIMITS = {
    BASELINE: "learns nothing from your rows",
    "calibration": _SCORES_ALONE,
    "batch-calibration": _SCORES_ALONE,
    FEW_SHOT: "shows the model a handful of your rows and lengthens every prompt by them",
    "probe-encoder": _LABELS_ONLY,
    "probe-hidden": _LABELS_ONLY,
    "probe-residual": _LABELS_ONLY,
    "task-vectors": f"is {_THIS_TASK}",
    "i2cl": f"is {_THIS_TASK} and edits every token",
    ICR: "is not shown to help tasks that it was not fitted on",
    "prefix-tuning": f"is {_THIS_TASK} and takes room in the context",
    "lora-block-more": f"is another model while attached, since it changes weights, {_THIS_TASK}",
}
_ENCODER_LIMIT = "needs a sentence encoder beside the model"
_OWN_PROMPT_LIMIT = "learns nothing from your rows beyond what stands in it"
_UNKNOWN_LIMIT = "was asked for by name: docs/rivals.md says what it is"


def ladder(task: Task, asked: Sequence[str] = ()) -> list[str]:
    """Returns the names of the methods to compare on a task, in order of cost.

    Args:
        task: what is compared on.
        asked: names to take in place of all; what is not on the ladder comes last, and the
            baseline, which all are held against, first in any case.
    """
    names = list(LADDER)
    # A prompt of the user's own is as long as a few-shot one.
    place = names.index(FEW_SHOT)
    names[place:place] = own_prompts(task)
    if not asked:
        return names
    others = [name for name in dict.fromkeys(asked) if name not in names]
    return [*(name for name in names if name == BASELINE or name in asked), *others]


def own_prompts(task: Task) -> list[str]:
    """Returns the names of the methods that ask a task's own named prompts."""
    return [PREFIX + prompt.name for prompt in task.spec.prompts]


def limit_of(method: str, encoder: str) -> str:
    """Returns what a method cannot do, as the end of a sentence that begins with "it".

    Args:
        method: its name.
        encoder: what the router reads, as `FitConfig.encoder` names it.
    """
    if method.startswith(PREFIX):
        return _OWN_PROMPT_LIMIT
    if method == ICR and sentence_encoder(encoder) is not None:
        return f"{LIMITS[ICR]}, and {_ENCODER_LIMIT}"
    return LIMITS.get(method, _UNKNOWN_LIMIT)
