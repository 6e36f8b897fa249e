"""On a mesh, as on one device, a program serves all layers of a kind, all steps and policies."""

import jax
import numpy as np
from compilations import counted
from meshes import GQA, WINDOWED, spread, toy

import kvjax

SHAPE = "data=2,fsdp=2,tensor=2"


def prompts_of(*lengths):
    rng = np.random.default_rng(len(lengths))
    return [rng.integers(0, 64, length).tolist() for length in lengths]


def test_layers_steps_and_policies_share_programs():
    model, params = toy(GQA, GQA, GQA)
    params = spread(model, params, SHAPE)
    jax.clear_caches()
    first, second = prompts_of(40, 33, 47, 35, 48, 40, 39, 41), prompts_of(*range(34, 42))
    with counted() as programs:
        kvjax.generate(model, params, first, 5, "snapkv:kv_size=14,observed=4", eos_ids=())
    prefill = ("read_layer", "rank_heads", "compress_heads", "last_logits")
    for name in (*prefill, "apply_block", "push_token"):
        assert programs.compiled.count(f"jit({name})") == 1, name
    with counted() as programs:
        for policy in ("pyramidkv:kv_size=14,observed=4", "snapkv:kv_size=14,observed=4"):
            kvjax.generate(model, params, second, 9, policy, temperature=1.0, eos_ids=())
    assert programs.compiled == []


def test_questions_about_a_context_share_programs():
    """Whatever the text's length, if its pool is about as large."""
    model, params = toy(WINDOWED, GQA, GQA)
    params = spread(model, params, SHAPE)
    texts = prompts_of(60, 62)
    contexts = [kvjax.compress(model, params, text, "snapkv:kv_size=32") for text in texts]
    questions = prompts_of(5, 9, 7, 3, 11, 4, 6, 8)
    settings = {"max_new_tokens": 4, "eos_ids": ()}
    jax.clear_caches()
    with counted() as programs:
        kvjax.generate(model, params, questions, context=contexts[0], **settings)
    # Each kind of layer reads the questions, then decodes.
    assert programs.compiled.count("jit(apply_block)") == 4
    assert programs.compiled.count("jit(_move_layer)") == 2
    with counted() as programs:
        kvjax.generate(model, params, questions[::-1], context=contexts[1], **settings)
    assert programs.compiled == []
