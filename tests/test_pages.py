"""What the pages name in backticks, and what they link, is there: names, files, options."""

import io
import re
import tokenize
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("src", "benchmarks", "tests", "docs")
FILE = re.compile(r"[\w./*<>-]*\w\.(?:csv|html|j2|jsonl?|md|py|sh|svg|toml|txt|ya?ml)\b")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
NAME = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")

# Names that our code has no use for.
FOREIGN = {
    # lm-evaluation-harness: a metric that RoutedLM does not offer
    "acc_mutual_info",
    # symbols of formulas
    "k_hi",
    "k_lo",
    "q_hi",
    "q_lo",
    "γ_h",  # noqa: RUF001
    # transformers: tensor parallelism, which is refused
    "tp_plan",
}


def names_by_file():
    """The names in each of our Python files, those in its strings too."""
    names = {}
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            if file == Path(__file__):  # which names what is nowhere else
                continue
            here = {file.stem, file.parent.name}
            source = io.StringIO(file.read_text(encoding="utf-8"))
            for token in tokenize.generate_tokens(source.readline):
                if token.type == tokenize.NAME:
                    here.add(token.string)
                elif token.type == tokenize.STRING:
                    here.update(re.findall(r"--[\w-]+|[\w.-]+\.\w+|\w+", token.string))
            names[file] = here
    return names


NAMES = names_by_file()
KNOWN = set.union(*NAMES.values())
FILES = [
    path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")
]
FILES += [path.name for path in ROOT.iterdir()]


def spans(page):
    """The backticked spans of a page that are outside its blocks of code."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", text)


def is_option(option):
    """Whether an option is written out in our code, or is a field of a command's settings."""
    return option in KNOWN or option.removeprefix("--").replace("-", "_") in KNOWN


def is_file(name):
    """Whether a file is in the repository, or is data whose name our code writes or reads."""
    pattern = re.sub(r"<\w+>", "*", name)
    if any(fnmatch(f"/{file}", f"*/{pattern}") for file in FILES):
        return True
    return not name.endswith((".py", ".md", ".sh")) and name.rpartition("/")[2] in KNOWN


def looks_like_ours(name):
    """Whether a name is snake_case, CamelCase or dotted; plain words are no names."""
    return "_" in name or "." in name or re.search(r"[a-z][A-Z]", name) is not None


def is_name(name):
    """Whether all parts of a name are in our code, and those of a module in that module."""
    parts = name.split(".")
    modules = [file for file in NAMES if file.stem == parts[0]]
    if len(parts) > 1 and modules and not any(parts[-1] in NAMES[file] for file in modules):
        return False
    return all(part in KNOWN for part in parts)


def stale_names(span):
    """What a span names that looks like ours and is nowhere."""
    options = OPTION.findall(span)
    rest = OPTION.sub(" ", span)
    files = FILE.findall(rest)
    names = [name for name in NAME.findall(FILE.sub(" ", rest)) if looks_like_ours(name)]
    return [
        *(option for option in options if not is_option(option)),
        *(file for file in files if not is_file(file)),
        *(name for name in names if name not in FOREIGN and not is_name(name)),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_in_backticks_is_in_the_code(page):
    stale = {span: stale_names(span) for span in spans(page)}
    assert not {span: names for span, names in stale.items() if names}


@pytest.mark.parametrize("span", ["`gone_with_the_wind`", "`nothing.py`", "`--no-such-option`"])
def test_a_name_that_is_nowhere_is_told(span):
    assert stale_names(span.strip("`"))


def test_no_foreign_name_is_listed_in_vain():
    assert not FOREIGN & KNOWN
    named = {name for page in PAGES for span in spans(page) for name in NAME.findall(span)}
    assert named >= FOREIGN


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_place_that_a_page_links_exists(page):
    places = re.findall(r"\]\(((?!http)[^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert not [place for place in places if not (page.parent / place).exists()]
