"""How easily pages read, in figures: words, words a sentence, numbers per 100 words.

Run it as `python -m benchmarks.prose [PAGE ...] [--json FILE]`; without a page it takes the
README and all of docs/.

What is counted:

- prose is what stands outside fenced code, tables, headings, comments and the addresses of links;
- a sentence ends with its full stop, or where its paragraph or its item of a list ends;
- a number is written in figures and is no part of a name: "16.3" is one, "SmolLM2-135M" is none;
- what stands in backticks is one word and no number.
"""

import argparse
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The most that a page may have which is not for researchers.
MOST_WORDS_A_SENTENCE = 22
MOST_NUMBERS = 6
# The research pages: tables with what was done, each figure with its interval.
RESEARCH = {
    "docs/ablations.md",
    "docs/precision.md",
    "docs/results.md",
    "docs/speed.md",
    "docs/who-wins-details.md",
}

NOT_PROSE = re.compile(r"^```.*?^```|<!--.*?-->|^\|.*?$|^#+ .*?$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`[^`]*`")
LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
TAG = re.compile(r"<[^>]+>")
BLOCK_START = re.compile(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) |\A\s*(?:[-*]|\d+\.) ")
SENTENCE_END = re.compile(r"(?<=[.!?])[)\"'*]*\s+(?=[^a-z\s])")
WORD = re.compile(r"\w(?:[\w.,'/%-]*\w)?")
NUMBER = re.compile(r"(?<![\w./-])\d(?:[\d.,]*\d)?(?![\w-])")


@dataclass(frozen=True)
class Prose:
    """The figures of a page.

    Attributes:
        words: the words of its prose.
        words_a_sentence: their mean number in a sentence.
        longest: the words of its longest sentence.
        numbers_per_100_words: how thick figures stand in it.
    """

    words: int
    words_a_sentence: float
    longest: int
    numbers_per_100_words: float


def sentences(text: str) -> list[str]:
    """Returns the sentences of a page's prose, with names in backticks as one word each."""
    text = LINK.sub(r"\1", NOT_PROSE.sub("\n\n", text).replace("![", "["))
    text = TAG.sub("", CODE.sub("Code", text)).replace("*", "")
    ends = []
    for block in BLOCK_START.split(text):
        ends += SENTENCE_END.split(block.strip())
    return [sentence for sentence in ends if WORD.search(sentence)]


def measured(text: str) -> Prose:
    """Returns the figures of a page's text."""
    lengths = []
    n_numbers = 0
    for sentence in sentences(text):
        lengths.append(len(WORD.findall(sentence)))
        n_numbers += len(NUMBER.findall(sentence))
    n_words = sum(lengths)
    return Prose(
        words=n_words,
        words_a_sentence=round(n_words / max(len(lengths), 1), 1),
        longest=max(lengths, default=0),
        numbers_per_100_words=round(100 * n_numbers / max(n_words, 1), 1),
    )


def held() -> list[Path]:
    """Returns the pages that are held to the most words and numbers."""
    return [
        page for page in pages() if name_of(page) not in RESEARCH and page.parent.name != "results"
    ]


def pages() -> list[Path]:
    """Returns the README and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    """Returns a page's path from the root of the repository, or as it was given."""
    page = page.resolve()
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else str(page)


def main(arguments: list[str] | None = None) -> None:
    """Prints a line a page, and writes the figures where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--json", type=Path, help="a file for the figures")
    given = parser.parse_args(arguments)
    figures = {}
    print(f"{'page':32}{'words':>8}{'a sentence':>12}{'longest':>9}{'numbers per 100':>17}")
    for page in given.pages or pages():
        prose = measured(page.read_text(encoding="utf-8"))
        figures[name_of(page)] = asdict(prose)
        print(
            f"{name_of(page):32}{prose.words:8}{prose.words_a_sentence:12}"
            f"{prose.longest:9}{prose.numbers_per_100_words:17}"
        )
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
