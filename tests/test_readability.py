"""The figures on how code reads, on a source whose counts can be checked by eye."""

from benchmarks import readability

SOURCE = '''"""A module."""

import math  # a reason


def area(radius):
    """Returns the area.

    It is a number.
    """
    # Another reason.
    return math.pi * radius**2


squares = [number * number for number in range(3)]
'''


def test_tokens_and_lines_are_counted_without_docstrings_comments_and_blanks():
    counts = readability.count(SOURCE)
    assert len(counts.code_lines) == 4
    assert len(counts.comment_lines) == 2
    assert counts.function_lengths == [3]
    assert counts.n_comprehensions == 1
    # import math / def area ( radius ) : / return math . pi * radius ** 2 / squares = [ ... ]
    assert counts.n_tokens == 2 + 6 + 8 + 14


def test_a_text_over_lines_is_one_token_and_its_lines_are_code():
    counts = readability.count('words = """one\ntwo\nthree"""\n')
    assert (counts.n_tokens, counts.code_lines) == (3, {1, 2, 3})


def test_the_package_is_measured(tmp_path):
    (tmp_path / "long.py").write_text("x = 1\n" * 251 + "y = 2  #" + "-" * 100 + "\n")
    (tmp_path / "short.py").write_text(SOURCE)
    figures = readability.measure(tmp_path)
    assert figures["files"] == 2
    assert figures["files over 250 lines"] == 1
    assert figures["lines over 100 characters, %"] == round(100 / (252 + 15), 2)
    assert figures["functions over 40 lines"] == 0
