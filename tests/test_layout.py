import ast
import importlib
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

QUOTES, DOCUMENTED = '"' * 3, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
SRC = Path(__file__).parents[1] / "src" / "icrouting"
FILES = sorted(SRC.rglob("*.py"))


def room_of(file):
    relative = file.relative_to(SRC).with_suffix("")
    parts = relative.parts[:-1] if relative.name == "__init__" else relative.parts
    return ".".join(("icrouting", *parts))


def imports_of(file):
    """Rooms that a file imports when it is imported itself, not later inside a function or for types only."""
    rooms, names = set(), {room_of(f) for f in FILES}

    def visit(nodes):
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("icrouting"):
                inner = {f"{node.module}.{alias.name}" for alias in node.names} & names
                rooms.update(inner or {node.module})
            elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
                visit(node.body)

    visit(ast.parse(file.read_text()).body)
    return rooms - {room_of(file)}


def test_imports_only_go_down():
    graph, order = {room_of(file): imports_of(file) for file in FILES}, []

    def go_down(room, path=()):
        assert room not in path, f"circle: {' -> '.join((*path, room))}"
        if room not in order:
            for below in sorted(graph.get(room, ())):
                go_down(below, (*path, room))
            order.append(room)

    for room in graph:
        go_down(room)
    assert (
        order.index("icrouting.tasks.task") < order.index("icrouting.tasks.prompts") < order.index("icrouting.icr")
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SRC)))
def test_files_and_functions_stay_small(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 250
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.end_lineno - node.lineno + 1 - len((ast.get_docstring(node) or "").splitlines())
            assert body <= 40, f"{node.name} has {body} lines besides its docstring"


def test_the_whole_stays_small():
    """The aim is 6,000 lines; this is where the whole stands, so that it can only shrink. Its code alone is below."""
    assert sum(len(file.read_text().splitlines()) for file in FILES) <= 9030
    assert sum(map(n_code_lines, FILES)) < 6000


def n_code_lines(file):
    """The lines of a file that hold code: no docstring, no comment, not empty."""
    text, lines = file.read_text(), set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.string.strip() and token.type != tokenize.COMMENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_lines_of_code_are_counted_without_what_only_says(tmp_path):
    file = tmp_path / "code.py"
    lines = [QUOTES + "Says.", "", "More." + QUOTES, "", "# a remark", "x = (", "    1,", "", ")", "async def f():"]
    lines += [f"    {QUOTES}Says.{QUOTES}", f"    return {QUOTES}a", "b" + QUOTES]
    file.write_text("\n".join(lines))
    assert n_code_lines(file) == 6


def test_importing_the_package_does_no_work():
    code = "import sys, icrouting; print(sum(name.split('.')[0] in ('torch', 'transformers') for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
    assert not done.stderr


def test_public_names_are_there():
    import icrouting

    for name in icrouting.__all__:
        assert getattr(icrouting, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = icrouting.nonsense


def test_without_lm_evaluation_harness_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    monkeypatch.delitem(sys.modules, "icrouting.harness", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'icrouting\[lm-eval\]'"):
        importlib.import_module("icrouting.harness")
