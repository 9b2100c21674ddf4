"""A run: what it measures, and the claim on the folder that holds it."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from icrouting.evaluation import records
from icrouting.evaluation.config import EvalConfig
from icrouting.evaluation.folder import RunFolder
from icrouting.methods.registry import cuts_of
from icrouting.methods.settings import Settings
from icrouting.runtime.checks import check, differences
from icrouting.runtime.locks import locked
from icrouting.runtime.pages import counted
from icrouting.runtime.processes import agree, first_one_first, is_first
from icrouting.tasks.task import Task

# What a run may take more of when it is resumed; all else makes it the same measurement.
_GROWING = (
    *("methods", "seeds", "n_test", "router", "routers", "notes"),
    *("skip_nan", "token_budget", "prompts"),
)
# What every run writes, those of the first version too.
_WRITTEN = ("command", "methods", "seeds", "n_test", "router", "notes")
# What is written of chats alone, so that a run without the words had none.
_UNLESS_CHAT = ("chat", "chat_template")
# What the paper takes; a run of less says so.
PAPER_SEEDS = 3
PAPER_TEST_ITEMS = 500


@dataclass(frozen=True)
class RunConfig:
    """What a run measures: what was asked for, and what that turned out to be.

    Attributes:
        asked: the user's part.
        fingerprint: the model's.
        dtype: the weights'.
        rows: the digest of the rows of tasks and sources.
        task_rows: that of the tasks' alone; the same where no method reads the sources' rows.
        router: the digest of the router; None without one.
        tasks: name, group, role ("source" or "unseen"), options and number of test rows of each.
        sources: names of the source tasks.
        notes: what was cut short, beside what the settings say.
        chat_template: the digest of the tokenizer's chat template; None where no task is a chat.
        routers: what identifies each router that has a name of its own, by that name.
        prompts: the digests of the tasks' own prompts that are asked, by task and method, and of
            the chat template of those that are chats where their task is none.
    """

    asked: EvalConfig
    fingerprint: str
    dtype: str
    rows: str
    task_rows: str
    router: str | None
    tasks: Annotated[list[dict[str, Any]], Field(min_length=1)]
    sources: list[str]
    notes: list[str]
    chat_template: str | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    routers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        check(self)

    def flat(self) -> dict[str, Any]:
        """The content of config.json, with the methods' settings beside the others."""
        asked = self.asked
        # The settings' "router" is where it lies; the digest, in its place, is what it is.
        return {
            **asdict(asked.settings),
            "model": str(asked.model),
            "fingerprint": self.fingerprint,
            "dtype": self.dtype,
            "data": asked.data,
            "rows": self.rows,
            "task_rows": self.task_rows,
            "router": self.router,
            "methods": _unique(asked.columns),
            "tasks": self.tasks,
            "sources": self.sources,
            "seeds": _unique(asked.seeds),
            "n_test": asked.n_test,
            "skip_nan": asked.skip_nan,
            "token_budget": asked.token_budget,
            "notes": self.notes,
            **self._of_some_runs(),
        }

    def _of_some_runs(self) -> dict[str, Any]:
        """What runs of earlier versions lack, where it is not as theirs was."""
        content: dict[str, Any] = {}
        if self.asked.chat:
            content["chat"] = True
        if self.chat_template is not None:
            content["chat_template"] = self.chat_template
        if self.prompts:
            content["prompts"] = self.prompts
        if self.routers:
            content["routers"] = self.routers
        return content


def task_entries(tasks: Sequence[Task], sources: Sequence[str]) -> list[dict[str, Any]]:
    """Returns what a run's configuration says of its tasks."""
    entries = []
    for task in tasks:
        # Where rows have choices of their own, the letters of the row with most of them.
        options = max((task.options(example) for example in task.test), key=len)
        entry = {
            "name": task.name,
            "group": task.spec.group,
            "role": "source" if task.name in sources else "unseen",
            "n_options": len(options),
            "options": list(options),
            "n_test_rows": len(task.test),
        }
        entries.append(entry)
    return entries


