"""An exported directory as engines find it: files, index, tokenizer, generation defaults."""

import dataclasses
import json
import shutil
import warnings
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import kvjax
from kvjax.commands.checkpoints import export_checkpoint
from kvjax.hf import check_export
from kvjax.hf.deepseek.checks import stock_tensors
from kvjax.hf.source import copy_companions
from kvjax.nn import Transformer
from kvjax.tasks.words import WordVocabulary, to_transformers

pytest.importorskip("torch")
from tiny_checkpoints import CASES, build, torch_logits

pytestmark = pytest.mark.parity

VOCAB = WordVocabulary()
TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}mary"
CHAT = [{"role": "user", "content": "where is mary ?"}]
PROMPT = list(range(4, 20))
STEPS = 12
SHARD = 20_000
FAST = dataclasses.replace(kvjax.transmla.BEST, refit=False)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A llama with biases, tokenizer and defaults, converted, then exported in shards.

    Its generation_config.json adds the sixth token of the greedy text to the EOS ids.
    """
    root = tmp_path_factory.mktemp("serving")
    source, mla, out = root / "llama", root / "mla", root / "out"
    build({"model_type": "llama", "attention_bias": True, "vocab_size": VOCAB.size}, source)
    tokenizer = to_transformers(VOCAB, 64)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(source)
    (source / "LICENSE").write_text("free\n")
    model, params = kvjax.load(source, dtype="float32")
    rows = np.random.default_rng(6).integers(3, VOCAB.size, (8, 32)).astype(np.int32)
    stats = kvjax.transmla.calibrate(model, params, [rows])
    sizes = {"kv_rank": 20, "rope_dim": 4, "exportable": True, "recipe": FAST}
    model, params = kvjax.transmla.convert(model, params, method="decoupled", stats=stats, **sizes)
    free = kvjax.generate(model, params, [PROMPT], STEPS, eos_ids=()).tokens[0]
    eos = [2, next(t for t in free[5:] if t not in free[:5])]
    defaults = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": eos}
    text = json.dumps({**defaults, "bos_token_id": 1, "transformers_version": "4.0.0"})
    (source / "generation_config.json").write_text(text)
    model = Transformer(dataclasses.replace(model.config, eos_ids=tuple(eos)))
    kvjax.save(model, params, mla)
    copy_companions(source, mla)
    report = export_checkpoint(str(mla), out, "neutral", None, 0, "float32", SHARD)
    return SimpleNamespace(
        source=source, out=out, model=model, params=params, free=free, eos=eos, report=report
    )


@pytest.fixture(scope="module")
def stock(served):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM

        model, info = AutoModelForCausalLM.from_pretrained(
            served.out, attn_implementation="eager", output_loading_info=True
        )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def test_the_index_names_every_tensor_once_and_counts_the_bytes(served):
    from safetensors import safe_open

    index = json.loads((served.out / "model.safetensors.index.json").read_text())
    held, total = {}, 0
    for path in sorted(served.out.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            total += sum(file.get_tensor(name).nbytes for name in names)
        assert not held.keys() & set(names)
        held |= dict.fromkeys(names, path.name)
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == total == served.report["bytes"]
    assert len(set(held.values())) == served.report["files"] > 3


def test_every_file_an_engine_reads(served):
    assert {path.name for path in served.out.iterdir() if path.suffix != ".safetensors"} == {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "LICENSE",
        "KVJAX_NOTICE.md",
        "kvjax_made.json",
    }
    assert "`attention_bias`" in (served.out / "KVJAX_NOTICE.md").read_text()


def test_the_stock_class_has_the_same_logits(served, stock):
    tokens = np.asarray([PROMPT], np.int32)
    want = np.asarray(jax.jit(served.model.apply)({"params": served.params}, tokens)[0])
    got = torch_logits(stock, tokens)
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_the_stock_class_writes_the_same_text_and_ends_it_there(served, stock):
    import torch

    want = kvjax.generate(served.model, served.params, [PROMPT], STEPS).tokens[0]
    assert served.free[: len(want)] == want and len(want) < STEPS
    ids = torch.tensor([PROMPT])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Nothing but do_sample is given: EOS and padding come from generation_config.json.
        text = stock.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, do_sample=False
        )[0, len(PROMPT) :].tolist()
    assert text == [*want, served.eos[1]]


def test_generation_defaults_of_the_source(served):
    from transformers import GenerationConfig

    kept = json.loads((served.out / "generation_config.json").read_text())
    assert kept == {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "eos_token_id": served.eos,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    config = GenerationConfig.from_pretrained(served.out)
    assert (config.temperature, config.eos_token_id) == (0.6, served.eos)


def test_tokenizer_and_chat_template(served):
    before, after = (kvjax.load_tokenizer(path) for path in (served.source, served.out))
    ids = [t.apply_chat_template(CHAT, tokenize=True)["input_ids"] for t in (before, after)]
    assert ids[0] == ids[1] and len(ids[0]) > 5
    text = "john the kitchen ."
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.decode(after(text)["input_ids"], skip_special_tokens=True) == text
    assert served.report["tokenizer"] == type(after).__name__ and served.report["notes"] == []


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("q_lora_rank", [None, 6])
def test_the_table_of_tensors_is_the_stock_class(q_lora_rank, bias):
    import torch
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    case = {**CASES["deepseek_v3_full_q"], "q_lora_rank": q_lora_rank, "attention_bias": bias}
    case |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 67}
    config = DeepseekV3Config(**case, num_attention_heads=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    want = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert stock_tensors(config.to_dict()) == want


def test_no_table_of_experts():
    with pytest.raises(ValueError, match="first_k_dense_replace is 1, expected 2"):
        stock_tensors({"num_hidden_layers": 2, "first_k_dense_replace": 1})
    with pytest.raises(ValueError, match=r"config\.json has no num_hidden_layers"):
        stock_tensors({})


# --- Damage ---------------------------------------------------------------------------------------


def edit(path, change):
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def in_config(change):
    return lambda out: edit(out / "config.json", change)


def in_index(change):
    return lambda out: edit(out / "model.safetensors.index.json", change)


DAMAGE = {
    r"missing shard model-00002-of-": lambda out: next(out.glob("model-00002-*")).unlink(),
    r"old\.safetensors belongs to no index": lambda out: shutil.copy(
        next(out.glob("model-00001-*")), out / "old.safetensors"
    ),
    r"there are model\.safetensors and an index, expected one of them": lambda out: shutil.copy(
        next(out.glob("model-00001-*")), out / "model.safetensors"
    ),
    r"the index does not name model\.layers\.0\.input_layernorm\.weight": in_index(
        lambda raw: raw["weight_map"].pop("model.layers.0.input_layernorm.weight")
    ),
    r"the index says 7 bytes": in_index(lambda raw: raw["metadata"].update(total_size=7)),
    r"kv_a_layernorm\.weight has shape \(21,\), expected \(20,\)": in_config(
        lambda raw: raw.update(kv_lora_rank=20)
    ),
    r"unexpected model\.layers\.0\.self_attn\.kv_a_proj_with_mqa\.bias": in_config(
        lambda raw: raw.update(attention_bias=False)
    ),
    r"missing model\.layers\.2\.": in_config(
        lambda raw: raw.update(num_hidden_layers=3, first_k_dense_replace=3)
    ),
    r"is float32, config\.json says bfloat16": in_config(lambda raw: raw.update(dtype="bfloat16")),
    r"ends texts with \[3\], config\.json with another": lambda out: edit(
        out / "generation_config.json", lambda raw: raw.update(eos_token_id=3)
    ),
    r"no file at .*generation_config\.json": lambda out: (out / "generation_config.json").unlink(),
    r"the tokenizer reads .* where that of": lambda out: edit(
        out / "tokenizer.json", lambda raw: raw.update(normalizer=None)
    ),
    r"holds \['LlamaForCausalLM'\], expected": in_config(
        lambda raw: raw.update(architectures=["LlamaForCausalLM"])
    ),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_the_check_finds(reason, served, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(served.out, out)
    assert check_export(out, served.source)["notes"] == []
    DAMAGE[reason](out)
    with pytest.raises(ValueError, match=reason):
        check_export(out, served.source)


# --- From memory ----------------------------------------------------------------------------------


def test_save_takes_the_companions_from_where_the_model_came(served, tmp_path, monkeypatch):
    monkeypatch.chdir(served.source)  # an unknown source must not mean the working directory
    for source, tokenizer in ((str(served.source), True), ("", False), ("gone", False)):
        out = tmp_path / f"out{len(source)}"
        model = Transformer(dataclasses.replace(served.model.config, source=source))
        kvjax.save(model, served.params, out, layout="deepseek_v3")
        assert (out / "tokenizer.json").exists() == tokenizer
        report = check_export(out)
        assert (report["files"], report["eos"]) == (1, served.eos)
        assert report["notes"] == ([] if tokenizer else ["no tokenizer"])


def test_a_tokenizer_with_another_end_is_noted(served, tmp_path):
    model = Transformer(dataclasses.replace(served.model.config, eos_ids=(5,)))
    kvjax.save(model, served.params, tmp_path / "out", layout="deepseek_v3")
    report = check_export(tmp_path / "out")
    assert report["notes"] == ["the tokenizer's EOS is 2, the model's [5]"]
