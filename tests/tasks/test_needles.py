"""Needles in English: the whole text of a prompt, raw and in the chat template."""

import numpy as np
import pytest
from tokenizer_toys import CHAT, byte_level, packed, sentencepiece, word_piece

from kvjax.headkv.examples import Grid
from kvjax.headkv.examples import make_examples as grid_examples
from kvjax.tasks import WordVocabulary, make_examples, needle, repeated_spans, two_hop, words
from kvjax.tasks.english import ENGLISH, numbers_of, sentence
from kvjax.tasks.language import Needles
from kvjax.tasks.people import WORDS
from kvjax.tasks.prompt import read_haystack
from kvjax.tasks.recall import hide, language_of
from kvjax.tasks.words import TokenizerVocabulary, to_transformers

INSTRUCTION = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the number afterwards.\n"
)
ONE = (
    f"{INSTRUCTION} One of the special magic numbers for KEY is: VALUE.\n"
    "What is the special magic number for KEY mentioned in the provided text?"
)
PREFIX = "The special magic number for KEY mentioned in the provided text is:"
TURN = "<|end|>\n<|assistant|>\n"


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def plain():
    return TokenizerVocabulary(byte_level())


@pytest.fixture(scope="module")
def chat():
    return TokenizerVocabulary(byte_level(chat_template=CHAT), chat=True)


def written(vocab, ids):
    return vocab.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def filled(text, example, key):
    return text.replace("KEY", key).replace("VALUE", example.answers[0])


def key_of(text):
    return text.rpartition("special magic numbers for ")[2].partition(" is: ")[0]


def test_a_raw_prompt(plain):
    example = needle.generate(rng(), plain, None)
    text = written(plain, example.prompt)
    assert text == filled(f"{ONE} {PREFIX}", example, key_of(text))
    assert written(plain, example.answer) == f" {example.answers[0]}"
    assert len(example.answers[0]) == 7 and not example.then_eos
    span = written(plain, example.prompt[slice(*example.span)])
    assert span.startswith(" One of") and span.endswith(f" is: {example.answers[0]}.")


def test_the_answer_begins_in_the_turn_of_the_assistant(chat):
    example = needle.generate(rng(), chat, None)
    text = written(chat, example.prompt)
    wanted = f"<s><|user|>\n{ONE}{TURN}{PREFIX}"
    assert text == filled(wanted, example, key_of(text))
    asked = written(chat, example.prompt[-example.question_length :])
    assert asked.startswith("\nWhat is the") and asked.endswith(" text is:")


def test_several_keys_and_values(plain):
    wanted = Needles(keys=3, queries=2, values=2)
    facts = ENGLISH.facts(rng(), wanted)
    example = hide(rng(), plain, 2000, ENGLISH, wanted, facts)
    text = written(plain, example.prompt)
    a, b, c = dict.fromkeys(key for key, _ in facts)
    assert text.startswith("Some special magic numbers are hidden within the following text. Make")
    assert text.endswith(
        f"\nWhat are all the special magic numbers for {a}, and {b} mentioned in the provided text?"
        f" The special magic numbers for {a}, and {b} mentioned in the provided text are:"
    )
    assert text.count(f"numbers for {c} is: ") == 2
    assert sorted(example.answers) == sorted(value for key, value in facts if key != c)
    assert list(example.answers) == sorted(example.answers, key=text.index)
    assert written(plain, example.answer) == " " + ", ".join(example.answers)


def test_two_hops(plain):
    for seed in range(6):
        example = two_hop.generate(rng(seed), plain, 1000, distractors=1)
        text, [thing] = written(plain, example.prompt), example.answers
        a, _, b = text.rpartition(" one of ")[2].removesuffix(" is the").partition(" and ")
        older = max(a, b, key=lambda name: int(text.partition(f" {name} is ")[2][:2]))
        assert f" {older}'s favorite thing is the {thing}." == written(
            plain, example.prompt[slice(*example.span)]
        )
        question = f"\nWhat is the favorite thing of the older one of {a} and {b}?"
        prefix = f" The favorite thing of the older one of {a} and {b} is the"
        assert text.endswith(question + prefix) and len(thing.split()) == 2
        assert text.count("favorite thing is the ") == text.count(" years old.") == 3
    longer = two_hop.generate(rng(), plain, 1000, answer_length=4)
    assert len(longer.answers[0].split()) == 4