@contextmanager
def claimed(folder: RunFolder, config: RunConfig) -> Iterator[None]:
    """Inside, a folder is one run's alone, made or taken up where its processes left it.

    They may have been more or fewer.
    """
    agree(**config.flat())
    with locked(folder.path):
        with first_one_first():
            if is_first():
                claim(folder, config)
                records.gather(folder.records)
        yield


def claim(folder: RunFolder, config: RunConfig) -> None:
    """Writes a run's configuration, or checks that the run begun in the folder measures the same.

    Methods, with the router of one, seeds and test items may be added to a run; their records join
    the others.
    """
    wanted = config.flat()
    if folder.config.exists():
        begun = folder.read_config()
    else:
        begun = _new(wanted)
    missing = set(_WRITTEN) - begun.keys()
    if missing:
        lacking = ", ".join(sorted(missing))
        raise ValueError(
            f"{folder.config} is no run's, it lacks {lacking}: choose another folder with --out"
        )
    begun = {**begun, "tasks": _whole_entries(begun.get("tasks", []), wanted["tasks"])}
    changes = _changes(begun, wanted)
    # Where nothing was computed, nothing binds.
    if changes and folder.is_bare():
        begun = _new(wanted)
        changes = []
    if changes:
        raise ValueError(
            f"{folder} holds another run ({'; '.join(changes)}): choose another folder with --out"
            f"{_advice(begun, wanted)}"
        )
    grown = {
        "methods": _unique([*begun["methods"], *wanted["methods"]]),
        "seeds": _unique([*begun["seeds"], *wanted["seeds"]]),
        "n_test": wanted["n_test"],
        "router": begun["router"] or wanted["router"],  # the same, or one of them None
        "skip_nan": begun.get("skip_nan", False) or wanted["skip_nan"],
        "token_budget": wanted["token_budget"],
        "rows": begun["rows"] if _reads_sources(begun) else wanted["rows"],
    }
    prompts = _prompts_of(begun) | _prompts_of(wanted)
    if prompts:
        grown["prompts"] = prompts
    routers = _routers_of(begun) | _routers_of(wanted)
    if routers:
        grown["routers"] = routers
    if command() not in begun["command"]:
        grown["command"] = f"{begun['command']} && {command()}"
    content = {**wanted, **begun, **grown}
    cuts = _cuts(content, config.asked.settings)
    folder.write_config({**content, "notes": [*cuts, *wanted["notes"]]})


