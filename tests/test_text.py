"""The text that new tokens add: exact, whole characters only, the same in pieces."""

import random

import pytest
from tokenizer_toys import byte_level, packed, sentencepiece, suffixed, unigram, word_piece

import kvjax
from kvjax.text import LONGEST, TextStream, added_text

CODE = ('def f(x):\n    """ Twice. """\n', "    return x + x\n\n\tab  # the end\n")
TALK = ("Where is mary ?", " In the kitchen , or n't . ")
LETTERS = ("日本", "語 ok 😀😀 é e\u0301")
LOSSLESS = {
    "first": sentencepiece(),
    "always": sentencepiece("always"),
    "never": sentencepiece("never"),
    "normalizer": sentencepiece("normalizer"),
    "no strip": sentencepiece("never", strip=False),
    "unigram": unigram(),
    "byte level": byte_level(),
    "clean-up": byte_level(clean_up_tokenization_spaces=True),
}


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(tokenizer, prompt, new, size=1):
    stream = TextStream(tokenizer, prompt)
    parts = [stream.add(new[start : start + size]) for start in range(0, len(new), size)]
    return [*parts, stream.end()]


def split(tokenizer, prompt, answer):
    """The prompt's ids, and those that stand after them where both are encoded at once."""
    ids, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + answer)["input_ids"]
    assert whole[: len(ids)] == ids
    return ids, whole[len(ids) :]


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("texts", [CODE, TALK, LETTERS])
def test_an_answer_is_what_it_adds_to_the_prompt(name, texts):
    tokenizer = LOSSLESS[name]
    prompt, new = split(tokenizer, *texts)
    assert added_text(tokenizer, prompt, new) == texts[1]
    for size in (1, 2, 7):
        parts = pieces(tokenizer, prompt, new, size)
        assert "".join(parts) == texts[1] and not any("\ufffd" in part for part in parts)


def test_the_space_that_decoding_the_answer_alone_drops():
    tokenizer = LOSSLESS["first"]
    prompt, new = split(tokenizer, "def f(x):\n", "    return x\n")
    assert tokenizer.decode(new, skip_special_tokens=True) == "   return x\n"
    assert added_text(tokenizer, prompt, new) == "    return x\n"


@pytest.mark.parametrize("tokenizer", [word_piece(), suffixed()])
def test_words_whose_spaces_are_guessed(tokenizer):
    whole = tokenizer("mary so ret x not return", add_special_tokens=False)["input_ids"]
    for at in range(1, len(whole)):
        expected = decoded(tokenizer, whole).removeprefix(decoded(tokenizer, whole[:at]))
        assert added_text(tokenizer, whole[:at], whole[at:]) == expected
        assert "".join(pieces(tokenizer, whole[:at], whole[at:])) == expected


def test_spaces_before_punctuation_stay_on_both_sides_of_the_border():
    tokenizer = word_piece(clean_up_tokenization_spaces=True)
    prompt, new = ([tokenizer.convert_tokens_to_ids(t) for t in part] for part in (["mary"], ".,!"))
    assert tokenizer.decode(prompt + new) == "mary.,!"
    assert added_text(tokenizer, prompt, new) == " . , !"