@pytest.mark.parametrize("generate", [needle.generate, two_hop.generate])
def test_the_length_is_exact_in_both_forms(plain, chat, generate):
    for vocab in (plain, chat):
        for length in (700, 2001):
            example = generate(rng(), vocab, length, distractors=1, depth=0.5)
            assert len(example.prompt) == length
            middle = sum(example.span) / 2 / length
            assert abs(middle - 0.5) < 0.2
        shortest = len(generate(rng(), vocab, None).prompt)
        with pytest.raises(ValueError, match=f"got length 30, expected ≥ {shortest}"):
            generate(rng(), vocab, 30)


def test_a_language_is_what_the_tokenizer_can_write(plain, chat):
    embedded = TokenizerVocabulary(to_transformers(WordVocabulary(), 512))
    assert language_of(embedded) is language_of(WordVocabulary()) is WORDS
    for scheme in ("first", "always", "never", "normalizer"):
        assert language_of(TokenizerVocabulary(sentencepiece(scheme))) is ENGLISH
    assert language_of(plain) is language_of(chat) is ENGLISH
    with pytest.raises(ValueError, match=r"can write neither .One of the special"):
        language_of(TokenizerVocabulary(word_piece()))
    few = ("mary", "velvet", "'s", "favorite", "thing", "is", ".", "question", ":", "what", "the")
    small = WordVocabulary((*words.SPECIAL, *few, "of", "?", "answer"))
    assert language_of(small) is WORDS
    with pytest.raises(ValueError, match="the tokenizer cannot write '"):
        needle.generate(rng(), small, 64)
    # Copying needs no language.
    assert repeated_spans.generate(rng(), small, 64).prompt[0] == small.bos_id


def test_examples_have_the_lengths_of_their_language(plain):
    for task, sizes in (("needle", {1}), ("two_hop", {2}), ("repeated_spans", set(range(1, 13)))):
        for example in make_examples(task, plain, 4, 900):
            said = example.answers[0].split() if example.answers else example.answer
            assert len(example.prompt) == 900 and len(said) in sizes
    digits = {len(e.answers[0]) for e in make_examples("needle", plain, 20, 900, 0, (3, 5))}
    assert digits == {3, 4, 5}
    lengths = {len(e.answer) for e in make_examples("needle", WordVocabulary(), 40, 96)}
    assert min(lengths) <= 3 and max(lengths) >= 10


def test_numbers_are_different_and_few_enough():
    assert sorted(numbers_of(rng(), 9, 1)) == list("123456789")
    with pytest.raises(ValueError, match="got 91 different numbers of 2 digits, expected ≤ 90"):
        numbers_of(rng(), 91, 2)


def test_generated_sentences_are_english():
    told = [sentence(rng(seed)) for seed in range(200)]
    assert len(set(told)) > 190
    for text in told:
        assert text[0].isupper() and text.endswith(".") and "{" not in text
        # "a" stands before nouns only, and no noun begins with a vowel.
        assert not any(f" a {vowel}" in text.lower() for vowel in "aeiou")


@pytest.mark.parametrize("vocab", ["plain", "sentencepiece", "words"])
def test_many_texts_at_once_have_the_ids_of_each(plain, vocab):
    vocab = {
        "plain": plain,
        "sentencepiece": TokenizerVocabulary(sentencepiece()),
        "words": WordVocabulary(),
    }[vocab]
    texts = ["mary sees the river .", "A tower, and a fox."]
    assert [list(ids) for ids in vocab.encode_each(texts)] == list(map(vocab.encode, texts))
    assert vocab.encode_each([]) == []


