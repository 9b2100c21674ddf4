"""The page: every part's pictures with a sentence each, no scripts, nothing fetched."""

from collections.abc import Sequence

from icrouting.analysing.config import PARTS
from icrouting.analysing.run import AnalysisFolder, Finding
from icrouting.analysing.study import Study
from icrouting.runtime.pages import counted, render


def notes(study: Study) -> list[str]:
    """Returns what limits the figures, a sentence each."""
    lines = []
    n_items = {task: len(study.rows_of(task)) for task in study.tasks}
    few = [f"{task} has {n}" for task, n in n_items.items() if n < study.config.n_test]
    if few:
        lines.append(f"Fewer test rows than were asked for: {', '.join(few)}.")
    mixed = {item.task for item in study.items if item.option_ids is None}
    if mixed:
        names = ", ".join(task for task in study.tasks if task in mixed)
        lines.append(
            f"Options that share their first token are not told apart here, so that accuracy and "
            f"what is of options are missing for {names}."
        )
    if len(study.tasks) == 1:
        lines.append("One task alone: what is said of tasks together is said of it.")
    if all(study.is_seen(task) for task in study.tasks):
        lines.append(
            "The router was fitted on all of these tasks: name others with --tasks to see what "
            "it does on unseen ones."
        )
    if not study.routing.routing_vector.any():
        lines.append(
            "This router's routing vector is 0 on all prompts: it changes nothing, as an "
            "untrained router does."
        )
    return lines


def html(study: Study, findings: Sequence[Finding], folder: AnalysisFolder, about: str) -> str:
    """Returns the page.

    Args:
        study: what was analysed.
        findings: the parts that it shows.
        folder: where their tables lie, beside the page.
        about: names model and router.
    """
    sections = []
    for finding in findings:
        files = [folder.table(finding.name, name).name for name in finding.tables]
        sections.append({"finding": finding, "files": files})
    unseen = [task for task in study.tasks if not study.is_seen(task)]
    return render(
        "analysing/templates/analysis.html.j2",
        {"counted": counted},
        study=study,
        about=about,
        sections=sections,
        says=PARTS,
        notes=notes(study),
        seen=[task for task in study.tasks if task not in unseen],
        unseen=unseen,
    )