def _whole_entries(
    begun: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A begun run's tasks, with what an earlier version did not write of them."""
    wanted_by_name = {entry["name"]: entry for entry in wanted}
    return [{**wanted_by_name.get(entry["name"], {}), **entry} for entry in begun]


def _new(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run that begins here and now."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {**wanted, "command": command(), "commit": commit(), "created": created}


def _changes(begun: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What makes a run another measurement than the one begun in its folder, in words."""
    held = {key: value for key, value in wanted.items() if key not in _GROWING}
    routers = {begun["router"], wanted["router"]}
    if len(routers - {None}) > 1:
        held["router"] = wanted["router"]
    elif len(routers) > 1:
        # Without a router, its controls are fitted by the default settings, with one as it was.
        unrouted = wanted if wanted["router"] is None else begun
        if any("icr-" in name for name in unrouted["methods"]):
            held["router"] = wanted["router"]
    # The sources' rows come with the first method that reads them.
    both_read_sources = _reads_sources(begun) and _reads_sources(wanted)
    if begun.get("task_rows") == wanted["task_rows"] and not both_read_sources:
        del held["rows"]
    if wanted["n_test"] < begun["n_test"]:
        held["n_test"] = wanted["n_test"]
    for name in _UNLESS_CHAT:
        held[name] = wanted.get(name)
        begun = {name: None, **begun}
    # A prompt may join the others, but not change under its name.
    begun_prompts = _prompts_of(begun)
    changed_prompts = []
    for name, digest in _prompts_of(wanted).items():
        if begun_prompts.get(name, digest) != digest:
            changed_prompts.append(f"the text of {name} was another")
    # What an earlier version did not write down is taken to be as it is.
    changes = differences({**held, **begun}, held, _short) + changed_prompts
    return changes + _changed_routers(begun, wanted)


def _changed_routers(begun: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Names that another router stands behind than before, in words."""
    begun_routers = _routers_of(begun)
    changes = []
    for name, router in _routers_of(wanted).items():
        begun_router = begun_routers.get(name, router)
        if begun_router != router:
            changes.append(f"{name} was router {begun_router}, is {router}")
        # Records know a method by its name alone.
        elif name in begun["methods"] and name not in begun_routers:
            changes.append(f"{name} was a method, is router {router}")
    return changes


def _routers_of(config: Mapping[str, Any]) -> dict[str, str]:
    """What identifies the named routers in a run's configuration."""
    return dict(config.get("routers", {}))


def _prompts_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The digests of the tasks' own prompts in a run's configuration."""
    return dict(config.get("prompts", {}))


def _reads_sources(config: Mapping[str, Any]) -> bool:
    """Whether the rows of a run are more than its tasks'."""
    # Earlier versions always read the sources.
    return config["rows"] != config.get("task_rows")


def _advice(begun: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What else helps where a run does not go on."""
    if "task_rows" in begun or _reads_sources(wanted) or "sources" not in begun:
        return ""
    return (
        f", or read the sources' rows as that run did, with --sources {' '.join(begun['sources'])}"
    )


def _cuts(content: Mapping[str, Any], settings: Settings) -> list[str]:
    """What a run takes less of than was published, or than is usual here."""
    n_seeds = len(content["seeds"])
    # No task may have as many rows as were asked for.
    n_rows = [task.get("n_test_rows", content["n_test"]) for task in content["tasks"]]
    n_test = min(content["n_test"], max(n_rows))
    cuts = []
    if n_seeds < PAPER_SEEDS or n_test < PAPER_TEST_ITEMS:
        taken = f"{counted(n_seeds, 'seed')}, {counted(n_test, 'test item')} a task at most"
        cuts.append(f"{taken} (paper: {PAPER_SEEDS}, {PAPER_TEST_ITEMS}).")
    cuts += cuts_of(content["methods"], settings)
    usual = Settings()
    smaller = []
    for name in ("tries", "train_rows", "train_epochs"):
        value = getattr(settings, name)
        usual_value = getattr(usual, name)
        if value < usual_value:
            smaller.append(f"{name} {value} (usual: {usual_value})")
    if smaller:
        held_to = ", ".join(smaller)
        cuts.append(f"Methods that learn are held to less, where they would take more: {held_to}.")
    return cuts


def _unique(values: Sequence[Any]) -> list[Any]:
    """The values in their order, each once."""
    return list(dict.fromkeys(values))


def command() -> str:
    """The command line that runs, as the files that it makes name it."""
    program = Path(sys.argv[0])
    is_module = (program.parent.name, program.name) == ("cli", "__main__.py")
    return " ".join(["icr" if is_module else program.name, *sys.argv[1:]])


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 77 else f"{text[:77]}..."


def commit() -> str:
    """The commit of the working tree that runs, or "unknown" outside one."""
    # An installed copy may lie in somebody else's repository, whose commit says nothing of ours.
    here = Path(__file__)
    is_tracked = ["git", "ls-files", "--error-unmatch", here.name]
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        subprocess.run(is_tracked, cwd=here.parent, capture_output=True, check=True)
        described = subprocess.run(
            describe, cwd=here.parent, capture_output=True, check=True, text=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()
