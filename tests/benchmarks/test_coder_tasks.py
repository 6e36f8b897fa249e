"""The table of GSM8K and HumanEval with smaller caches."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from meshes import GQA, toy

import kvjax
from benchmarks.coder_tasks_equal import Fed, best_two, compared, first_difference, leaves
from benchmarks.coder_tasks_report import report, sign_test
from kvjax.transmla import convert


def test_the_sign_test():
    assert sign_test(0, 0) == sign_test(3, 3) == 1
    assert sign_test(0, 5) == sign_test(5, 0) == pytest.approx(2 / 32)
    assert sign_test(1, 7) == pytest.approx(2 * 9 / 256)


def line(form, policy, scores, held):
    return {
        "task": "gsm8k",
        "form": form,
        "policy": policy,
        "scores": dict(enumerate(scores)),
        "texts": {number: f"{score}" for number, score in enumerate(scores)},
        "cache_bytes": held,
        "full_cache_bytes": 100,
        **dict.fromkeys(("date", "processor", "cores", "versions", "command"), ""),
        "commit": form[:3],
    }


def test_rows_are_compared_item_by_item(tmp_path):
    lines = [line("original", "full", [1, 1, 0, 0], 100), line("50 %", "full", [0, 1, 1, 0], 50)]
    lines.append(line("original", "full:entries=int8", [1, 1, 0, 0], 26))
    out = tmp_path / "tasks.json"
    out.with_suffix(".jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    report(out)
    _, half, int8 = json.loads(out.read_text())["rows"]
    assert (int8["share"], int8["same_text"]) == (0.52, 4)  # a model in bfloat16 has 50 bytes
    assert (half["lost"], half["won"], half["same_text"]) == (1, 1, 2)
    assert (half["score"], half["change"], half["share"]) == (0.5, 0, 0.5)
    assert "| 50 % | full | 50 % | 50 ± 29 % of 4 |" in out.with_suffix(".md").read_text()


def test_a_converted_model_is_fed_the_original_s_answers():
    model, params = toy(GQA, GQA)
    prompts = [np.random.default_rng(n).integers(1, 60, 20 + 5 * n).tolist() for n in range(3)]
    answers = kvjax.generate(model, params, prompts, 6, eos_ids=()).tokens
    items = [
        Fed(str(n), [*prompt, *answer], len(prompt), ())
        for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    new, new_params = convert(model, params, method="equal_cache")
    # Another output matrix whose best token is often another one.
    other = params | {"embedding": jnp.roll(params["embedding"], 1, axis=0)}
    own = {item.name: (best, gaps) for item, best, gaps in best_two(model, params, items)}
    for second, same in (((new, new_params), 3), ((model, other), 0)):
        found = {item.name: best for item, best, _ in best_two(*second, items)}
        left = [item for item in items if leaves(item, found[item.name])]
        first = [
            (item.name, *first_difference(own[item.name][0], found[item.name], own[item.name][1]))
            for item in left
        ]
        result = compared(items, first)
        assert (result["items"], result["tokens"], result["same"]) == (3, 18, same)
        assert result["tied"] + len(result["different"]) == 3 - same
    for name, (best, gaps) in own.items():
        assert best.shape == (7, 2) and (gaps >= 0).all()
        assert best[:6, 0].tolist() == answers[int(name)]
    # The end counts too, where the answer was not cut.
    ends = [item._replace(ends=(int(own[item.name][0][6, 0]),)) for item in items]
    assert not any(leaves(item, own[item.name][0]) for item in ends)
    assert all(leaves(item._replace(ends=(61,)), own[item.name][0]) for item in items)
