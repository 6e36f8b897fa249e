"""lm-evaluation-harness through the compressed cache, against its own transformers model."""

import json
import warnings

import eval_toys
import numpy as np
import pytest
from tokenizer_toys import CHAT, sentencepiece

from eval.likelihood import score_compressed, score_dense
from eval.run import resolve_all
from kvjax.text import ids_after

TASK = """
task: toy_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{data}"}}
  cache_dir: "{cache}"
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
"""


def imported():
    """The harness; its imports warn of their own future."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (the eval extra)")
        from lm_eval.models.huggingface import HFLM
    return lm_eval, HFLM


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return eval_toys.checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(3)

    def words(least, most):
        count = int(rng.integers(least, most))
        return eval_toys.VOCAB.decode(rng.integers(4, eval_toys.VOCAB.size, count).tolist())

    rows = [
        {"text": words(8, 60), "choices": [words(1, 6) for _ in range(3)], "gold": index % 3}
        for index in range(5)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = TASK.format(data=data, cache=folder / "cache")
    (folder / "toy_choice.yaml").write_text(text)
    return folder


def contexts_and_rests():
    rng = np.random.default_rng(0)
    sizes = [(50, 3), (9, 70), (1, 5), (33, 1)]
    ids = [rng.integers(4, eval_toys.VOCAB.size, a + b).tolist() for a, b in sizes]
    return [row[:a] for row, (a, _) in zip(ids, sizes, strict=True)], [
        row[a:] for row, (a, _) in zip(ids, sizes, strict=True)
    ]


def test_full_cache_scores_as_one_forward_pass():
    loaded = eval_toys.loaded()
    contexts, rests = contexts_and_rests()
    policies = resolve_all(["full", "snapkv:kv_size=96", "snapkv:kv_size=12"], loaded.model)
    model, params = loaded.model, loaded.params
    whole = score_dense(model, params, contexts, rests)
    found = [
        score_compressed(model, params, contexts, rests, policy) for policy in policies.values()
    ]
    for same in found[:2]:
        np.testing.assert_allclose(same.log_likelihood, whole.log_likelihood, atol=2e-4)
        np.testing.assert_array_equal(same.greedy, whole.greedy)
    moved = np.abs(found[2].log_likelihood - whole.log_likelihood)
    assert min(moved[0], moved[3]) > 1e-3  # contexts beyond the budget, even for one token
    assert max(moved[1:3]) < 2e-4  # and within
    assert found[2].cache_bytes < found[0].cache_bytes == found[0].full_cache_bytes


def test_agrees_with_transformers(checkpoint, tasks):
    lm_eval, HFLM = imported()
    import kvjax
    from eval.harness_model import CompressedLM
    from eval.lm_eval import task_manager
    from eval.run import LoadedModel

    tokenizer = kvjax.load_tokenizer(checkpoint)
    loaded = LoadedModel("toy", *kvjax.load(checkpoint, dtype="float32"), tokenizer)
    full = resolve_all(["full"], loaded.model)["full"]

    def answers(model):
        manager = task_manager(["toy_choice"], tasks)
        found = lm_eval.simple_evaluate(
            model=model, tasks=["toy_choice"], task_manager=manager, bootstrap_iters=0
        )
        return found["samples"]["toy_choice"]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=4)
        wanted = answers(reference)
        ours = [answers(CompressedLM(loaded, full, way, batch_size=4)) for way in (False, True)]
        text = [_Request((eval_toys.VOCAB.decode(range(4, 204)),))]
        limits = {"batch_size": 4, "max_length": 64}
        short = HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", **limits)
        rolled = short.loglikelihood_rolling(text)
    for found in ours:
        assert len(found) == len(wanted) == 5
        for mine, theirs in zip(found, wanted, strict=True):
            for (value,), (other,) in zip(mine["resps"], theirs["resps"], strict=True):
                assert value[0] == pytest.approx(other[0], abs=1e-4)
                assert value[1] == other[1]
    model = CompressedLM(loaded, full, **limits)
    assert model.loglikelihood_rolling(text) == pytest.approx(rolled, abs=5e-4)


def test_command_writes_a_run(checkpoint, tasks, tmp_path):
    imported()
    from eval.lm_eval import HarnessCommand, measure
    from eval.report.runs import find

    policies = ("full", "snapkv:kv_size=12")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        command = HarnessCommand(
            str(checkpoint),
            ("toy_choice",),
            policies,
            out=tmp_path / "run",
            include_path=tasks,
            limit=3,
            dtype="float32",
        )
        report = measure(command, ["lm-eval"])
        with pytest.raises(ValueError, match="no task nothing"):
            measure(HarnessCommand(str(checkpoint), ("nothing",)))
    assert [entry["policy"] for entry in report["policies"]] == list(policies)
    assert report["policies"][0]["all"]["items"] == 3
    assert list(report["policies"][0]["groups"]) == ["toy_choice (acc)"]
    [run] = find([tmp_path / "run"])
    assert run.results == json.loads((tmp_path / "run" / "results.json").read_text())


def test_answers_end_at_stops(checkpoint):
    imported()
    import kvjax
    from eval.harness_model import CompressedLM
    from eval.run import LoadedModel

    tokenizer = kvjax.load_tokenizer(checkpoint)
    loaded = LoadedModel("toy", *kvjax.load(checkpoint, dtype="float32"), tokenizer)
    policies = resolve_all(
        ["snapkv:kv_size=12", "snapkv:kv_size=12,compression_interval=4"], loaded.model
    )
    small, bounded = policies.values()
    model = CompressedLM(loaded, small, batch_size=2)
    prompts = [eval_toys.VOCAB.decode(range(4, 4 + n)) for n in (20, 40, 9)]
    free = model.generate_until([_Request((p, {"max_gen_toks": 8})) for p in prompts])
    stop = free[1].split()[2]
    settings = [{"max_gen_toks": 8}, {"max_gen_toks": 8, "until": [stop]}, {"max_gen_toks": 8}]
    pairs = zip(prompts, settings, strict=True)
    cut = model.generate_until([_Request(pair) for pair in pairs])
    assert cut == [free[0], free[1].split(stop)[0], free[2]]
    with pytest.raises(ValueError, match="beams"):
        model.generate_until([_Request((prompts[0], {"beams": 2}))])
    with pytest.raises(ValueError, match="compression_interval"):
        CompressedLM(loaded, bounded)


def test_answers_follow_their_prompts(checkpoint, monkeypatch):
    imported()
    from eval import harness_model
    from eval.run import LoadedModel
    from kvjax.generation import Generation

    tokenizer = sentencepiece(end=True, chat_template=CHAT)
    loaded = LoadedModel("toy", eval_toys.loaded().model, eval_toys.loaded().params, tokenizer)
    policy = resolve_all(["full"], loaded.model)["full"]
    model = harness_model.CompressedLM(loaded, policy, batch_size=2)
    assert (
        model.tok_encode("the")
        == model.tok_encode("<s> the")
        == [1, *tokenizer.encode(" the")[1:-1]]
    )
    answer = ids_after(tokenizer, "    return x\n")
    calls = []

    def generate(model, params, prompts, eos_ids, **settings):
        calls.append((prompts, eos_ids))
        return Generation([answer for _ in prompts], 1, 1)

    monkeypatch.setattr(harness_model, "generate", generate)
    found = model.generate_until([_Request(("def f():\n", {"max_gen_toks": 8}))])
    assert found == ["    return x\n"]
    [([prompt], eos_ids)] = calls
    assert prompt == tokenizer.encode("def f():\n")[:-1]
    assert eos_ids == (2, tokenizer.convert_tokens_to_ids("<|end|>"))


class _Request:
    def __init__(self, args):
        self.args = args
