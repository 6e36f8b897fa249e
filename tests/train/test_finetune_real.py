"""GSM8K in MetaMath's form and MBPP in SC2's, on a real checkpoint, from files to merged model."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest

import kvjax
from kvjax import transmla
from kvjax.hf.source import copy_companions
from train import log
from train.finetune.config import TuneConfig
from train.finetune.run import finetune

pytestmark = pytest.mark.data

SOURCES = {
    "gsm8k": "gsm8k:{}/gsm8k/train.jsonl.gz",
    "backward": "gsm8k_backward:{}/metamath/GSM8K_Backward.jsonl.gz",
    "mbpp": "mbpp:{}/mbpp/mbpp.jsonl.gz",
}


@pytest.fixture(scope="module")
def converted(data_dir, tmp_path_factory):
    """stories260k with the paper's conversion, on disk."""
    out = tmp_path_factory.mktemp("stories") / "mla"
    source = data_dir / "checkpoints" / "stories260k"
    model, params = kvjax.load(source, dtype="float32")
    kvjax.save(*transmla.convert(model, params), out)
    copy_companions(source, out)
    return out


@pytest.mark.parametrize("names", [["gsm8k", "backward"], ["mbpp"]])
def test_end_to_end(converted, data_dir, tmp_path, names):
    config = TuneConfig(
        model=str(converted),
        data=tuple(SOURCES[name].format(data_dir) for name in names),
        sequence_length=512,
        batch_size=2,
        steps=6,
        max_rows=40,
        learning_rate=1e-2,
        warmup=0.1,
        log_every=1,
        dtype="float32",
        merge=True,
    )
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore")
        report = finetune(config, tmp_path)
    losses = [line["loss"] for line in log.read(tmp_path / "metrics.jsonl")]
    assert len(losses) == 6
    assert np.mean(losses[-2:]) < np.mean(losses[:2]) - 0.2
    assert 0 < report["learned_tokens"] < report["tokens"] <= 6 * 2 * 512
    model, params = kvjax.load(report["model"], dtype="float32")
    out = kvjax.generate(model, params, [[1, 40, 50]], max_new_tokens=4, eos_ids=())
    assert len(out.tokens[0]) == 4
    assert (tmp_path / "model" / "tokenizer.json").exists()
    assert dataclasses.asdict(config)["train"] == ("kv_only",)
