"""Examples hold what they say: exact lengths, spans on the answer, one right answer."""

import hashlib

import numpy as np
import pytest

from kvjax.tasks import WordVocabulary, make_examples, needle, people, repeated_spans, two_hop

VOCAB = WordVocabulary()
GENERATORS = [needle.generate, two_hop.generate, repeated_spans.generate]


def rng(seed=0):
    return np.random.default_rng(seed)


def contains(ids, part):
    return any(tuple(ids[i : i + len(part)]) == tuple(part) for i in range(len(ids)))


@pytest.mark.parametrize("generate", GENERATORS)
@pytest.mark.parametrize("length", [96, 200, 1024])
@pytest.mark.parametrize("answer_length", [1, 12])
def test_length_is_exact_and_the_span_holds_the_answer(generate, length, answer_length):
    for seed in range(10):
        example = generate(rng(seed), VOCAB, length, answer_length)
        assert len(example.prompt) == length
        assert len(example.answer) == answer_length
        assert example.prompt[0] == VOCAB.bos_id
        start, end = example.span
        assert contains(example.prompt[start:end], example.answer)
        assert all(0 <= token < VOCAB.size for token in (*example.prompt, *example.answer))
        assert VOCAB.unknown_id not in example.prompt


@pytest.mark.parametrize(
    ("task", "digest"),
    [
        ("needle", "290b9249e54a"),
        ("multi_key", "be3eabaeaf52"),
        ("two_hop", "3e868a4e764b"),
        ("two_hop_crowded", "0463b2242baf"),
        ("repeated_spans", "f000a22b59ba"),
    ],
)
def test_prompts_of_the_embedded_model_stay_the_same(task, digest):
    """Its published figures belong to these prompts."""
    examples = make_examples(task, VOCAB, 4, 300, seed=2)
    text = repr([(e.prompt, e.answer, e.span) for e in examples])
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == digest
    assert all(example.then_eos for example in examples)


@pytest.mark.parametrize("generate", GENERATORS)
def test_same_generator_state_same_example(generate):
    assert generate(rng(3), VOCAB, 128) == generate(rng(3), VOCAB, 128)
    assert generate(rng(3), VOCAB, 128) != generate(rng(4), VOCAB, 128)


@pytest.mark.parametrize("generate", GENERATORS)
def test_too_short_a_prompt_says_what_is_needed(generate):
    with pytest.raises(ValueError, match=r"got length 12, expected ≥ \d+"):
        generate(rng(), VOCAB, 12)


@pytest.mark.parametrize("generate", [needle.generate, two_hop.generate])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_answer_stands_at_the_asked_depth(generate, depth):
    example = generate(rng(), VOCAB, 1024, depth=depth)
    assert example.depth == depth
    middle = sum(example.span) / 2 / 1024
    assert abs(middle - depth) < 0.05


def test_needle_asks_for_the_person_of_the_span():
    for seed in range(20):
        example = needle.generate(rng(seed), VOCAB, 300, distractors=5)
        assert example.name == "multi_key"
        fact = VOCAB.decode(example.prompt[slice(*example.span)])
        name = fact.split()[0]
        text = VOCAB.decode(example.prompt)
        assert text.endswith(f"question : what is the favorite thing of {name} ? answer :")
        assert text.count("'s favorite thing is") == 6
        assert text.count(f"{name} 's favorite thing is") == 1
        assert fact == f"{name} 's favorite thing is {VOCAB.decode(example.answer)} ."


def test_two_hop_answers_for_the_older_one():
    sides = set()
    for seed in range(30):
        example = two_hop.generate(rng(seed), VOCAB, 200, answer_length=2)
        words = VOCAB.decode(example.prompt).split()
        a, b = words[-6], words[-4]
        ages = {
            words[i]: int(words[i + 2])
            for i in range(len(words) - 4)
            if words[i + 3 : i + 5] == ["years", "old"]
        }
        assert set(ages) == {a, b}
        right = max(ages, key=ages.__getitem__)
        assert words[example.span[0]] == right
        sides.add(right == a)
    assert sides == {True, False}


def test_distractors_bring_their_own_age():
    text = VOCAB.decode(two_hop.generate(rng(), VOCAB, 300, distractors=3).prompt)
    assert text.count("years old") == text.count("'s favorite thing is") == 5


def test_words_of_things_do_not_repeat_in_a_prompt():
    cast = people.draw_people(rng(), [12] * 12)
    words = [word for person in cast for word in person.thing.split()]
    assert len(set(words)) == len(words) == 144
    assert len({person.name for person in cast}) == len({person.age for person in cast}) == 12


def test_too_many_people():
    with pytest.raises(ValueError, match="got 49 people, expected ≤ 48"):
        people.draw_people(rng(), [1] * 49)


def test_repeated_span_ends_with_its_cue_at_random_distances():
    distances = set()
    for seed in range(30):
        example = repeated_spans.generate(rng(seed), VOCAB, 128, answer_length=5, cue_length=3)
        start, end = example.span
        span = example.prompt[start:end]
        assert span[:3] == example.prompt[-3:]
        assert span[3:] == example.answer
        distances.add(start)
    assert len(distances) > 20


def test_repeated_spans_of_given_ids_at_a_depth():
    ids = [7, 9, 11, 13]
    for depth in (0.0, 0.5, 1.0):
        example = repeated_spans.generate(rng(), VOCAB, 101, depth=depth, ids=ids)
        assert {*example.prompt[1:], *example.answer} == {*ids}
        assert example.span[0] == 1 + round(depth * 88)
        assert example.prompt[slice(*example.span)] == (*example.prompt[-4:], *example.answer)


@pytest.mark.parametrize("generate", GENERATORS)
def test_without_a_length_there_is_no_filler(generate):
    bare = generate(rng(), VOCAB, None)
    with pytest.raises(ValueError, match=f"expected ≥ {len(bare.prompt)}"):
        generate(rng(), VOCAB, len(bare.prompt) - 1)
    assert len(generate(rng(), VOCAB, len(bare.prompt)).prompt) == len(bare.prompt)
