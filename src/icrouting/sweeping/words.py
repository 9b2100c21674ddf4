"""Words: what values of axes stand for that are typed by a name rather than a number."""

from collections.abc import Sequence

from icrouting.config import HIDDEN
from icrouting.runtime.checks import known

# Features that say nothing, in the width of the encoder that the others read by (controls).
BLIND = ("constant", "random")
SENTENCE = "sentence"
THIRDS = ("early", "middle", "late")


def chosen_layers(text: str, n_layers: int | None) -> tuple[int, ...] | None:
    """Returns the routed layers of "early", "middle", "late", "all", or of "3+5" and "20-29".

    The thirds are those of the paper's ablation; the late one is what a fit routes by default, so
    that it has the layers that three do not divide. Where the depth is not known yet, None stands
    for words.

    Raises:
        ValueError: the text is neither a word nor numbers.
    """
    if text in (*THIRDS, "all"):
        return None if n_layers is None else _named_layers(text, n_layers)
    layers: list[int] = []
    for part in text.split("+"):
        first, sign, last = part.partition("-")
        if not first.isdigit() or (sign and not last.isdigit()):
            raise ValueError(
                f"expected {', '.join(THIRDS)}, all, or layers such as 12, 20-29 or 3+5, "
                f"got {text!r}"
            )
        layers += range(int(first), int(last or first) + 1)
    if n_layers is not None and (layers != sorted(set(layers)) or layers[-1] >= n_layers):
        raise ValueError(f"routed layers must be ascending indices below {n_layers}, got {layers}")
    return tuple(layers)


def _named_layers(word: str, n_layers: int) -> tuple[int, ...]:
    n_third = n_layers // 3
    layers_by_word = {
        "early": range(n_third),
        "middle": range(n_third, n_third * 2),
        # As `routing.pids.late_third`, which comes with what takes seconds to import.
        "late": range(n_third * 2, n_layers),
        "all": range(n_layers),
    }
    return tuple(layers_by_word[word])


def single_layers(n_layers: int) -> tuple[str, ...]:
    """Returns the values of an axis that routes each layer alone."""
    return tuple(str(layer) for layer in range(n_layers))


def chosen_encoder(text: str, usual: str) -> str:
    """Returns the encoder of "hidden", "constant", "random" or "sentence", else the text itself.

    Args:
        text: a word, or an encoder's name: hub id, folder or "pinned:minilm".
        usual: the encoder of the sweep's base, which "sentence" stands for and whose width
            features that say nothing have.
    """
    if text in BLIND:
        return f"{text}:{usual}"
    return usual if text == SENTENCE and usual != HIDDEN else text


def chosen_sources(text: str, sources: Sequence[str]) -> tuple[str, ...]:
    """Returns the source tasks of "3" (the first three) or of "agnews+sst2".

    Raises:
        ValueError: there are not so many, or one is not among the sources.
    """
    if text.isdigit():
        if not 1 <= int(text) <= len(sources):
            raise ValueError(f"expected 1 to {len(sources)} of the sources, got {text}")
        return tuple(sources[: int(text)])
    names = tuple(text.split("+"))
    for name in names:
        known("source", name, dict.fromkeys(sources))
    if len(set(names)) < len(names):
        raise ValueError("a source is named twice: leave one out")
    return names