def test_a_haystack_must_be_long_enough(plain, tmp_path):
    (tmp_path / "page.txt").write_text("The whale swims far. " * 20)
    filler = read_haystack(tmp_path / "page.txt", plain)
    example = needle.generate(rng(), plain, 700, filler=filler)
    text = written(plain, example.prompt).removeprefix(INSTRUCTION)
    assert text.replace(written(plain, example.prompt[slice(*example.span)]), "").startswith(
        " The whale swims far. The whale"
    )
    with pytest.raises(ValueError, match=r"haystack page\.txt has 420 tokens, expected ≥ \d+"):
        needle.generate(rng(), plain, 1000, filler=filler)


def test_models_that_put_no_bos_before_a_text_get_none(plain):
    """Some tokenizers name a BOS that begins chats only, such as <|im_start|>."""
    assert plain.bos_id is None and plain.tokenizer.bos_token == "<s>"
    assert TokenizerVocabulary(sentencepiece()).bos_id == 1


@pytest.mark.parametrize("estimator", ["enhanced_retrieval", "retrieval_reasoning"])
def test_head_importance_asks_the_same_questions(chat, estimator):
    """In the chat template where the tokenizer has one, else raw."""
    for vocab, begins in ((chat, "<s><|user|>\n"), (TokenizerVocabulary(byte_level()), "")):
        for example in grid_examples(vocab.tokenizer, Grid(estimator, 3, 1500)):
            text = written(vocab, example.prompt)
            intro, _, rest = text.removeprefix(begins).partition("\n ")
            assert text.startswith(begins) and intro.endswith(" afterwards.")
            turn = rest.rpartition("?")[2].removeprefix(TURN if begins else " ")
            assert turn.startswith(("The special magic", "The favorite thing"))
            told = written(vocab, example.prompt[slice(*example.span)])
            assert example.answers[0] in told and not example.then_eos


@pytest.mark.data
@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_with_real_tokenizers(data_dir, name):
    if not (data_dir / "tokenizers").is_dir():
        pytest.skip("no tokenizers in the test data")
    tokenizer = packed(data_dir, name)
    tokenizer.chat_template = CHAT
    for form in (False, True):
        vocab = TokenizerVocabulary(tokenizer, form)
        assert language_of(vocab) is ENGLISH
        bare = needle.generate(rng(), vocab, None)
        wanted = f"<s><|user|>\n{ONE}{TURN}{PREFIX}" if form else f"{ONE} {PREFIX}"
        text = written(vocab, bare.prompt)
        assert text == filled(wanted, bare, key_of(text))
        example = needle.generate(rng(), vocab, 1024, distractors=2)
        assert len(example.prompt) == 1024
        # The number has the tokens in the answer that it has in the needle, and RULER's own.
        told = example.prompt[slice(*example.span)]
        places = range(len(told) - len(example.answer) + 1)
        assert any(told[at : at + len(example.answer)] == example.answer for at in places)
        assert written(vocab, example.answer) == f" {example.answers[0]}"


@pytest.mark.data
def test_the_texts_are_those_of_ruler(data_dir):
    """Rows that the benchmark's own script made have the same instruction, needle and question."""
    if not (data_dir / "ruler").is_dir():
        pytest.skip("no RULER rows in the test data")
    from kvjax.data_files import open_file

    row = open_file(data_dir / "ruler" / "niah_multikey_3.jsonl.gz")[0]
    wording = ENGLISH.wording(Needles(key="uuid", value="uuid"))
    key = row["input"].rpartition("uuid for ")[2].partition(" mentioned")[0]
    before, after, prefix = wording.parts(key=key)
    assert row["input"].startswith(before)
    assert f"{row['input']}:".endswith(f"{after} {prefix}")  # RULER has no colon there
    [value] = row["outputs"]
    assert wording.needle.format(key=key, value=value) in row["input"]
