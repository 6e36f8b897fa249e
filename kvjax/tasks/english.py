"""English: RULER's needles, facts about people in plain sentences, and generated filler.

The needle, the instruction, the question and the beginning of the answer have RULER's words, so
that results can be read beside others (arXiv 2404.06654; NVIDIA/RULER,
scripts/data/synthetic/constants.py and niah.py). So have the kinds of keys and values: a word (an
adjective and a noun), a number of seven digits, or a UUID. RULER takes its words from the package
wonderwords; here they are `kvjax.tasks.words`.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Sequence

import numpy as np

from kvjax.tasks import words
from kvjax.tasks.language import Fact, Language, Needles, Person, Wording
from kvjax.tasks.people import draw_people
from kvjax.tasks.prompt import SLOTS

NOUNS = (*words.FILLER_NOUNS, *words.THINGS)
POOL = len(words.FILLER_ADJECTIVES) * len(NOUNS)
"""Number of different words that keys and values can be."""

DIGITS = 7
THING_LENGTH = 2  # words of a favorite thing: adjectives and a noun


def words_of(rng: np.random.Generator, count: int) -> list[str]:
    """Different words, each an adjective and a noun.

    Raises:
        ValueError: more than POOL.
    """
    if count > POOL:
        raise ValueError(f"got {count} different words, expected ≤ {POOL}")
    picks = rng.choice(POOL, count, replace=False)
    pairs = [divmod(int(pick), len(NOUNS)) for pick in picks]
    return [f"{words.FILLER_ADJECTIVES[a]}-{NOUNS[n]}" for a, n in pairs]


def numbers_of(rng: np.random.Generator, count: int, digits: int = DIGITS) -> list[str]:
    """Different numbers with this many digits.

    Raises:
        ValueError: fewer than one digit, more than 18, or more numbers than there are.
    """
    if not 1 <= digits <= 18:
        raise ValueError(f"got numbers of {digits} digits, expected 1 to 18")
    low = 10 ** (digits - 1)
    if count > 9 * low:
        raise ValueError(f"got {count} different numbers of {digits} digits, expected ≤ {9 * low}")
    return _different(lambda: str(rng.integers(low, 10 * low)), count)


def uuids_of(rng: np.random.Generator, count: int) -> list[str]:
    """Different random UUIDs."""
    return _different(lambda: str(uuid.UUID(bytes=rng.bytes(16), version=4)), count)


def _different(make: Callable[[], str], count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[make()] = None
    return list(found)


KINDS = {"word": words_of, "number": numbers_of, "uuid": uuids_of}


def draw(rng: np.random.Generator, kind: str, count: int) -> list[str]:
    """Different keys or values of a kind.

    Raises:
        ValueError: an unknown kind, or more than there are.
    """
    if kind not in KINDS:
        raise ValueError(f"the kind of a key or value is {kind!r}, expected {', '.join(KINDS)}")
    return KINDS[kind](rng, count)


def facts(rng: np.random.Generator, needles: Needles) -> list[Fact]:
    """Keys, by default words, and their values, by default numbers.

    Raises:
        ValueError: an unknown kind, or a length of values that are no numbers.
    """
    keys = draw(rng, needles.key or "word", needles.keys)
    kind, count = needles.value or "number", needles.keys * needles.values
    if needles.length is None:
        values = draw(rng, kind, count)
    elif kind == "number":
        values = numbers_of(rng, count, needles.length)
    else:
        raise ValueError(f"got a length of {needles.length} for {kind}s, expected it for numbers")
    return [(keys[index // needles.values], value) for index, value in enumerate(values)]


def enumeration(names: Sequence[str]) -> str:
    """Names with commas, and "and" before the last one, as RULER joins several keys."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"


