"""Copied spans: what is asked for stood before, after the same cue."""

import numpy as np

from kvjax.tasks import WordVocabulary
from train.pretrain.episodes import CUE, KINDS, EpisodeConfig, make_batch


def test_marked_targets_continue_an_earlier_span():
    config = EpisodeConfig(96, (1, 1), (2, 10), 3, {"copy": 1})
    batch = make_batch(np.random.default_rng(0), WordVocabulary(), config, 32)
    assert (batch.kind == KINDS.index("copy")).all()
    distances = set()
    for tokens, question in zip(batch.tokens, batch.question, strict=True):
        for index in range(3):
            at = np.flatnonzero(question == index)
            start, end = at[0] + 1 - CUE, at[-1] + 2
            span = tokens[start:end]
            assert 2 <= len(at) <= 10 and (np.diff(at) == 1).all()
            sources = [i for i in range(start) if (tokens[i : i + len(span)] == span).all()]
            assert sources and sources[0] + len(span) <= start
            distances.add(start - sources[0])
    assert len(distances) > 30
