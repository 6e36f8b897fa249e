"""Tasks of long prompts: find a fact, compare two facts, or continue a span that stood before.

`needle` asks for a value of a key. `two_hop` asks for the favorite thing of the older of two
people: the kind of example behind HeadKV-R2 (arXiv 2410.19258, section 3.1), with two candidate
sentences, the ages that decide between them, and a question that names neither. Both are written in
the language that the tokenizer can write (`language_of`). In `repeated_spans` only copying helps,
as induction heads do (arXiv 2209.11895).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvjax.example import Example
from kvjax.tasks.english import ENGLISH, enumeration
from kvjax.tasks.language import Fact, Language, Needles
from kvjax.tasks.people import WORDS, older
from kvjax.tasks.prompt import Context, Filler, sentences, strew
from kvjax.tasks.words import Vocabulary

EVALUATION_STREAM = 1_000_003
"""First number of the seeds of evaluation, so that they differ from those of pretraining."""

SPAN_LENGTHS = (1, 12)
"""Smallest and largest number of tokens after the cue of a repeated span."""


@dataclass(frozen=True)
class Task:
    """A task of long prompts.

    Attributes:
        generate: (rng, vocab, length, answer_length, …) → one `Example`.
        chance: the share of right answers if a model copies a random candidate. A needle has one
            candidate, so every model that finds a favorite thing is right. 0 without candidates.
    """

    generate: Callable[..., Example]
    chance: float = 0.0


def language_of(vocab: Vocabulary) -> Language:
    """English where the tokenizer can write it, else the words of the embedded model.

    Raises:
        ValueError: it can write neither.
    """
    for language in (ENGLISH, WORDS):
        if vocab.writes(language.sample):
            return language
    raise ValueError(
        f"the tokenizer can write neither {ENGLISH.sample!r} nor {WORDS.sample!r}, "
        "expected one of them"
    )


def hide(
    rng: np.random.Generator,
    vocab: Vocabulary,
    length: int | None,
    language: Language,
    needles: Needles,
    facts: Sequence[Fact],
    depth: float | None = None,
    filler: Filler | None = None,
    texts: Mapping[str, str] | None = None,
) -> Example:
    """One prompt of exactly `length` tokens that ends with a question for values of keys.

    The answer of the example is the values in the order of the text, and its span the first needle.

    Args:
        length: tokens of the prompt, with everything around the text; None for the shortest prompt,
            without filler.
        facts: the keys and their values, as `language.facts(rng, needles)` draws them.
        depth: the place of the first needle, 0 to 1; None for a random place.
        filler: makes the text around the needles; None for generated sentences.
        texts: instead of the language's own, see `Wording.with_texts`.

    Raises:
        ValueError: `length` cannot hold the needles and the question, or a text that the language
            or the tokenizer cannot write.
    """
    wording = language.wording(needles).with_texts(texts or {})
    _check_written(vocab, [text for fact in facts for text in fact])
    told = [vocab.encode(wording.needle.format(key=key, value=value)) for key, value in facts]
    keys = list(dict.fromkeys(key for key, _ in facts))[: needles.queries]
    before, after = vocab.around(*wording.parts(key=enumeration(keys)))
    # Every needle has its own random place.
    depths = rng.random(len(told)).tolist()
    if depth is not None:
        depths[0] = depth
    filler = filler or functools.partial(sentences, vocab=vocab, say=language.sentence)
    context = strew(rng, told, length, before, after, depths, filler)
    asked = [index for index, (key, _) in enumerate(facts) if key in keys]
    answers = [facts[index][1] for index in sorted(asked, key=lambda i: context.spans[i])]
    return _example(vocab, language, context, answers, 0, depths[0], len(after), "needle")


def _needle(
    rng: np.random.Generator,
    vocab: Vocabulary,
    length: int | None,
    answer_length: int | None = None,
    distractors: int = 0,
    depth: float | None = None,
    filler: Filler | None = None,
    texts: Mapping[str, str] | None = None,
    needles: Needles | None = None,
) -> Example:
    """One prompt of exactly `length` tokens that ends with the question.

    Args:
        length, depth, filler, texts: see `hide`.
        answer_length: words or digits of the answer; None for the language's own number.
        distractors: number of other keys, each with a value of the same length. With any, the task
            is called multi-key.
        needles: the kinds of keys and values, and the number of values; None for one value.

    Raises:
        ValueError: see `hide`.
    """
    language = language_of(vocab)
    wanted = replace(needles or Needles(), keys=1 + distractors, length=answer_length)
    facts = language.facts(rng, wanted)
    example = hide(rng, vocab, length, language, wanted, facts, depth, filler, texts)
    return replace(example, name="multi_key" if distractors else "needle")


def _two_hop(
    rng: np.random.Generator,
    vocab: Vocabulary,
    length: int | None,
    answer_length: int | None = None,
    distractors: int = 0,
    depth: float | None = None,
    filler: Filler | None = None,
    texts: Mapping[str, str] | None = None,
) -> Example:
    """One prompt of exactly `length` tokens that ends with the question.

    The span of the example is the sentence with the favorite thing of the older person. A guess
    between the two candidates is right half of the time.

    Args:
        length, filler, texts: see `hide`.
        answer_length: words of the favorite thing of each person; None for the language's own
            number.
        distractors: number of other people, each with an age and a favorite thing.
        depth: the place of the sentence with the answer, 0 to 1; None for a random place.

    Raises:
        ValueError: see `hide`.
    """
    language = language_of(vocab)
    cast = language.people(rng, [answer_length] * (2 + distractors))
    right = older(cast[0], cast[1])
    wording = language.two_hop.with_texts(texts or {})
    _check_written(vocab, [text for person in cast for text in (person.name, person.thing)])
    likes = [wording.needle.format(key=person.name, value=person.thing) for person in cast]
    ages = [wording.age.format(key=person.name, age=person.age) for person in cast]
    before, after = vocab.around(*wording.parts(a=cast[0].name, b=cast[1].name))
    # Every sentence has its own random place: first those with things, then those with ages.
    depths = rng.random(2 * len(cast)).tolist()
    answer_at = cast.index(right)
    if depth is not None:
        depths[answer_at] = depth
    filler = filler or functools.partial(sentences, vocab=vocab, say=language.sentence)
    told = list(map(vocab.encode, [*likes, *ages]))
    context = strew(rng, told, length, before, after, depths, filler)
    place = answer_at, depths[answer_at]
    return _example(vocab, language, context, [right.thing], *place, len(after), "two_hop")


def _example(
    vocab: Vocabulary,
    language: Language,
    context: Context,
    answers: Sequence[str],
    fact: int,
    depth: float,
    question_length: int,
    name: str,
) -> Example:
    """The example of a prompt whose answers stand in its facts; `fact` is the number of one."""
    return Example(
        prompt=context.ids,
        answer=tuple(vocab.encode(", ".join(answers))),
        span=context.spans[fact],
        depth=depth,
        name=name,
        question_length=question_length,
        answers=tuple(answers),
        then_eos=language.then_eos,
    )


def _check_written(vocab: Vocabulary, texts: Sequence[str]) -> None:
    """Raises ValueError for keys or values that the tokenizer cannot write."""
    for text in texts:
        if not vocab.writes(text):
            raise ValueError(
                f"the tokenizer cannot write {text!r}, expected a key and a value that it can"
            )


def _repeated_spans(
    rng: np.random.Generator,
    vocab: Vocabulary,
    length: int | None,
    answer_length: int = 4,
    cue_length: int = 4,
    depth: float | None = None,
    ids: Sequence[int] | None = None,
) -> Example:
    """Random tokens that end with the first `cue_length` tokens of a span among them.

    The distance to the span is random, so that it cannot be learned as an offset.

    Args:
        length: tokens of the prompt, with the cue and the beginning-of-sequence token; None for
            the span and the cue alone.
        answer_length: tokens of the span after the cue: the answer.
        depth: the place of the span, 0 to 1; None for a random place.
        ids: the tokens to draw from; None for all but the first four, which are the special tokens
            of `WordVocabulary`.

    Raises:
        ValueError: `length` cannot hold the span and the cue.
    """
    start = [] if vocab.bos_id is None else [vocab.bos_id]
    span_length = cue_length + answer_length
    shortest = len(start) + span_length + cue_length
    room = 0 if length is None else length - shortest
    if room < 0:
        raise ValueError(f"got length {length}, expected ≥ {shortest}")
    # A stretch of random tokens; its end repeats the start of a span within it.
    choices = np.arange(4, vocab.size) if ids is None else np.asarray(ids)
    text = choices[rng.integers(len(choices), size=room + span_length)].tolist()
    at = int(rng.integers(room + 1)) if depth is None else round(depth * room)
    span = text[at : at + span_length]
    first = len(start) + at
    return Example(
        prompt=(*start, *text, *span[:cue_length]),
        answer=tuple(span[cue_length:]),
        span=(first, first + span_length),
        depth=at / room if room else 0.0,
        name="repeated_spans",
        question_length=cue_length,
    )


needle = Task(_needle, 1.0)
two_hop = Task(_two_hop, 1 / 2)
repeated_spans = Task(_repeated_spans)

TASKS = {
    "needle": needle,
    "multi_key": Task(functools.partial(_needle, distractors=5), 1 / 6),
    "two_hop": two_hop,
    "two_hop_crowded": Task(functools.partial(_two_hop, distractors=3), 1 / 2),
    "repeated_spans": repeated_spans,
}


def make_examples(
    task: str,
    vocab: Vocabulary,
    count: int,
    length: int,
    seed: int = 0,
    answer_lengths: tuple[int, int] | None = None,
) -> list[Example]:
    """Examples of a task.

    Examples:
        >>> words = kvjax.tasks.WordVocabulary()
        >>> [example] = kvjax.tasks.make_examples("needle", words, 1, length=256)
        >>> len(example.prompt)
        256

    Args:
        task: a name in TASKS.
        length: tokens of every prompt.
        answer_lengths: smallest and largest length of the answers, in words, or digits of English
            needles; None: 1 to 12 words in the language of the embedded model, and always 7 digits
            or 2 words in English.

    Raises:
        ValueError: an unknown task, or a length that cannot hold the facts.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}, expected one of {', '.join(TASKS)}")
    # The length is part of the seed: other lengths give other people and words.
    rng = np.random.default_rng([EVALUATION_STREAM, seed, length])
    if answer_lengths is None and task != "repeated_spans":
        answer_lengths = language_of(vocab).lengths
    elif answer_lengths is None:
        answer_lengths = SPAN_LENGTHS
    examples = []
    for _ in range(count):
        size = None if answer_lengths is None else _between(rng, *answer_lengths)
        examples.append(TASKS[task].generate(rng, vocab, length, size))
    return examples


def _between(rng: np.random.Generator, low: int, high: int) -> int:
    return int(rng.integers(low, high + 1))
