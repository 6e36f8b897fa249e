"""Names of tensors that begin otherwise than transformers' causal language models write them."""

from collections.abc import Iterable, Set

BASE = "model."
"""The part of a causal language model that checkpoints of the bare model leave out."""


def canonical(name: str, expected: Set[str]) -> str:
    """The expected name that a stored one stands for, by transformers' rule; itself for none.

    A checkpoint of the bare model has "norm.weight" for "model.norm.weight", and one of a model
    that contains the language model has "model.model.norm.weight".
    """
    without = name.removeprefix(BASE)
    if without != name and without in expected:
        return without
    return BASE + name if BASE + name in expected and name not in expected else name


def other_names(missing: Iterable[str], unexpected: Iterable[str]) -> tuple[set[str], list[str]]:
    """Missing tensors that are there under names that only begin otherwise.

    Returns:
        These names, the missing and the unexpected ones, where the same difference holds for more
        than one tensor; and a line for each difference.
    """
    by_tail: dict[str, list[str]] = {}
    for name in unexpected:
        by_tail.setdefault(_tail(name), []).append(name)
    groups: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for expected in missing:
        stored = by_tail.get(_tail(expected), [])
        if len(stored) == 1:
            pair = (stored[0], expected)
            groups.setdefault(_difference(*pair), []).append(pair)
    names, lines = set(), []
    for (theirs, ours), pairs in groups.items():
        if len(pairs) > 1:
            names.update(name for pair in pairs for name in pair)
            lines.append(
                f"{len(pairs)} tensor names begin with {theirs!r}, expected "
                f"{repr(ours) if ours else 'none of that'} (got {pairs[0][0]}, expected "
                f"{pairs[0][1]})"
            )
    return names, lines


def _tail(name: str) -> str:
    """The part of a name that no wrapper changes: from the layers, or the last two words."""
    words = name.split(".")
    if "layers" in words:
        return ".".join(words[words.index("layers") :])
    return ".".join(words[-2:])


def _difference(stored: str, expected: str) -> tuple[str, ...]:
    """The beginnings of two names before the words in which they agree."""
    ours, theirs = expected.split("."), stored.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    return tuple("".join(f"{word}." for word in words) for words in (theirs, ours))
