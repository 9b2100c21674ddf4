"""Limits: what a server takes, and how it gathers requests; light, for the command line."""

from dataclasses import dataclass

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from icrouting.runtime.checks import check


@dataclass(frozen=True)
class Limits:
    """What a server takes, and how it gathers requests.

    Attributes:
        max_batch: Requests that are run together, at most.
        window_ms: Milliseconds that the first of a batch waits for others.
        max_queue: Requests that wait, at most; further ones get status 429.
        max_tokens: Tokens that a request may generate.
        max_rows: Rows, or prompts, of a request.
        max_body: Bytes of a request.
        timeout: Seconds after which a request is given up.
    """

    max_batch: PositiveInt = 16
    window_ms: NonNegativeFloat = 4.0
    max_queue: PositiveInt = 256
    max_tokens: PositiveInt = 512
    max_rows: PositiveInt = 256
    max_body: PositiveInt = 1_000_000
    timeout: PositiveFloat = 120.0

    def __post_init__(self):
        check(self)
