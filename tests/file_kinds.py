"""Tiny files of every kind that kvjax reads, with what reads them. Nothing here compiles."""

import dataclasses
import gzip
import json
import lzma
from dataclasses import dataclass
from pathlib import Path

import gguf_files
import jax
import numpy as np
from llama_toy import TINY
from toys import random_params

import kvjax
from eval import predictions, suites
from eval.report import runs as report_runs
from kvjax import context, folders, runs
from kvjax.cache import DenseCache, ModelCache, Pool
from kvjax.cache.channels import KeyChannels
from kvjax.commands.score import finished_batches
from kvjax.commands.unfinished import ConversionFolder
from kvjax.data_files import open_rows
from kvjax.headkv.measure import BatchImportance
from kvjax.hf import gguf, native, weights
from kvjax.hf.config import config_from_hf, read_config
from kvjax.identity import Identity
from kvjax.nn import Transformer
from kvjax.policies.importance import HeadScores, load_scores
from kvjax.policies.need import NeedCurves, load_need
from pallas_kernels.packed import Packed, packed_bytes
from train import log
from train.compare.config import read_compare
from train.finetune import config as finetune
from train.pretrain.curriculum import read_curriculum

ROOT = Path(__file__).parents[1]
LLAMA = {
    **TINY,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": [2],
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
MOE = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "truncate": True},
    "layer_types": ["full_attention", "full_attention"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
    "decoder_sparse_step": 1,
    "use_sliding_window": False,
}
GEMMA = {
    **LLAMA,
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 4,
    "sliding_window": 8,
    "sliding_window_pattern": 2,
    "rope_local_base_freq": 10000.0,
    "final_logit_softcapping": None,
    "rope_scaling": None,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
PHI = {
    **LLAMA,
    "model_type": "phi3",
    "original_max_position_embeddings": 32,
    "partial_rotary_factor": 1.0,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 6.0]},
}
MLA = {
    **LLAMA,
    "model_type": "deepseek_v3",
    "rope_scaling": None,
    "first_k_dense_replace": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
}
MODEL = Transformer(config_from_hf(LLAMA))
GQA = MODEL.config.layers[0].attention
SETTINGS = {"seed": 0, "model": {"name": "m"}}
SUITE = """\
title: Toy
model: builtin:needle
runs:
  - name: needle
    command: needle
    policies: [full, "snapkv:kv_size=12"]
    options: {lengths: [96], limit: 2}
  - name: speed
    command: latency
    options: {contexts: [64, 96], new_tokens: 4, repeats: 1}
"""
TUNE = "model: m\ndata: [plain:a.jsonl]\nlearning_rate: 1e-3\nepochs: 1\ndtype: bfloat16\n"
COMPARE = "model: m\narms: [gqa, mla_identity]\nrates: [1e-3, 3e-3]\nsteps: 8\nwarmup: 0.1\n"
CURRICULUM = """\
seed: 0
learning_rate: 2e-3
model: {hidden_size: 16, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8, mlp_width: 16,
  max_position_embeddings: 64}
stages:
  - episodes: {length: 24, people: [2, 3], answer_length: [1, 1], questions: 3, kinds: {thing: 1}}
    batch_size: 2
    max_steps: 4
    rehearses: null
"""
PREDICTION = {
    "id": "q0",
    "group": "g",
    "policy": "full",
    "prompt_tokens": 9,
    "truncated": False,
    "text": "an answer",
    "score": 0.5,
    "cache_bytes": 512,
    "full_cache_bytes": 512,
}
SCORE = {"score": 0.5, "standard_error": 0.1, "items": 4}
RESULTS = {
    "task": "needle",
    "model": "m",
    "protocol": "generate",
    "items": 4,
    "versions": {"jax": "0"},
    "policies": [
        {
            "policy": "full",
            "all": SCORE,
            "groups": {"x": SCORE},
            "kept": {"64": [[3, 4]]},
            "cache_bytes": 9.0,
            "summary": {"a": 1},
        }
    ],
}


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        files: bytes by name.
        read: (folder) → what the files hold.
        spoilt: the file that is spoilt.
        repairs: reading may cut a torn last line off.
    """

    files: dict
    read: object
    spoilt: str
    repairs: bool = False


def as_bytes(value):
    return json.dumps(value).encode()


def as_lines(*values):
    return b"".join(as_bytes(value) + b"\n" for value in values)


def folder_of(write, folder):
    """The bytes of the files that a function writes into a folder."""
    folder.mkdir()
    write(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def open_weights(folder):
    return weights.open_params(MODEL, folder, np.dtype(np.float32))


def pool():
    ints = {"starts": [[[0, 3], [6, 9]]], "kept": [[[3, 3], [3, 3]]]}
    tables = {name: jax.device_put(np.asarray(value, np.int32)) for name, value in ints.items()}
    rows = jax.device_put(np.ones((1, 12, 4), np.float32))
    length = jax.device_put(np.asarray([9], np.int32))
    of_kept = {"capacities": tables["kept"], "rings": tables["kept"]}
    return Pool(k=rows, v=rows, **tables, **of_kept, lengths=length, read=length)


def packed(*axes):
    """4-bit rows of four numbers."""
    return Packed(jax.device_put(np.zeros((*axes, packed_bytes(4)), np.uint8)), 4)


def save_context(folder):
    length = jax.device_put(np.asarray([9], np.int32))
    rows = jax.device_put(np.ones((1, 2, 9, 4), np.float32))
    model = Identity("llama-0123456789ab", "float32", {"embedding": "0123456789ab"})
    own = ModelCache((DenseCache(rows, rows, length),) * 2, (), length, (None, None))
    pooled = ModelCache((None, None), (pool(),), length, ((0, 0), (0, 1)))
    bits = packed(1, 2, 9)
    layer = DenseCache(bits, bits, length, channels=KeyChannels.empty((1, 2, 4)))
    small = ModelCache((layer, layer), (), length, (None, None))
    bits = packed(1, 12)
    channels = KeyChannels.empty((1, 2, 2, 4))
    packed_pool = dataclasses.replace(pool(), k=bits, v=bits, channels=channels)
    small_pool = ModelCache((None, None), (packed_pool,), length, ((0, 0), (0, 1)))
    files = {"own.kv": own, "pool.kv": pooled, "int4.kv": small, "pool4.kv": small_pool}
    for name, cache in files.items():
        context.Context(cache, 9, "full", model).save(folder / name)


def save_conversion(folder):
    request = {"model": "m", "dtype": "float32"}
    inside = ConversionFolder(folder, request)
    inside.finished = type(inside.finished)(
        (GQA,), (), {"x": jax.device_put(np.ones((2, 3), np.float32))}
    )
    inside._write_progress()


def everything(rows):
    return [rows[i] for i in range(len(rows))]


def kinds(place):
    """All kinds of files.

    Args:
        place: a folder for files that other functions write.
    """
    model, params = MODEL, random_params(MODEL)
    one = folder_of(lambda f: kvjax.save(model, params, f, layout="hf"), place / "one")
    many = folder_of(
        lambda f: kvjax.save(model, params, f, layout="hf", max_shard_bytes=6000), place / "many"
    )
    scores = HeadScores(np.random.default_rng(0).random((2, 4, 3)), {"model": "m"})
    heads = folder_of(lambda f: scores.save(f / "heads.json"), place / "heads")
    curves = NeedCurves(np.asarray([0, 2, 4]), np.ones((2, 2, 3)), np.zeros((2, 2, 3)), {})
    need = folder_of(lambda f: curves.save(f / "a.need.json"), place / "need")
    contexts = folder_of(save_context, place / "contexts")
    conversion = folder_of(save_conversion, place / "conversion")
    raw = gguf_files.COMMON | {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 40}
    file = folder_of(lambda f: gguf_files.folder_with(f, raw | {"head_dim": 8}), place / "gguf")
    generation = as_bytes({"eos_token_id": [2, 3], "temperature": 0.6})
    batch = {"indices": [0, 1], "heads": np.ones((2, 2, 4)).tolist(), "answers": [1.0, 1.0]}
    packed = {".gz": gzip.compress, ".xz": lzma.compress}
    rows = as_lines({"text": "a"}, {"text": "b"})
    index = "model.safetensors.index.json"
    shard = sorted(name for name in many if name.endswith("2-of-00004.safetensors"))[0]
    kvjax_json = as_bytes({"version": native.VERSION, "model": native.encode(MODEL.config)})
    latent = Transformer(config_from_hf(MLA)).config
    found = {
        f"config of {raw['model_type']}": Kind(
            {"config.json": as_bytes(raw), "generation_config.json": generation},
            read_config,
            "config.json",
        )
        for raw in (LLAMA, MOE, GEMMA, PHI, MLA)
    }
    return found | {
        "generation config": Kind(
            {"config.json": as_bytes(LLAMA), "generation_config.json": generation},
            read_config,
            "generation_config.json",
        ),
        "safetensors": Kind(one, open_weights, "model.safetensors"),
        "index": Kind(many, open_weights, index),
        "shard": Kind(many, open_weights, shard),
        "kvjax.json": Kind({"kvjax.json": kvjax_json}, native.read_config, "kvjax.json"),
        "kvjax.json of latents": Kind(
            {"kvjax.json": as_bytes({"version": 2, "model": native.encode(latent)})},
            native.read_config,
            "kvjax.json",
        ),
        "head scores": Kind(
            heads, lambda f: load_scores(f / "heads.json", MODEL.config), "heads.json"
        ),
        "packed head scores": Kind(
            {"heads.json.gz": gzip.compress(heads["heads.json"])},
            lambda f: load_scores(f / "heads.json.gz", MODEL.config),
            "heads.json.gz",
        ),
        "meta of head scores": Kind(
            heads, lambda f: load_scores(f / "heads.json"), "heads.meta.json"
        ),
        "need": Kind(need, lambda f: load_need(f / "a.need.json", MODEL.config), "a.need.json"),
        "context": Kind(contexts, lambda f: read_context(f / "own.kv"), "own.kv"),
        "context with a pool": Kind(contexts, lambda f: read_context(f / "pool.kv"), "pool.kv"),
        "int4 context": Kind(contexts, lambda f: read_context(f / "int4.kv"), "int4.kv"),
        "int4 context with a pool": Kind(
            contexts, lambda f: read_context(f / "pool4.kv"), "pool4.kv"
        ),
        "conversion": Kind(
            conversion,
            lambda f: ConversionFolder(f, {"model": "m", "dtype": "float32"}),
            "unfinished.safetensors",
        ),
        "record of a command": Kind(
            {"config.json": b"{}", folders.MADE: as_bytes({"request": SETTINGS, "report": {}})},
            lambda f: folders.made(f, SETTINGS),
            folders.MADE,
        ),
        "GGUF": Kind(file, lambda f: gguf.read_config(f / "model.gguf"), "model.gguf"),
        "settings of a run": Kind(
            {"config.json": as_bytes(SETTINGS)},
            lambda f: runs.check_same(runs.read_settings(f / "config.json"), SETTINGS, f"{f}", ""),
            "config.json",
        ),
        "predictions": Kind(
            {"predictions.jsonl": as_lines(PREDICTION, PREDICTION | {"id": "q1"})},
            lambda f: predictions.read(f / "predictions.jsonl", ["full"], {"q0": "g", "q1": "g"}),
            "predictions.jsonl",
            repairs=True,
        ),
        "results": Kind(
            {"results.json": as_bytes(RESULTS)}, lambda f: report_runs.find([f]), "results.json"
        ),
        "log of training": Kind(
            {"metrics.jsonl": as_lines({"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0})},
            lambda f: (report_runs.find([f]), log.read(f / "metrics.jsonl")),
            "metrics.jsonl",
        ),
        "finished batches": Kind(
            {"heads.partial.jsonl": as_lines({"model": "m"}, batch, batch)},
            lambda f: finished_batches(f / "heads.partial.jsonl", {"model": "m"}, BatchImportance),
            "heads.partial.jsonl",
            repairs=True,
        ),
        "suite": Kind({"suite.yaml": SUITE.encode()}, read_suite, "suite.yaml"),
        "settings of fine-tuning": Kind(
            {"run.yaml": TUNE.encode()}, lambda f: finetune.read_config(f / "run.yaml"), "run.yaml"
        ),
        "settings of a comparison": Kind(
            {"run.yaml": COMPARE.encode()}, lambda f: read_compare(f / "run.yaml"), "run.yaml"
        ),
        "curriculum": Kind(
            {"run.yaml": CURRICULUM.encode()}, lambda f: read_curriculum(f / "run.yaml"), "run.yaml"
        ),
        "rows": Kind(
            {"a.jsonl": rows}, lambda f: everything(open_rows(str(f / "a.jsonl"))), "a.jsonl"
        ),
        "rows of an array": Kind(
            {"a.json": b'[{"text": "a"}, {"text": "b"}]'},
            lambda f: everything(open_rows(str(f / "a.json"))),
            "a.json",
        ),
        **{
            f"rows packed as {end}": Kind(
                {f"a.jsonl{end}": pack(rows)},
                lambda f, end=end: everything(open_rows(str(f / f"a.jsonl{end}"))),
                f"a.jsonl{end}",
            )
            for end, pack in packed.items()
        },
    }


def read_context(path):
    """`kvjax.load_context` without the comparison of the weights, which would compile."""
    found = context._read(path)
    context.check_cache(found.cache, MODEL.config, str(path))
    return found


def read_suite(folder):
    suite = suites.read(folder / "suite.yaml")
    return [run.build(folder / "out") for run in suite.runs]
