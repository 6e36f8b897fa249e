"""Metrics of the long-context benchmarks against values that were computed by hand."""

import re

import pytest

from eval import metrics
from eval.metrics import code_similarity, common_subsequence, exact_match, qa_f1, rouge_l

QA = [
    ("Paris", "Paris", 1),
    ("The Paris.", "paris", 1),
    ("London", "Paris", 0),
    ("in Paris", "Paris", 2 / 3),  # P 1/2, R 1
    ("Paris France", "Paris in France", 4 / 5),  # P 1, R 2/3
    ("red red blue", "red blue blue", 2 / 3),  # one red and one blue of three each
    ("", "Paris", 0),
    ("the a an", "an the", 0),  # nothing but articles
    ("It's 5%", "its 5", 1),
    ("a-1", "a1", 1),  # punctuation goes before articles
    ("one two three four", "four three", 2 / 3),  # P 1/2, R 1
    ("yes it is true", "yes", 2 / 5),  # P 1/4, R 1
    ("Theodore", "the odore", 0),
    ("new   york\ncity", "New York City", 1),
]

ROUGE = [
    ("the cat sat", "the cat sat", 1),
    ("the cat", "the cat sat", 4 / 5),  # P 1, R 2/3
    ("sat cat the", "the cat sat", 1 / 3),  # one word in order
    ("", "the cat", 0),
    ("the cat", "", 0),
    ("...", "the cat", 0),
    ("the the cat", "the cat", 1),  # words count once
    ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 8 / 13),  # Lin: R 4/5; P 4/8
    ("a b. c d", "c d. a b", 1),  # sentences may change places
    ("The cat", "the cat", 1 / 2),  # case counts
    ("police killed the gunman", "police kill the gunman", 3 / 4),
    ("the gunman kill police", "police kill the gunman", 1 / 2),
    ("x y", "a b", 0),
]

CLASSES = ("Sport", "Sport event", "Person", "City")
CLASSIFICATION = [
    ("City", "City", 1),
    ("a City or a Person", "City", 1 / 2),
    ("Person", "City", 0),
    ("Sport event", "Sport event", 1),  # "Sport" is part of the right name
    ("Sport event", "Sport", 1 / 2),
    ("City, Person, Sport", "Sport", 1 / 3),
    ("city", "City", 0),
    ("", "City", 0),
]

COUNT = [
    ("5", "5", 1),
    ("There are 5 different ones of 20", "5", 1 / 2),
    ("five", "5", 0),
    ("15", "5", 0),
    ("5 5 7", "5", 2 / 3),
    ("05", "5", 0),
]

RETRIEVAL = [
    ("Paragraph 12", "Paragraph 12", 1),
    ("12", "Paragraph 12", 1),
    ("Paragraph 1", "Paragraph 12", 0),
    ("Paragraph 12 or Paragraph 3", "Paragraph 12", 1 / 2),
    ("none of them", "Paragraph 12", 0),
]

CODE = [
    ("x = 1", "x = 1", 1),
    ("\n\nx = 1\ny = 2", "x = 1", 1),
    ("# a comment\nx = 1", "x = 1", 1),
    ("// a comment\nx = 1", "x = 1", 1),
    ("```python\nx = 1\n```", "x = 1", 1),
    ("# nothing else", "x = 1", 0),
    ("abcd", "bcde", 3 / 4),  # 2·3 / 8
    ("ab", "abc", 4 / 5),  # 2·2 / 5
    ("abc", "xyz", 0),
    ("x = 2", "x = 1", 4 / 5),  # 2·4 / 10
    ("return a", "return b", 0.88),  # 2·7 / 16 = 0.875, in hundredths
]

# Every character is a word.
QA_ZH = [
    ("厦门大学", "厦门大学。", 1),
    ("厦门", "厦门大学", 2 / 3),  # P 1, R 1/2
    ("北京", "上海", 0),
    ("在厦门大学", "厦门大学", 8 / 9),  # P 4/5, R 1
    ("大学厦门", "厦门大学", 1),
    ("", "厦门", 0),
    ("《红楼梦》", "红楼梦", 6 / 7),  # the opening mark is no punctuation to LongBench
    ("「红楼梦」", "红楼梦", 1),
    ("GPT-4模型", "gpt4模型", 4 / 7),  # gpt 4 模 型, gpt4 模 型
    ("1571 年", "1571年", 1),
    ("天台宗、净土宗", "天台宗", 2 / 3),  # P 3/6, R 1
    ("人人", "人", 2 / 3),
]

ROUGE_ZH = [
    ("今天下雨", "今天下雨", 1),
    ("今天", "今天下雨", 2 / 3),
    ("雨下天今", "今天下雨", 1 / 4),
    ("", "今天", 0),
    ("今天下雪", "今天下雨", 3 / 4),
    ("天天下雨", "今天下雨", 6 / 7),  # 天 下 雨: all of three words, of four
    ("明月", "今天", 0),
    ("今天下雨。", "今天下雨", 8 / 9),  # P 4/5, R 1
]

