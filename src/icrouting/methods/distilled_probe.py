"""A distilled probe: few-shot answers to unlabelled prompts, learned for zero-shot length."""

import numpy as np

from icrouting.decoder.scoring import score
from icrouting.methods.residual_probe import Lesson, ProbeResidual
from icrouting.tasks.prompts import balanced_demos, few_shot
from icrouting.tasks.task import Task


class ProbeDistilled(ProbeResidual):
    """`probe-residual`, fitted to what few-shot prompts answer (not in the paper).

    Demonstrations are drawn once, and only their labels are read. The model answers up to
    `--train-rows` further training rows behind them; the correction is fitted to its probabilities
    of the options, by their cross-entropy, and takes no label of these rows. So a few labels and
    some prompts without labels give what few-shot prompts know, at zero-shot length: where these
    are wrong, so is the probe.
    """

    name = "probe-distilled"

    def lesson(self, task: Task, rng: np.random.Generator) -> Lesson:
        """Returns rows without their labels, with the probabilities that few-shot prompts give."""
        demos = balanced_demos(task, self.settings.demos_per_class, rng)
        turns = [(task, demo) for demo in demos]
        order = rng.permutation(len(task.train))
        # Behind itself, a prompt would have its answer before it.
        others = [task.train[place] for place in order if task.train[place] not in demos]
        rows = others[: self.settings.train_rows]
        if not rows:
            raise ValueError(
                f"{self.name} learns from rows beside its {len(demos)} demonstrations, and "
                f"{task.name!r} has none: give more rows (labels are not read), or fewer "
                "--demos-per-class"
            )
        prompts = [few_shot(task, row, turns) for row in rows]
        options = [task.options(row) for row in rows]
        scores = score(self.decoder, prompts, options, label_scoring=task.spec.label_scoring)
        shares = scores.double().softmax(1).numpy()
        return Lesson(rows, shares, len(demos))
