"""Long-context tasks: small files of the tests' own, and the real ones where they are."""

import copy
import gzip
import json
import lzma

import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from eval import metrics
from eval.task import Item, TaskOptions
from eval.tasks import babilong, longbench, longchat, loogle, ruler
from kvjax import data_files
from kvjax.tasks import english

GENERATED = [name for name in ruler.MAX_NEW_TOKENS if name not in ruler.QUESTIONS]


def byte_tokenizer(vocabulary=None, merges=()):
    """A byte-level tokenizer; without a vocabulary every byte is a token, <bos> in front."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    own = {letter: index for index, letter in enumerate(["<bos>", *letters])}
    bpe = tokenizers.models.BPE(vocab=vocabulary or own, merges=list(merges))
    fast = tokenizers.Tokenizer(bpe)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    if not vocabulary:
        start = {"single": "<bos> $A", "special_tokens": [("<bos>", 0)]}
        fast.post_processor = tokenizers.processors.TemplateProcessing(**start)
    bos = None if vocabulary else "<bos>"
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token=bos)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def write(path, *values):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(value) + "\n" for value in values)
    packs = {".gz": gzip.compress, ".xz": lzma.compress}
    path.write_bytes(packs.get(path.suffix, bytes)(content.encode()))
    return path


def options(data_dir=None, **changes):
    return TaskOptions(data_dir=data_dir, **changes)


class TestLongBench:
    @pytest.fixture
    def folder(self, tmp_path):
        place = tmp_path / "longbench"
        prompts = dict.fromkeys(longbench.SUBSETS, "Read {context} and say {input}:")
        write(place / "dataset2prompt.json", prompts)
        write(place / "dataset2maxlen.json", dict.fromkeys(longbench.SUBSETS, 9))
        row = {"input": "Q", "context": "C {x}", "answers": ["right one", "other"]}
        write(place / "qasper.jsonl", row, row)
        write(place / "trec.jsonl.xz", {**row, "answers": ["City"], "all_classes": ["City", "Man"]})
        return tmp_path

    def test_items(self, folder):
        task = longbench.load(options(folder))
        assert [item.id for item in task.items] == ["qasper-0", "qasper-1", "trec-0"]
        first, last = task.items[0], task.items[-1]
        assert first.prompt == "Read C {x} and say Q:"
        assert (first.max_new_tokens, first.group) == (9, "qasper")
        assert first.meta == {} and last.meta == {"chat": False, "classes": ["City", "Man"]}
        assert len(longbench.load(options(folder, limit=1)).items) == 2
        assert task.truncate == "middle"

    def test_the_best_reference_and_the_first_line_count(self, folder):
        qa, _, classes = longbench.load(options(folder)).items
        assert longbench.score(qa, "other") == 1
        assert longbench.score(qa, "right") == pytest.approx(2 / 3)
        assert longbench.score(classes, "\nCity\nMan") == 1
        assert longbench.score(classes, "Man\nCity") == 0

    def test_summary(self, folder):
        task = longbench.load(options(folder))
        scores = [1.0, 0.0, 1.0]
        found = longbench.summary([(i, "", s) for i, s in zip(task.items, scores, strict=True)])
        assert found["macro_average"] == 0.75
        assert found["metrics"] == {"qasper": "qa_f1", "trec": "classification"}

    def test_the_summary_says_when_chinese_was_cut_by_characters(self, monkeypatch):
        item = Item("vcsum-0", "", ("今天",), 1, "vcsum")
        monkeypatch.setattr(metrics, "jieba_cut", lambda: None)
        found = longbench.summary([(item, "今天", 1.0)])
        assert found["metrics"] == {"vcsum": "rouge_zh_chars"} and "jieba" in found["note"]

    def test_all_21_tasks_have_a_metric(self):
        assert len(longbench.SUBSETS) == 21
        chatless = {name for name, subset in longbench.SUBSETS.items() if not subset.chat}
        assert chatless == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}

    def test_errors(self, folder, tmp_path):
        with pytest.raises(ValueError, match="has no nothing, expected some of narrativeqa"):
            longbench.load(options(folder, subsets=("nothing",)))
        with pytest.raises(ValueError, match=r"lcc\.jsonl .*expected the rows of LongBench's lcc"):
            longbench.load(options(folder, subsets=("lcc",)))
        with pytest.raises(ValueError, match="give config=FOLDER"):
            longbench.load(options())
        with pytest.raises(ValueError, match=r"no .*dataset2prompt\.json: put"):
            longbench.load(options(tmp_path / "elsewhere"))
        write(folder / "longbench" / "lcc.jsonl", {"input": "", "context": ""})
        with pytest.raises(ValueError, match=r"lcc\.jsonl, line 1: no 'answers'"):
            longbench.load(options(folder))


class TestLooGLE:
    @pytest.fixture
    def folder(self, tmp_path):
        kinds = ("computation", "timeline_reorder")
        pairs = [
            {"Q": "q", "A": a, "S": "", "type": t}
            for a, t in zip(("5", "2,1,3"), kinds, strict=True)
        ]
        place, row = tmp_path / "loogle", {"input": "text", "output": "none"}
        write(place / "longdep_qa.jsonl", {**row, "qa_pairs": repr(pairs)})
        masks = {"<mask-0>": "Kentwood", "<mask-1>": "Justin T."}
        pairs = [{"Q": "<mask-0> and <mask-1>", "A": masks}]
        write(place / "shortdep_cloze.jsonl", {**row, "qa_pairs": repr(pairs)})
        write(place / "longdep_summarization.jsonl", {**row, "output": "a b c"})
        # The hub's form: a row a question.
        flat = {"context": "text", "question": "q", "answer": "the answer", "task": "shortdep_qa"}
        write(place / "shortdep_qa.jsonl", flat)
        return tmp_path

    def test_scores(self, folder):
        task = loogle.load(options(folder))
        computation, order, plain, cloze, summary = task.items
        assert computation.group == "longdep_qa/computation"
        assert loogle.score(computation, "5") == 1
        for written in (r"\boxed{5}", "**5**", "$5$", "\uff15"):
            assert loogle.score(computation, written) == 1
        assert loogle.score(order, "The order is 2, 1, 3.") == 1
        assert loogle.score(order, "2,3,1") == 0
        assert loogle.score(plain, "answer") == 1
        assert loogle.score(cloze, "<mask-0>: Kentwood\n<mask-1>: Justin") == 0.5
        assert loogle.score(cloze, "{'<mask-0>': 'Kentwood', '<mask-1>': 'Justin T.'}") == 1
        assert loogle.score(cloze, "Kentwood") == 0
        assert loogle.score(summary, "a b") == pytest.approx(0.8)
        assert plain.prompt[:11] == "Text:\ntext\n" and "Question: q\nAnswer:" in plain.prompt

    def test_summary(self, folder):
        task = loogle.load(options(folder))
        answers = ["5", "1,2,3", "the", "<mask-0>: nobody\n<mask-1>: Justin", "a b c"]
        found = loogle.summary([(i, a, 0.0) for i, a in zip(task.items, answers, strict=True)])
        assert found["location_mean_deviation"] == pytest.approx(2 / 3)
        assert found["cloze_partial_match"] == 0.5
        assert found["qa_rouge_l"] == pytest.approx((1 + 2 / 3) / 2)
        assert found["metrics"]["longdep_qa/timeline_reorder"] == "exact_order"

    def test_missing_events_are_far_off(self):
        assert loogle.location_deviation([], [1, 2]) == 2
        assert loogle.location_deviation([2, 1], [1, 2]) == 1

    def test_errors(self, folder):
        with pytest.raises(ValueError, match="LooGLE has no x"):
            loogle.load(options(folder, subsets=("x",)))
        bad = {"input": "text", "qa_pairs": "[{'Q': 'q'"}
        write(folder / "loogle" / "shortdep_qa.jsonl", bad)
        with pytest.raises(ValueError, match=r"shortdep_qa\.jsonl, line 1: .* not a Python value"):
            loogle.load(options(folder))


def babi(task, target, question="Where?"):
    return Item("", "", (target,), 1, meta={"task": task, "question": question})


class TestBABILong:
    @pytest.mark.parametrize(
        ("item", "text", "expected"),
        [
            (babi("qa1", "kitchen"), "kitchen", 1),
            (babi("qa1", "kitchen"), "\nMary is in the Kitchen. Then the garden.", 1),
            (babi("qa1", "kitchen"), "kitchen\ngarden", 1),
            (babi("qa1", "kitchen"), "the kitchen or the garden", 0),
            (babi("qa1", "kitchen"), "garden", 0),
            (babi("qa1", "kitchen"), "", 0),
            (babi("qa3", "kitchen", "Before the garden?"), "kitchen, before the garden", 1),
            (babi("qa6", "no"), "I know: yes", 0),
            (babi("qa6", "yes"), "I know: yes", 1),
            (babi("qa7", "none"), "none", 1),
            (babi("qa1", "kitchen"), "__kitchen__", 1),
            (babi("qa1", "kitchen"), "**Kitchen**", 1),
            (babi("qa8", "apple,football"), "football and apple", 1),
            (babi("qa8", "apple,football"), "apple", 0),
            (babi("qa19", "s,e"), "s,e", 1),
            (babi("qa19", "s,e"), "South, then east.", 1),
            (babi("qa19", "s,e"), "e,s", 0),
        ],
    )
    def test_score(self, item, text, expected):
        assert babilong.score(item, text) == expected

    def test_lengths_and_tasks(self, tmp_path):
        row = {"task": "qa1", "input": "facts", "question": "Where? ", "target": "garden"}
        write(tmp_path / "babilong" / "babilong_0k.jsonl.xz", row, {**row, "task": "qa2"})
        write(tmp_path / "babilong" / "babilong_4k.jsonl", row, row)
        task = babilong.load(options(tmp_path))
        assert [item.id for item in task.items] == ["0k-qa1-0", "0k-qa2-0", "4k-qa1-0", "4k-qa1-1"]
        assert task.items[0].group == "0k/qa1" and "facts" in task.items[0].prompt
        assert len(babilong.load(options(tmp_path, lengths=(4096,), limit=1)).items) == 1
        assert len(babilong.load(options(tmp_path, lengths=(0,), subsets=("qa2",))).items) == 1
        with pytest.raises(ValueError, match="no length 3000"):
            babilong.load(options(tmp_path, lengths=(3000,)))
        with pytest.raises(ValueError, match=r"babilong_8k\.jsonl"):
            babilong.load(options(tmp_path, lengths=(8000,)))
        with pytest.raises(ValueError, match="has no rows of qa3"):
            babilong.load(options(tmp_path, lengths=(0,), subsets=("qa3",)))
        with pytest.raises(ValueError, match="BABILong has no qa21"):
            babilong.load(options(tmp_path, subsets=("qa21",)))


class TestLongChat:
    def test_score(self, tmp_path):
        write(tmp_path / "longchat" / "lines_20.jsonl", {"prompt": "p", "expected_number": 42})
        (item,) = longchat.load(options(tmp_path)).items
        assert longchat.score(item, "In line 3 it is <42>.\nIn line 4 it is 7.") == 1
        assert longchat.score(item, "421") == 0
        large = Item("", "", ("12345",), 1)
        for written in ("12,345", "**12345**", r"\boxed{12{,}345}", "12\u202f345", "<12345>."):
            assert longchat.score(large, f"In line 3 it is {written}") == 1
        assert longchat.score(Item("", "", ("2",), 1), "1,2") == 1  # a list
        assert longchat.score(item, "none") == 0
        write(tmp_path / "longchat" / "lines_25.jsonl", {"prompt": "p", "expected_number": "4x"})
        with pytest.raises(ValueError, match="line 1: 'expected_number' is '4x', expected digits"):
            longchat.load(options(tmp_path))
        with pytest.raises(ValueError, match=r"lines_30\.jsonl"):
            longchat.load(options(tmp_path, lengths=(30,)))
        with pytest.raises(ValueError, match="give --data-dir"):
            longchat.load(options())


class TestRULER:
    @pytest.mark.parametrize("name", GENERATED)
    @pytest.mark.parametrize("length", [3001, 9000])
    def test_prompts_have_their_length_and_answers(self, tokenizer, name, length):
        found = options(tokenizer=tokenizer, lengths=(length,), count=2, subsets=(name,))
        items = ruler.load(found).items
        assert items == ruler.load(found).items
        assert items[0].prompt != items[1].prompt
        for item in items:
            assert len(item.prompt) == length
            assert item.prompt[0] == tokenizer.bos_token_id not in item.prompt[1:]
            text = tokenizer.decode(item.prompt)
            assert all(answer in text for answer in item.references)
            assert ruler.score(item, " and ".join(item.references).upper()) == 1
            assert ruler.score(item, "") == 0
            few = ruler.score(item, item.references[0])
            assert few == pytest.approx(1 / len(item.references))

    @pytest.mark.parametrize(
        ("name", "answers"),
        [("niah_multivalue", 4), ("niah_multiquery", 4), ("vt", 5), ("cwe", 10)],
    )
    def test_numbers_of_answers(self, tokenizer, name, answers):
        found = options(tokenizer=tokenizer, lengths=(3000,), count=1, subsets=(name,))
        (item,) = ruler.load(found).items
        assert len(set(item.references)) == answers

    def test_the_words_asked_for_are_those_that_occur_most_often(self, tokenizer):
        found = options(tokenizer=tokenizer, lengths=(9000,), count=1, subsets=("cwe", "fwe"))
        for item, times in zip(ruler.load(found).items, (30, None), strict=True):
            text = tokenizer.decode(item.prompt).rpartition("\n\nQuestion")[0].rpartition("\n\n")[2]
            counts = {word: text.split().count(word) for word in {*text.split()} - {"..."}}
            top = sorted(counts, key=counts.__getitem__)[-len(item.references) :]
            assert set(top) == set(item.references)
            assert times is None or {counts[word] for word in top} == {times}

    def test_a_chain_of_variables_leads_to_the_value(self, tokenizer):
        found = options(tokenizer=tokenizer, lengths=(2000,), count=1, subsets=("vt",))
        (item,) = ruler.load(found).items
        text = tokenizer.decode(item.prompt)
        places = [text.index(f"Set {name} to") for name in item.references]
        assert places == sorted(places)

    def test_an_essay_is_the_haystack(self, tokenizer, tmp_path):
        essay = tmp_path / "essay.txt.gz"
        essay.write_bytes(gzip.compress(b"The whale swims far. " * 500))
        found = options(
            tokenizer=tokenizer,
            lengths=(2000,),
            count=1,
            subsets=("niah_single_2",),
            settings={"haystack": str(essay)},
        )
        (item,) = ruler.load(found).items
        assert len(item.prompt) == 2000
        assert tokenizer.decode(item.prompt).count("The whale swims far.") > 50

    def test_questions_of_local_files(self, tokenizer, tmp_path):
        contexts = [f"Paragraph {i} tells that river {i} is {i}00 miles long." for i in range(60)]
        qas = [
            [{"question": f"How long is river {i}?", "answers": [{"text": f"{i}00 miles"}]}]
            for i in range(60)
        ]
        qas[0].append({"question": "Unanswerable?", "answers": [], "is_impossible": True})
        paragraphs = [{"context": c, "qas": q} for c, q in zip(contexts, qas, strict=True)]
        squad = write(tmp_path / "squad.json", {"data": [{"paragraphs": paragraphs}]})
        context = [[f"River {i}", [f"It is {i} miles.", " It flows."]] for i in range(90)]
        row = {
            "question": "Which is longer?",
            "answer": "River 7",
            "context": context,
            "supporting_facts": [["River 7", 0], ["River 3", 0]],
        }
        hotpot = tmp_path / "hotpot.json"
        hotpot.write_text(json.dumps([row]))
        found = options(
            tokenizer=tokenizer,
            lengths=(2000,),
            count=3,
            subsets=("qa_1", "qa_2"),
            settings={"squad": str(squad), "hotpotqa": str(hotpot)},
        )
        items = ruler.load(found).items
        assert [len(item.prompt) for item in items] == [2000] * 6
        for item in items:
            text = tokenizer.decode(item.prompt)
            assert all(reference in text for reference in item.references)
            assert ruler.score(item, f"It is {item.references[0]}, I think") == 1
        assert "River 3. It is 3 miles. It flows." in tokenizer.decode(items[-1].prompt)
        hotpot.write_text("{}")
        with pytest.raises(ValueError, match="no questions with answers"):
            ruler.load(found)
        squad.write_text("[]")
        with pytest.raises(ValueError, match="not in SQuAD's format"):
            ruler.load(found)

    def test_ready_files(self, tmp_path):
        row = {"input": "Which is it? It", "answer_prefix": " is", "outputs": [7], "index": 0}
        write(tmp_path / "ruler" / "niah_single_1.jsonl.gz", row)
        (item,) = ruler.load(options(tmp_path)).items
        assert item.prompt == "Which is it? It is" and item.references == ("7",)
        write(tmp_path / "ruler" / "vt.jsonl", {**row, "outputs": "ABCDE"})  # no five letters
        with pytest.raises(ValueError, match="line 1: 'outputs' is 'ABCDE', expected a list"):
            ruler.load(options(tmp_path))
        assert ruler.summary([(item, "", 0.0)])["tasks"] == ["niah_single_1"]

    def test_errors(self, tokenizer, tmp_path):
        with pytest.raises(ValueError, match="RULER has no x"):
            ruler.load(options(subsets=("x",)))
        with pytest.raises(ValueError, match="give lengths in tokens"):
            ruler.load(options(tmp_path))
        with pytest.raises(ValueError, match="a tokenizer is needed"):
            ruler.load(options(lengths=(4096,)))
        with pytest.raises(ValueError, match=r"vt at 99 tokens: got length 99, expected ≥"):
            ruler.load(options(tokenizer=tokenizer, lengths=(99,), subsets=("vt",)))
        with pytest.raises(ValueError, match=r"cwe at 500 tokens: got length 500, expected ≥"):
            ruler.load(options(tokenizer=tokenizer, lengths=(500,), subsets=("cwe",)))
        with pytest.raises(ValueError, match=r"give squad=FILE"):
            ruler.load(options(tokenizer=tokenizer, lengths=(500,), subsets=("qa_1",)))
        missing = {"haystack": str(tmp_path / "none.txt")}
        with pytest.raises(ValueError, match=r"no haystack file at .*none\.txt"):
            ruler.load(options(tokenizer=tokenizer, lengths=(500,), settings=missing))

    def test_more_words_than_there_are(self):
        with pytest.raises(ValueError, match="expected ≤"):
            english.words_of(np.random.default_rng(0), english.POOL + 1)

    def test_the_beginning_of_the_answer_begins_the_turn(self, tokenizer):
        chats = copy.deepcopy(tokenizer)
        chats.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}Answer> "
        found = options(tokenizer=chats, lengths=(4000,), count=1, chat=True)
        for item in ruler.load(found).items:
            text = tokenizer.decode(item.prompt)
            assert len(item.prompt) == 4000 and text.startswith("[")
            question, turn, begun = text.rpartition("?]Answer> ")
            assert turn and question.count("[") == 1 and begun.endswith(("is", "are"))
            asked = tokenizer.decode(item.prompt[-item.meta["question_tokens"] :])
            assert asked.startswith("\n") and asked.endswith(begun)

    def test_keys_of_the_haystack_are_not_asked_for(self, tokenizer):
        found = options(tokenizer=tokenizer, lengths=(3000,), count=1, subsets=("niah_multikey_2",))
        (item,) = ruler.load(found).items
        text = tokenizer.decode(item.prompt)
        key = text.partition("What is the special magic number for ")[2].partition(" mention")[0]
        assert text.count(f"One of the special magic numbers for {key} is: ") == 1
        assert text.count("One of the special magic numbers for ") > 30


@pytest.mark.data
class TestRealFiles:
    """Everything loads whole; right answers score 1, another item's less."""

    @staticmethod
    def check(task, step=1):
        ids = [item.id for item in task.items]
        assert len(set(ids)) == len(ids)
        chosen = task.items[::step]
        for item in chosen:
            assert isinstance(item.prompt, str) and item.prompt and item.max_new_tokens > 0
            assert task.score(item, item.references[0]) == pytest.approx(1), item.id
            assert task.score(item, "") == 0
        if task.summary is not None:
            assert task.summary([(item, item.references[0], 1.0) for item in chosen[:20]])

    @staticmethod
    def needs(data_dir, name):
        if not (data_dir / name).is_dir():
            pytest.skip(f"no {name} in the test data")

    def test_longbench(self, data_dir):
        self.needs(data_dir, "longbench")
        task = longbench.load(options(data_dir))
        sizes = {name: sum(i.group == name for i in task.items) for name in longbench.SUBSETS}
        assert {name: size for name, size in sizes.items() if size} == {
            "multifieldqa_zh": 200,
            "multi_news": 200,
            "passage_retrieval_zh": 200,
        }
        for item in task.items:  # the lengths of the benchmark
            wanted = {"multi_news": 512, "multifieldqa_zh": 64, "passage_retrieval_zh": 32}
            assert item.max_new_tokens == wanted[item.group]
        self.check(task, step=9)
        # Near misses: another item's answer, and half of the right one.
        for one, other in zip(task.items[::20], task.items[1::20], strict=True):
            if one.references != other.references:
                assert task.score(one, other.references[0]) < 1

    def test_loogle(self, data_dir):
        self.needs(data_dir, "loogle")
        task = loogle.load(options(data_dir))
        groups = [item.group.partition("/")[0] for item in task.items]
        assert {name: groups.count(name) for name in loogle.SUBSETS} == {
            "longdep_qa": 43,
            "shortdep_qa": 80,
            "shortdep_cloze": 94,
            "longdep_summarization": 5,
        }
        self.check(task)

    def test_babilong(self, data_dir):
        self.needs(data_dir, "babilong")
        task = babilong.load(options(data_dir))
        assert len(task.items) == 2000 + 3 * 1000
        self.check(task)
        for item in task.items:
            labels = {*babilong.LABELS[item.meta["task"]]} - {*item.references[0].split(",")}
            wrong = sorted(labels - {item.references[0]})[0]
            assert task.score(item, wrong) == 0
            both = f"{item.references[0]} {wrong}"
            named = wrong.lower() in item.meta["question"].lower()  # which an answer may repeat
            assert item.meta["task"] == "qa19" or task.score(item, both) == float(named)

    def test_longchat(self, data_dir):
        self.needs(data_dir, "longchat")
        task = longchat.load(options(data_dir))
        assert len(task.items) == 150
        self.check(task)
        assert all(f"<{item.references[0]}>" in item.prompt for item in task.items)
        assert task.score(task.items[0], task.items[1].references[0]) == 0

    def test_ruler(self, data_dir):
        self.needs(data_dir, "ruler")
        task = ruler.load(options(data_dir))
        assert len(task.items) == 500 and not task.chat
        self.check(task)
        assert all(item.references[0] in item.prompt for item in task.items)
        assert task.score(task.items[0], task.items[1].references[0]) == 0

    def test_ruler_in_tokens_of_a_real_tokenizer(self, data_dir):
        self.needs(data_dir, "tokenizers")
        self.needs(data_dir, "text")
        place = data_dir / "tokenizers"
        vocabulary = json.loads(data_files.read_text(place / "gpt2_vocab.json.gz"))
        lines = data_files.read_text(place / "gpt2_merges.txt.gz").split("\n")
        lines = [line for line in lines if line and not line.startswith("#version")]
        merges = [tuple(line.split(" ")) for line in lines]
        real = byte_tokenizer(vocabulary, merges)
        found = options(
            tokenizer=real,
            lengths=(1024, 4096),
            count=1,
            settings={"haystack": str(data_dir / "text" / "tinyshakespeare.txt.gz")},
        )
        items = ruler.load(found).items
        assert len(items) == 22
        for item in items:
            assert len(item.prompt) == int(item.group.split("/")[1])
            text = real.decode(list(item.prompt))
            assert all(answer in text for answer in item.references)