def needle_wording(needles: Needles) -> Wording:
    """RULER's texts for one asked value, or for several, with a colon after the answer's beginning.

    RULER has no colon there. Without it a model may write one before the value, because the needle
    has one: then no single right answer could be fed.
    """
    kind = needles.value or "number"
    needle = f"One of the special magic {kind}s for {{key}} is: {{value}}."
    if needles.queries * needles.values == 1:
        return Wording(
            needle,
            f"What is the special magic {kind} for {{key}} mentioned in the provided text?",
            f"The special magic {kind} for {{key}} mentioned in the provided text is:",
            f"A special magic {kind} is hidden within the following text. Make sure to memorize "
            f"it. I will quiz you about the {kind} afterwards.",
        )
    return Wording(
        needle,
        f"What are all the special magic {kind}s for {{key}} mentioned in the provided text?",
        f"The special magic {kind}s for {{key}} mentioned in the provided text are:",
        f"Some special magic {kind}s are hidden within the following text. Make sure to memorize "
        f"it. I will quiz you about the {kind}s afterwards.",
    )


def people(rng: np.random.Generator, lengths: list[int | None]) -> list[Person]:
    """People whose favorite thing is a noun after adjectives, "dusty violin".

    Raises:
        ValueError: more people than names, or more adjectives in a thing than there are.
    """
    adjectives = words.FILLER_ADJECTIVES
    longest = max(length or THING_LENGTH for length in lengths)
    if longest > len(adjectives) + 1:
        raise ValueError(f"got a thing of {longest} words, expected ≤ {len(adjectives) + 1}")
    found = []
    for person, length in zip(draw_people(rng, [1] * len(lengths)), lengths, strict=True):
        count = (length or THING_LENGTH) - 1
        before = [adjectives[i] for i in rng.choice(len(adjectives), count, replace=False)]
        found.append(
            Person(person.name.capitalize(), " ".join([*before, person.thing]), person.age)
        )
    return found


TWO_HOP = Wording(
    needle="{key}'s favorite thing is the {value}.",
    question="What is the favorite thing of the older one of {a} and {b}?",
    answer_prefix="The favorite thing of the older one of {a} and {b} is the",
    instruction="The following text says how old some people are, and what they like best. I will "
    "ask you about them afterwards.",
    age="{key} is {age} years old.",
)

FILLERS = {
    "noun": SLOTS["N"],
    "adjective": SLOTS["A"],
    "sees": SLOTS["V"],
    "walks": SLOTS["M"],
    "often": SLOTS["D"],
    "under": SLOTS["P"],
}
"""The words that a word in braces can become; no other word than "the" stands before an
adjective, because some begin with a vowel."""

PATTERNS = (
    "The {adjective} {noun} {sees} the {noun} {under} the {noun}.",
    "Every spring a {noun} from the {noun} {walks} {under} the {adjective} {noun}.",
    "When the {noun} {walks} near the {noun}, nobody at the {noun} is surprised.",
    "The {noun} of the {noun} was {adjective} and {adjective} for many years.",
    "In the evening the {adjective} {noun} {often} {sees} the {noun}, but it {walks} alone.",
    "People say that the {noun} {under} the {noun} has always been {adjective}.",
    "The {noun} {sees} the {adjective} {noun} while the {noun} {walks} {under} the {noun}.",
    "It is not known why a {noun} {often} {walks} so far from the {noun}.",
    "Behind the {adjective} {noun} there is a {noun}, and {under} it a {noun} {walks}.",
    "The {noun} that {sees} the {noun} in winter {walks} {under} the {adjective} {noun}.",
    "Once there was a {noun} here; now the {adjective} {noun} {sees} the {noun} instead.",
    "If the {noun} is {adjective}, the {noun} {walks} {under} the {noun} until morning.",
)

PLACE = re.compile(r"\{(\w+)\}")


def sentence(rng: np.random.Generator) -> str:
    """One random sentence."""

    def word(place: re.Match[str]) -> str:
        choices = FILLERS[place[1]]
        return choices[int(rng.integers(len(choices)))]

    return PLACE.sub(word, PATTERNS[rng.integers(len(PATTERNS))])


ENGLISH = Language(
    name="English",
    sample="One of the special magic numbers for dusty-violin is: 0123456789. Mary's dog, John?",
    sentence=sentence,
    facts=facts,
    wording=needle_wording,
    people=people,
    two_hop=TWO_HOP,
    lengths=None,
    then_eos=False,
)
"""The language of every model whose tokenizer can write it."""
