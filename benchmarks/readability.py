"""How easily source code reads, in figures: sizes, tokens a line, comments, comprehensions.

Run it as `python -m benchmarks.readability [FOLDER] [--json FILE]`.

What is counted:

- a code line holds Python tokens other than comments, and no part of a docstring;
- tokens are what `tokenize` calls names, numbers, strings and operators; a string is one token;
- a function's lines go from `def` to its end, without its docstring;
- a comment line holds a `#` comment, alone or behind code; its share is of all lines that are
  neither blank nor part of a docstring.
"""

import argparse
import ast
import io
import json
import statistics
import tokenize
from dataclasses import dataclass
from pathlib import Path

LONG_LINE = 100
LONG_FUNCTION = 40
LONG_FILE = 250
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
# Tokens that only lay out what the others say.
LAYOUT = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}


@dataclass
class Counts:
    """What one file holds: the lines as sets of their numbers."""

    n_lines: int
    n_long_lines: int
    n_tokens: int
    n_comprehensions: int
    code_lines: set[int]
    comment_lines: set[int]
    function_lengths: list[int]


def docstring_of(node: ast.AST) -> ast.Expr | None:
    """Returns the statement that is a node's docstring, if it has one."""
    if not isinstance(node, DOCUMENTED) or ast.get_docstring(node, clean=False) is None:
        return None
    statement = node.body[0]
    return statement if isinstance(statement, ast.Expr) else None


def lines_of(node: ast.expr | ast.stmt) -> range:
    """Returns the numbers of the lines that a node covers."""
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def count(source: str) -> Counts:
    """Returns what one file's source holds."""
    nodes = list(ast.walk(ast.parse(source)))
    docstring_lines: set[int] = set()
    function_lengths = []
    for node in nodes:
        docstring = docstring_of(node)
        if docstring is not None:
            docstring_lines.update(lines_of(docstring))
        if isinstance(node, FUNCTIONS):
            n_documented = len(lines_of(docstring)) if docstring is not None else 0
            function_lengths.append(len(lines_of(node)) - n_documented)
    code_lines: set[int] = set()
    comment_lines: set[int] = set()
    n_tokens = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        first_line, last_line = token.start[0], token.end[0]
        if token.type == tokenize.COMMENT:
            comment_lines.add(first_line)
        elif token.type not in LAYOUT and first_line not in docstring_lines:
            n_tokens += 1
            code_lines.update(range(first_line, last_line + 1))
    lines = source.splitlines()
    return Counts(
        n_lines=len(lines),
        n_long_lines=sum(len(line) > LONG_LINE for line in lines),
        n_tokens=n_tokens,
        n_comprehensions=sum(isinstance(node, COMPREHENSIONS) for node in nodes),
        code_lines=code_lines,
        comment_lines=comment_lines,
        function_lengths=function_lengths,
    )


def measure(folder: Path) -> dict[str, float]:
    """Returns the figures of all Python files under a folder."""
    files = [count(file.read_text(encoding="utf-8")) for file in sorted(folder.rglob("*.py"))]
    if not files:
        raise SystemExit(f"expected Python files under {folder}, there are none")
    file_lengths = [counts.n_lines for counts in files]
    function_lengths = [length for counts in files for length in counts.function_lengths]
    n_code_lines = sum(len(counts.code_lines) for counts in files)
    n_written_lines = sum(len(counts.code_lines | counts.comment_lines) for counts in files)
    n_comment_lines = sum(len(counts.comment_lines) for counts in files)
    n_comprehensions = sum(counts.n_comprehensions for counts in files)
    return {
        "files": len(files),
        "lines": sum(file_lengths),
        "code lines": n_code_lines,
        "median file, lines": statistics.median(file_lengths),
        "largest file, lines": max(file_lengths),
        f"files over {LONG_FILE} lines": sum(length > LONG_FILE for length in file_lengths),
        "functions": len(function_lengths),
        "median function, lines": statistics.median(function_lengths),
        "largest function, lines": max(function_lengths),
        f"functions over {LONG_FUNCTION} lines": sum(
            length > LONG_FUNCTION for length in function_lengths
        ),
        "tokens a code line": round(sum(counts.n_tokens for counts in files) / n_code_lines, 2),
        f"lines over {LONG_LINE} characters, %": round(
            100 * sum(counts.n_long_lines for counts in files) / sum(file_lengths), 2
        ),
        "comment lines, %": round(100 * n_comment_lines / n_written_lines, 2),
        "comprehensions per 100 code lines": round(100 * n_comprehensions / n_code_lines, 2),
    }


def main() -> None:
    """Prints the figures of a folder, and writes them where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("src/icrouting"))
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--commit", help="the commit of the folder, kept with the figures")
    options = parser.parse_args()
    figures: dict[str, float | str] = dict(measure(options.folder))
    if options.commit:
        figures["commit"] = options.commit
    for name, value in figures.items():
        print(f"{name:36} {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
