"""Pages: templates filled with values, and how numbers read in them."""

from collections.abc import Callable, Mapping
from functools import cache

import jinja2

MINUS = "\N{MINUS SIGN}"


def render(template: str, filters: Mapping[str, Callable], **values: object) -> str:
    """Returns a page: one of our templates filled with values, which are escaped where it is HTML.

    Args:
        template: path inside the package.
        filters: what the template may call, by name.
        values: what the template may read, by name; a name that it lacks is an error.
    """
    environment = _environment()
    environment.filters.update(filters)
    return environment.get_template(template).render(**values)


@cache
def _environment() -> jinja2.Environment:
    # One for all pages, since it keeps the compiled templates. A template that is no HTML turns
    # the escaping off itself: the safe way is the one that holds where nothing is said.
    return jinja2.Environment(
        loader=jinja2.PackageLoader("icrouting", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def counted(number: int, thing: str) -> str:
    """Returns a number of things: 1 reads "1 task", 2 reads "2 tasks"."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def markdown_cell(text: str) -> str:
    """Returns a text that can stand in a cell of a table in Markdown."""
    return " ".join(text.split()).replace("|", "\\|")


def points(share: float, is_signed: bool = False) -> str:
    """Returns a share in percentage points: 0.5612 reads 56.1.

    The minus sign is the true one, and nothing reads -0.0.
    """
    # Adding zero makes a negative zero a positive one.
    rounded = round(share * 100, 1) + 0.0
    text = f"{rounded:+.1f}" if is_signed else f"{rounded:.1f}"
    return text.replace("-", MINUS)