def test_special_tokens_are_not_text():
    tokenizer = LOSSLESS["first"]
    bos, eos, user, end = (tokenizer.convert_tokens_to_ids(t) for t in (
        "<s>", "</s>", "<|user|>", "<|end|>"
    ))  # fmt: skip
    word = tokenizer.encode(" x", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(word) == ["▁x"]
    assert added_text(tokenizer, [bos], word) == "x"  # begins the text
    assert added_text(tokenizer, [bos, *word, user, end], word) == " x"
    assert added_text(tokenizer, [bos, *word, *[end] * 100], [eos, *word, end, *word]) == " x x"
    assert added_text(tokenizer, [bos, end], [end, *word, *word]) == "x x"
    assert added_text(tokenizer, [bos, *word], [end] * 60 + word) == " x"
    assert added_text(tokenizer, [bos, *word], []) == added_text(tokenizer, [bos], []) == ""
    assert added_text(tokenizer, word, [len(tokenizer) + 5, *word]) == " x"  # a padded vocabulary


def test_spaces_that_begin_a_text():
    tokenizer = LOSSLESS["first"]
    space, word = (tokenizer.convert_tokens_to_ids(t) for t in ("▁", "▁x"))
    for new in ([space, word], [word], [space, space, word, space]):
        assert added_text(tokenizer, [1], new) == decoded(tokenizer, [1, *new])
        assert "".join(pieces(tokenizer, [1], new)) == decoded(tokenizer, [1, *new])


@pytest.mark.parametrize("name", ["first", "byte level", "unigram"])
@pytest.mark.parametrize(
    "text", ["a\ufffd", "\ufffd", "\ufffd" * 40, "\ufffdé\ufffd\ufffd你", "\x00"]
)
def test_replacement_characters_of_the_text_come_out(name, text):
    tokenizer = LOSSLESS[name]
    prompt, new = split(tokenizer, "so", text)
    assert added_text(tokenizer, prompt, new) == text
    assert "".join(pieces(tokenizer, prompt, new)) == text


@pytest.mark.parametrize("name", ["first", "byte level"])
def test_characters_that_are_not_completed(name):
    tokenizer = LOSSLESS[name]
    prompt, new = split(tokenizer, "so", "你好")
    parts = pieces(tokenizer, prompt, new[:5])
    assert "".join(parts[:-1]) == "你" and set(parts[-1]) == {"\ufffd"}
    broken = added_text(tokenizer, prompt, [*new[:4], tokenizer.convert_tokens_to_ids("x")])
    assert broken == "你\ufffdx"


@pytest.mark.parametrize("name", ["first", "byte level"])
@pytest.mark.parametrize("before", ["so", "你你你你你你你"])
def test_a_prompt_that_ends_within_a_character(name, before):
    tokenizer = LOSSLESS[name]
    prompt, new = split(tokenizer, before, "你 x")
    for at in (1, 2):
        begun, rest = prompt + new[:at], new[at:]
        assert added_text(tokenizer, begun, rest) == "你 x"
        assert added_text(tokenizer, begun, []) == ""
        assert added_text(tokenizer, begun, new[3:]) == " x"  # the character is given up


def test_tokens_that_all_end_within_a_character():
    """Byte-level merges across characters: a token is the end of one and the start of the next."""
    e, n, b = (byte_level().tokenize(c) for c in "好你本")
    merges = [(e[2], n[0]), (n[1], n[2]), (n[1] + n[2], n[0]), (e[1], b[2])]
    tokenizer = byte_level(merges=merges)
    prompt, new = split(tokenizer, "x", "你" * 12 + "x")
    inner = [tokenizer.convert_ids_to_tokens(index) for index in new]
    assert inner.count(n[1] + n[2] + n[0]) == 11
    assert added_text(tokenizer, prompt, new) == "".join(pieces(tokenizer, prompt, new))
    assert added_text(tokenizer, prompt, new) == "你" * 12 + "x"


@pytest.mark.parametrize("name", LOSSLESS)
def test_any_tokens_in_pieces_of_any_size(name):
    tokenizer = LOSSLESS[name]
    rng = random.Random(0)
    for _ in range(30):
        ids = [rng.randrange(len(tokenizer)) for _ in range(40)]
        prompt, new = ids[: rng.randrange(1, 20)], ids[20:]
        text = added_text(tokenizer, prompt, new)
        for size in (1, 3):
            assert "".join(pieces(tokenizer, prompt, new, size)) == text
        whole, before = decoded(tokenizer, prompt + new), decoded(tokenizer, prompt)
        if "\ufffd" not in whole:
            assert text == whole[len(before) :]


def test_a_token_costs_the_same_wherever_it_stands():
    class Counting:
        def __init__(self, tokenizer):
            self.tokenizer, self.ids = tokenizer, 0

        def decode(self, ids, **settings):
            self.ids += len(ids)
            return self.tokenizer.decode(ids, **settings)

    tokenizer = LOSSLESS["first"]
    for text in (" x" * 500, "é你" * 100, "\ufffd" * 150):
        prompt, new = split(tokenizer, "so " * 500 + "so", text)
        counting = Counting(tokenizer)
        assert added_text(counting, prompt, new) == text
        assert counting.ids < 40 * len(new) + 500
    assert LONGEST < 40


@pytest.mark.data
@pytest.mark.parametrize("name", ["stories260k", "gpt2", "qwen2"])
def test_humaneval_s_solutions_after_their_prompts(data_dir, name):
    from eval.task import TaskOptions
    from eval.tasks.code import humaneval
    from kvjax.text import ids_after, prompt_ids

    stories = name == "stories260k"
    tokenizer = (
        kvjax.load_tokenizer(data_dir / "checkpoints" / name) if stories else packed(data_dir, name)
    )
    items = humaneval.load(TaskOptions(data_dir, settings={"unsafe": "1"})).items
    assert len(items) == 164
    for item in items:
        prompt, [solution] = prompt_ids(tokenizer, item.prompt), item.references
        new = ids_after(tokenizer, solution)
        assert added_text(tokenizer, prompt, new) == solution
        if not stories:
            assert new == tokenizer.encode(solution)
