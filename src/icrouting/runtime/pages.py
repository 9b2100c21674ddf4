"""Pages: templates filled with values, and how numbers read in them."""

from collections.abc import Callable, Mapping

import jinja2

MINUS = "\N{MINUS SIGN}"


def render(template: str, filters: Mapping[str, Callable], **values: object) -> str:
    """Returns a page: one of our templates filled with values, which are escaped where it is HTML.

    `template` is its path inside the package; `filters` are what it may call, by name.
    """
    loader, strict = jinja2.PackageLoader("icrouting", ""), jinja2.StrictUndefined
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=strict, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(filters)
    return environment.get_template(template).render(**values)


def points(share: float, is_signed: bool = False) -> str:
    """A share in percentage points: 0.5612 reads 56.1; with a true minus sign, never -0.0."""
    rounded = round(share * 100, 1) + 0.0
    return (f"{rounded:+.1f}" if is_signed else f"{rounded:.1f}").replace("-", MINUS)