CLASSES_ZH = ("体育", "国内体育", "财经")
CLASSIFICATION_ZH = [
    ("体育", "体育", 1),
    ("财经和体育", "财经", 1 / 2),
    ("国内体育", "国内体育", 1),
    ("国内体育", "体育", 1 / 2),
    ("科技", "体育", 0),
]

RETRIEVAL_ZH = [
    ("段落27", "段落27", 1),
    ("27", "段落27", 1),
    ("段落2", "段落27", 0),
    ("段落27或段落3", "段落27", 1 / 2),
    ("没有", "段落27", 0),
    ("二十七", "段落27", 0),
]


@pytest.fixture
def by_characters(monkeypatch):
    monkeypatch.setattr(metrics, "jieba_cut", lambda: None)


@pytest.mark.parametrize(("answer", "reference", "expected"), QA)
def test_f1_of_english_answers(answer, reference, expected):
    assert qa_f1(answer, reference) == pytest.approx(expected)


@pytest.mark.parametrize(("answer", "reference", "expected"), ROUGE)
def test_rouge_l(answer, reference, expected):
    assert rouge_l(answer, reference) == pytest.approx(expected)


@pytest.mark.parametrize(("answer", "reference", "expected"), CLASSIFICATION)
def test_classification(answer, reference, expected):
    assert metrics.classification(answer, reference, CLASSES) == pytest.approx(expected)


@pytest.mark.parametrize(("answer", "reference", "expected"), COUNT)
def test_count(answer, reference, expected):
    assert metrics.count(answer, reference) == pytest.approx(expected)


@pytest.mark.parametrize(("answer", "reference", "expected"), RETRIEVAL)
def test_retrieval(answer, reference, expected):
    assert metrics.retrieval(answer, reference) == pytest.approx(expected)


@pytest.mark.parametrize(("answer", "reference", "expected"), CODE)
def test_code_similarity(answer, reference, expected):
    assert code_similarity(answer, reference) == pytest.approx(expected)


@pytest.mark.parametrize(("answer", "reference", "expected"), QA_ZH)
def test_f1_of_chinese_characters(answer, reference, expected, by_characters):
    assert metrics.qa_f1_zh(answer, reference) == pytest.approx(expected)


@pytest.mark.parametrize(("answer", "reference", "expected"), ROUGE_ZH)
def test_rouge_l_of_chinese_characters(answer, reference, expected, by_characters):
    assert metrics.rouge_zh(answer, reference) == pytest.approx(expected)


@pytest.mark.parametrize(("answer", "reference", "expected"), CLASSIFICATION_ZH)
def test_classification_in_chinese(answer, reference, expected):
    assert metrics.classification(answer, reference, CLASSES_ZH) == pytest.approx(expected)


@pytest.mark.parametrize(("answer", "reference", "expected"), RETRIEVAL_ZH)
def test_retrieval_in_chinese(answer, reference, expected):
    assert metrics.retrieval_zh(answer, reference) == pytest.approx(expected)


def test_chinese_is_cut_into_the_words_of_jieba_where_there_is_one(monkeypatch):
    words = re.compile("厦门|大学|今天|下雨|.")
    monkeypatch.setattr(metrics, "jieba_cut", lambda: words.findall)
    # 厦门 学 院 and 厦门 大学: P 1/3, R 1/2
    assert metrics.qa_f1_zh("厦门学院", "厦门大学") == pytest.approx(2 / 5)
    # 今天 下 雪 and 今天 下雨
    assert metrics.rouge_zh("今天下雪", "今天下雨") == pytest.approx(2 / 5)
    assert metrics.metric_name("qa_f1_zh") == "qa_f1_zh"


def test_metrics_of_characters_have_names_of_their_own(by_characters):
    assert metrics.metric_name("qa_f1_zh") == "qa_f1_zh_chars"
    assert metrics.metric_name("rouge_zh") == "rouge_zh_chars"


def test_real_jieba():
    pytest.importorskip("jieba", reason="Chinese words need jieba")
    assert metrics.qa_f1_zh("厦门大学。", "厦门大学") == 1
    assert metrics.metric_name("rouge_zh") == "rouge_zh"


def test_longest_common_subsequence():
    found = common_subsequence("abcbdab", "bdcaba")
    assert len(found) == 4
    for text in ("abcbdab", "bdcaba"):
        rest = iter(text)
        assert all(letter in rest for letter in found)
    assert common_subsequence("", "abc") == []


def test_exact_match_ignores_case_articles_and_punctuation():
    assert exact_match("The Eiffel Tower!", "eiffel tower") == 1
    assert exact_match("Eiffel Towers", "eiffel tower") == 0


def test_a_reference_without_a_number_is_an_error():
    with pytest.raises(ValueError, match="expected 'Paragraph ' and a number"):
        metrics.retrieval("Paragraph 1", "the first")
