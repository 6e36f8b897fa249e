"""Options that every command of a program has: they are taken out before the command is parsed."""

from __future__ import annotations


def take(argv: list[str], flag: str, expected: str) -> tuple[str | None, list[str]]:
    """The last value of a flag, "--flag VALUE" or "--flag=VALUE", and the arguments without it.

    Args:
        expected: describes a value, for the error.

    Raises:
        ValueError: the flag without a value.
    """
    found, rest, words = None, [], iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name != flag:
            rest.append(word)
            continue
        found = value if equals else next(words, None)
        if found is None:
            raise ValueError(f"got {flag} without a value, expected {expected}")
    return found, rest
