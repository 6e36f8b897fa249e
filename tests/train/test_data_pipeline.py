"""Packed batches: documents apart, targets and weights, mixing, state, processes."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from data_rows import config, plain_rows, word_tokenizer, write

from train.data import count_batches, make_loader, summary
from train.data.documents import Encoder

TOKENIZER = word_tokenizer()


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "a.jsonl", plain_rows(200))


def documents(batches):
    """Every document of the batches, as its tokens and the tokens learned in it."""
    found = []
    for batch in batches:
        for tokens, segments, targets, weights in zip(
            *(batch[key] for key in ("tokens", "segment_ids", "targets", "weights")), strict=True
        ):
            for segment in range(1, segments.max() + 1):
                here = segments == segment
                found.append((tuple(tokens[here]), tuple(targets[here][weights[here] > 0])))
    return found


def encoded(rows, learn="answers"):
    encode = Encoder(TOKENIZER, "plain", "auto", learn)
    found = [encode(row) for row in rows]
    return [(tuple(d.tokens), tuple(d.tokens[1:][d.learned[1:]])) for d in found]


def same(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(np.array_equal(x[key], y[key]) for key in x)
        for x, y in zip(a, b, strict=True)
    )


def test_shapes_and_types(path):
    batch = next(iter(make_loader(config(path), TOKENIZER)))
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "tokens": ((4, 32), "int32"),
        "targets": ((4, 32), "int32"),
        "positions": ((4, 32), "int32"),
        "segment_ids": ((4, 32), "int32"),
        "weights": ((4, 32), "float32"),
    }


def test_documents_are_whole_and_apart(path):
    batches = list(make_loader(config(path), TOKENIZER))
    packed = documents(batches)
    assert Counter(packed) <= Counter(encoded(plain_rows(200)))
    assert len(packed) > 150  # the rest did not fill a batch
    for batch in batches:
        segments, positions = batch["segment_ids"], batch["positions"]
        assert ((positions == -1) == (segments == 0)).all()
        assert (batch["tokens"][segments == 0] == 0).all()
        starts = np.diff(segments, axis=1, prepend=0) > 0
        assert (positions[starts] == 0).all()
        inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        assert (np.diff(positions, axis=1)[inside] == 1).all()
        assert (segments.max(axis=1) > 1).all()


@pytest.mark.parametrize("learn", ["answers", "all"])
def test_targets_are_the_next_token_of_the_document(path, learn):
    batches = list(make_loader(config(path, learn=learn), TOKENIZER))
    for batch in batches:
        segments, targets, weights = (batch[key] for key in ("segment_ids", "targets", "weights"))
        goes_on = np.zeros(segments.shape, bool)
        goes_on[:, :-1] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        following = np.roll(batch["tokens"], -1, axis=1)
        assert (targets[goes_on] == following[goes_on]).all()
        assert (weights[~goes_on] == 0).all() and (targets[~goes_on] == 0).all()
        if learn == "all":
            assert (weights[goes_on] == 1).all()
    assert set(documents(batches)) <= set(encoded(plain_rows(200), learn))


def test_counts(path):
    for options in (
        {},
        {"epochs": 2.5},
        {"batch_size": 7},
        {"sequence_length": 100, "batch_size": 2},
    ):
        data = config(path, **options)
        assert count_batches(data, TOKENIZER) == len(list(make_loader(data, TOKENIZER)))


def test_epochs(path):
    packed = Counter(documents(make_loader(config(path, epochs=3, batch_size=1), TOKENIZER)))
    assert len(packed) == 200
    assert set(packed.values()) <= {2, 3} and packed.total() > 580
    packed = Counter(documents(make_loader(config(path, epochs=0.5, batch_size=1), TOKENIZER)))
    assert set(packed.values()) == {1} and 90 < packed.total() <= 100


def test_order_follows_from_the_seed(path):
    first, again, other = (list(make_loader(config(path, seed=s), TOKENIZER)) for s in (3, 3, 4))
    assert same(first, again)
    assert not same(first[:1], other[:1])
    twice = documents(make_loader(config(path, epochs=2, batch_size=1), TOKENIZER))
    assert twice[:50] != twice[200:250]  # each epoch has an order of its own


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.2, 0.8)])
def test_sources_are_mixed_by_weight(tmp_path, weights):
    paths = [
        write(tmp_path / "a.jsonl", plain_rows(300)),
        write(tmp_path / "b.jsonl", plain_rows(300, first=300)),
    ]
    data = config(*paths, weights=weights, batch_size=1)
    first = set(encoded(plain_rows(300)))
    packed = documents(make_loader(data, TOKENIZER))
    share = weights[0] / sum(weights)
    assert len(packed) == pytest.approx(600, abs=10)
    assert np.mean([d in first for d in packed]) == pytest.approx(share, abs=0.01)
    assert np.mean([d in first for d in packed[:200]]) == pytest.approx(share, abs=0.05)
    found = summary(data, TOKENIZER)
    assert [s.epochs for s in found.sources] == pytest.approx([2 * share, 2 - 2 * share])


def test_weights_as_sizes_see_every_row_equally_often(tmp_path):
    paths = [
        write(tmp_path / "a.jsonl", plain_rows(300)),
        write(tmp_path / "b.jsonl", plain_rows(100, first=300)),
    ]
    data = config(*paths, weights=(300, 100), batch_size=1, epochs=2)
    packed = Counter(documents(make_loader(data, TOKENIZER)))
    assert len(packed) == 400 and set(packed.values()) <= {1, 2} and packed.total() > 790


def test_an_iterator_goes_on_where_another_stopped(tmp_path):
    paths = [
        write(tmp_path / "a.jsonl", plain_rows(300)),
        write(tmp_path / "b.jsonl", plain_rows(100, first=300)),
    ]
    loader = make_loader(config(*paths, epochs=1.7), TOKENIZER)
    iterator = iter(loader)
    everything, states = [], [iterator.get_state()]
    for batch in iterator:
        everything.append(batch)
        states.append(json.loads(json.dumps(iterator.get_state())))
    assert len(everything) > 22  # 64 rows are packed at a time: 16 batches
    for at in (0, 1, 7, 15, 16, 17, 21, len(everything)):
        fresh = iter(make_loader(config(*paths, epochs=1.7), TOKENIZER))
        fresh.set_state(states[at])
        count = 3 if at < 15 else None
        assert same(list(itertools.islice(fresh, count)), everything[at:][:count])
    iterator.set_state(states[5])
    assert same([next(iterator)], everything[5:6])


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_rows(path, count):
    data = config(path, epochs=3, batch_size=4)
    expected = count_batches(data, TOKENIZER, count)
    parts = []
    for index in range(count):
        batches = list(make_loader(data, TOKENIZER, index, count))
        assert len(batches) == expected
        assert batches[0]["tokens"].shape == (4 // count, 32)
        parts.append(set(documents(batches)))
    rows = encoded(plain_rows(200))
    for index, part in enumerate(parts):
        assert part == set(rows[index::count])
    assert sum(map(len, parts)) == len(set.union(*parts)) == 200


def test_errors(path, tmp_path):
    with pytest.raises(ValueError, match="batch_size is 4, expected a multiple of the 3 processes"):
        make_loader(config(path), TOKENIZER, 0, 3)
    with pytest.raises(ValueError, match="process_index is 2, expected 0 to 1"):
        make_loader(config(path), TOKENIZER, 2, 2)
    few = write(tmp_path / "few.jsonl", plain_rows(3))
    with pytest.raises(ValueError, match=r"fill 1 rows of 32 .* at least 4, one batch"):
        make_loader(config(few), TOKENIZER)
    with pytest.raises(ValueError, match=r"got 3 usable rows, .* each of the 4 processes"):
        count_batches(config(few), TOKENIZER, 4)


def test_long_rows(tmp_path, caplog):
    rows = plain_rows(100)
    long = {"query": "who", "response": " ".join(["copper"] * 40)}
    hopeless = {"query": " ".join(["who"] * 40), "response": "copper"}
    path = write(tmp_path / "a.jsonl", [*rows, long, hopeless])
    found = summary(config(path), TOKENIZER)
    assert (found.rows, found.dropped, found.sources[0].too_long) == (102, 2, 2)
    assert "2 of 102 rows have more than 32 tokens; 2 rows are left out" in caplog.text
    kept = encoded(rows)
    assert found.tokens == sum(len(tokens) for tokens, _ in kept)
    assert found.learned_tokens == sum(len(learned) for _, learned in kept)
    assert found.batches == count_batches(config(path), TOKENIZER)
    assert "102 rows, 2 too long, 2 dropped" in str(found)

    data = config(path, long_rows="truncate", batch_size=1)
    found = summary(data, TOKENIZER)
    assert (found.dropped, found.sources[0].too_long) == (1, 2)
    longest = max(documents(make_loader(data, TOKENIZER)), key=lambda d: len(d[0]))
    copper = TOKENIZER.convert_tokens_to_ids("copper")
    assert len(longest[0]) == 32 and longest[1] == (copper,) * 30


def test_only_long_rows(path):
    message = r"got 200 rows of 5 to 8 tokens, expected some .* sequence_length=4: raise it, or set"
    with pytest.raises(ValueError, match=message):
        summary(config(path, sequence_length=4), TOKENIZER)


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, plain_rows(50))
    assert summary(config(path), TOKENIZER).rows == 50
    write(path, plain_rows(60))
    assert summary(config(path), TOKENIZER).rows == 60
