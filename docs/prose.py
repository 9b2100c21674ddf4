"""Measures the prose of the pages: words, words a sentence, numbers per 100 words.

python docs/prose.py

Code, tables, headings and links' addresses do not count. The test that asks it is in
tests/test_pages.py; pages of research, which exist for their numbers, are exempt.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Means over a page.
MOST_WORDS_A_SENTENCE = 22.0
MOST_NUMBERS = 6.0
# Runs, their details and the log are read for their numbers.
EXEMPT = ("results.md", "who-wins-details.md", "ablations.md")


@dataclass(frozen=True)
class Prose:
    """One page's figures."""

    words: int
    sentences: int
    numbers: int

    @property
    def words_a_sentence(self) -> float:
        """The mean length of a sentence."""
        return self.words / max(1, self.sentences)

    @property
    def numbers_per_100(self) -> float:
        """Numbers per hundred words."""
        return 100 * self.numbers / max(1, self.words)


def pages() -> list[Path]:
    """Returns the pages that are measured."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [page for page in found if page.name not in EXEMPT]


def prose_of(text: str) -> Prose:
    """Returns the figures of a page's text."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = re.sub(r"`[^`\n]*`", "code", text)
    blocks: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if not stripped or stripped.startswith(("#", "|", "<!--")):
            blocks.append("")
            continue
        # An entry of a list begins a sentence of its own.
        if re.match(r"([-*]|\d+\.)\s", stripped):
            blocks.append("")
        blocks.append(stripped)
    paragraphs = re.split(r"\n\s*\n", "\n".join(blocks))
    words = 0
    sentences = 0
    numbers = 0
    for paragraph in paragraphs:
        flat = re.sub(r"^([-*]|\d+\.)\s", "", " ".join(paragraph.split()))
        if not flat:
            continue
        sentences += len([part for part in re.split(r"[.!?](?:[\s)*]|$)", flat) if part.strip()])
        words += len(re.findall(r"[A-Za-z][\w'-]*", flat))
        numbers += len(re.findall(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?", flat))
    return Prose(words, sentences, numbers)


if __name__ == "__main__":
    print("| page | words | words a sentence | numbers per 100 words |\n|---|---|---|---|")
    for page in pages():
        prose = prose_of(page.read_text(encoding="utf-8"))
        figures = f"{prose.words_a_sentence:.1f} | {prose.numbers_per_100:.1f}"
        print(f"| {page.relative_to(ROOT)} | {prose.words} | {figures} |")
