"""The training step of a 7B model through the TPU compiler: `make test-aot`."""

import json
import os

import pytest

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
pytest.importorskip("libtpu", reason="needs libtpu: make test-aot")

from kvjax.capacity.devices import topology_devices
from train.finetune.config import TuneConfig
from train.finetune.dry_run import dry_run

pytestmark = pytest.mark.aot

# Qwen/Qwen2.5-7B
QWEN = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
HBM = {"v5e:8x8": 15.75 * 2**30, "v5p:2x2x4": 95 * 2**30}


@pytest.mark.parametrize("topology, devices", [("v5e:8x8", 64), ("v5p:2x2x4", 16)])
def test_qwen_7b(tmp_path, topology, devices):
    """It fits, and what a device holds is its share of the parameters and two moments."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    config = TuneConfig(
        str(tmp_path / "config.json"), batch_size=devices, sequence_length=2048, remat=True
    )
    report = dry_run(config, topology)
    assert report["devices"].startswith(f"{devices} × TPU")
    assert report["trainable"] == 28 * 2 * (3584 * 512 + 512)
    assert 7.6e9 < report["trainable"] + report["frozen"] < 7.65e9
    assert report["bytes_per_device"] < HBM[topology]
    share = (12 * report["trainable"] + 2 * report["frozen"]) / devices
    assert share < report["argument_bytes"] < 1.1 * share
    # In products with P weights a row of 2048 tokens takes 2·P·T forward, as much backward through
    # the activations, and up to as much again for remat; the compiler counts a loop's body once
    # (logits, tiles of attention). Gradients of frozen weights would be a fourth: there are none.
    assert 3 * 6.5e9 * 2048 < report["flops_per_device"] < 6 * 7.6e9 * 2048


def test_a_topology_that_there_is_not():
    with pytest.raises(ValueError, match="cannot compile for 'v5e:3x5'"):
        topology_devices("v5e:3x5")
