"""A context is compressed once, saved, and asked many questions."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from toys import random_params

import kvjax
from kvjax import transmla
from kvjax.checkpoint_files import NewTensor, read_head, read_header, write_file
from kvjax.config import GQAConfig, LayerConfig, MLAConfig, MLPConfig, ModelConfig, RopeConfig
from kvjax.context import extend_context
from kvjax.nn import Transformer
from kvjax.policies.policy import Full
from kvjax.sharding import make_mesh, parse_mesh, place_params

GQA = GQAConfig(4, 2, 8, 8**-0.5, RopeConfig(8))
SLIDING = dataclasses.replace(GQA, window=13)
MLA = MLAConfig(4, 16, 8, 8, 12, None, 0.3, RopeConfig(8))
TEXT = np.random.default_rng(0).integers(0, 61, 70).tolist()
# Alone and after the text they fall into one bucket each: the cases differ in policy alone.
QUESTIONS = [np.random.default_rng(n).integers(0, 61, n).tolist() for n in (1, 9, 5, 26)]


def build(*attention):
    layers = tuple(LayerConfig(a, MLPConfig(32)) for a in attention)
    model = Transformer(ModelConfig("llama", 61, 32, layers, max_position_embeddings=256))
    return model, random_params(model)


MODELS = {"gqa": (GQA, GQA), "sliding": (GQA, SLIDING), "mla": (MLA, MLA)}


@functools.cache
def model_of(kind):
    if kind == "after_up":
        return transmla.convert(*model_of("gqa"))
    return build(*MODELS[kind])


def on_host(params):
    """The parameters as numpy arrays, which go to a mesh without a program for every shape."""
    return jax.tree.map(np.asarray, params)


@functools.cache
def compressed(kind="gqa", policy="snapkv:kv_size=16"):
    """The text as a model has read it; questions and files leave a context as it is."""
    return kvjax.compress(*model_of(kind), TEXT, policy)


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        ("gqa", "full"),
        ("gqa", "adasnapkv:kv_size=200"),
        ("sliding", "full"),
        ("sliding", "snapkv:kv_size=200"),
        ("after_up", "snapkv:kv_size=200"),
        ("mla", "snapkv:kv_size=200"),
    ],
)
def test_with_everything_kept_it_is_one_long_prompt(kind, policy, tmp_path):
    model, params = model_of(kind)
    context = compressed(kind, policy)
    context.save(tmp_path / "text.kv")
    context = kvjax.load_context(tmp_path / "text.kv", model, params)
    settings = {"max_new_tokens": 10, "eos_ids": ()}
    got = kvjax.generate(model, params, QUESTIONS, context=context, **settings)
    want = kvjax.generate(model, params, [TEXT + q for q in QUESTIONS], **settings)
    assert got.tokens == want.tokens


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        ("gqa", "full"),
        ("gqa", "adasnapkv:kv_size=16"),
        ("sliding", "snapkv:kv_size=16"),
        ("mla", "snapkv:kv_size=16"),
    ],
)
def test_a_longer_context_answers_as_one_that_was_asked_at_once(kind, policy):
    model, params = model_of(kind)
    short = compressed(kind, policy)
    before = [np.array(leaf) for leaf in jax.tree.leaves(short.cache)]
    # The second part is longer than the window of 13 tokens: it goes round the ring.
    part, question = QUESTIONS[3], QUESTIONS[1]
    context = extend_context(model, params, extend_context(model, params, short, part), part)
    assert context.length == len(TEXT) + 2 * len(part)
    settings = {"max_new_tokens": 10, "eos_ids": ()}
    got = kvjax.generate(model, params, [question], context=context, **settings)
    want = kvjax.generate(model, params, [part + part + question], context=short, **settings)
    assert got.tokens == want.tokens
    for a, b in zip(before, jax.tree.leaves(short.cache), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="expected at most 256 in all"):
        extend_context(model, params, context, TEXT * 3)


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        ("gqa", "snapkv:kv_size=16"),
        ("gqa", "streaming:kv_size=16,entries=int8"),
        ("gqa", "snapkv:kv_size=16,entries=int4"),
        ("after_up", "full:entries=int4"),
        ("sliding", "adasnapkv:kv_size=16"),
        ("after_up", "snapkv:kv_size=16,entries=fp8"),
        ("mla", "snapkv:kv_size=16"),
    ],
)
def test_a_file_holds_the_same_cache_and_no_question_changes_it(kind, policy, tmp_path):
    model, params = model_of(kind)
    context = compressed(kind, policy)
    before = [np.array(leaf) for leaf in jax.tree.leaves(context.cache)]
    settings = {"max_new_tokens": 10, "eos_ids": (), "context": context}
    together = kvjax.generate(model, params, QUESTIONS, **settings).tokens
    context.save(tmp_path / "text.kv")
    loaded = kvjax.load_context(tmp_path / "text.kv", model, params)
    assert loaded.nbytes == context.nbytes and loaded.policy == policy
    assert jax.tree.structure(loaded.cache) == jax.tree.structure(context.cache)
    settings["context"] = loaded
    for index in (2, 0):
        # Without the other questions, in the programs of the batch above.
        alone = kvjax.generate(model, params, [QUESTIONS[index]] * len(QUESTIONS), **settings)
        assert alone.tokens == [together[index]] * len(QUESTIONS)
    for cache in (context.cache, loaded.cache):
        for a, b in zip(before, jax.tree.leaves(cache), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("kind", "policy", "rows", "numbers"),
    [
        # Heads of a sliding layer keep the 12 tokens that the next query sees.
        ("sliding", "snapkv:kv_size=16", 2 * 16 + 2 * 12, 2 * 8),
        ("gqa", "pyramidkv:kv_size=16", 4 * 16, 2 * 8),
        ("gqa", "full", 4 * 70, 2 * 8),
        ("mla", "snapkv:kv_size=16", 2 * 16, 12 + 8),
    ],
)
def test_a_file_has_the_bytes_of_what_is_kept(kind, policy, rows, numbers, tmp_path):
    compressed(kind, policy).save(tmp_path / "text.kv")
    stored = read_header(tmp_path / "text.kv").values()
    entries = [t.open().size for t in stored if np.dtype(t.dtype).kind == "f"]
    assert sum(entries) == rows * numbers


def test_16_bit_floats_are_saved_as_floats(tmp_path):
    """CPUs hold a pool's as bits; a file says what they are."""
    model, params = build(GQA)
    params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)
    context = kvjax.compress(model, params, TEXT, "snapkv:kv_size=16")
    context.save(tmp_path / "text.kv")
    stored = read_header(tmp_path / "text.kv")
    assert stored["cache.pools.0.k"].dtype == stored["cache.pools.0.v"].dtype == "bfloat16"
    loaded = kvjax.load_context(tmp_path / "text.kv", model, params)
    settings = {"max_new_tokens": 6, "eos_ids": ()}
    want = kvjax.generate(model, params, QUESTIONS[:2], context=context, **settings).tokens
    assert kvjax.generate(model, params, QUESTIONS[:2], context=loaded, **settings).tokens == want


def test_a_context_is_of_these_very_weights(tmp_path):
    """Training the key and value projections changes neither configuration nor final norm."""
    model, params = model_of("gqa")
    path = tmp_path / "text.kv"
    context = compressed()
    context.save(path)
    attention = params["layers_1"]["attn"]
    tuned = params["layers_1"] | {"attn": attention | {"k": attention["k"].at[3, 1, 2].add(1e-6)}}
    tuned = params | {"layers_1": tuned}
    with pytest.raises(ValueError, match=r"text.kv is of another model: other weights in layers_1"):
        kvjax.load_context(path, model, tuned)
    with pytest.raises(ValueError, match=r"the context is of another model: other weights in lay"):
        kvjax.generate(model, tuned, QUESTIONS, context=context)
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)
    with pytest.raises(ValueError, match=r"another model: dtype float32, expected bfloat16$"):
        kvjax.load_context(path, model, half)


@pytest.mark.parametrize("setting", [{"policy": "snapkv:kv_size=16"}, {"prefill_size": 1}])
def test_what_a_context_would_not_heed_is_refused(setting):
    model, params = model_of("gqa")
    context = compressed()
    with pytest.raises(ValueError, match="with a context, expected none"):
        kvjax.generate(model, params, QUESTIONS, context=context, **setting)


@pytest.mark.parametrize("policy", ["full:", Full()])
def test_the_default_policy_in_other_words_is_not_refused(policy):
    model, params = model_of("gqa")
    context = compressed()
    asked = {"context": context, "max_new_tokens": 2}
    want = kvjax.generate(model, params, QUESTIONS[:1], **asked).tokens
    assert kvjax.generate(model, params, QUESTIONS[:1], policy=policy, **asked).tokens == want


def test_ids_that_end_a_text_do_not_decide_how_it_is_read(tmp_path):
    """As where a checkpoint's generation_config.json names one more of them."""
    model, params = model_of("gqa")
    compressed().save(tmp_path / "text.kv")
    other = Transformer(dataclasses.replace(model.config, eos_ids=(3, 4), bos_id=1))
    assert kvjax.load_context(tmp_path / "text.kv", other, params).length == len(TEXT)


@pytest.mark.parametrize("shapes", [(None, "tensor=2"), ("tensor=2", None), ("data=2", "tensor=2")])
def test_a_context_goes_to_the_devices_of_the_weights(shapes):
    model, params = model_of("gqa")

    devices = {"data=2": jax.devices()[:2], "tensor=2": jax.devices()[2:4]}

    def spread(shape):
        if shape is None:
            return params
        return place_params(model, on_host(params), make_mesh(parse_mesh(shape), devices[shape]))

    read, asked = map(spread, shapes)
    context = kvjax.compress(model, read, TEXT, "snapkv:kv_size=16")
    got = kvjax.generate(model, asked, QUESTIONS[:1], max_new_tokens=4, context=context).tokens
    want = kvjax.generate(model, read, QUESTIONS[:1], max_new_tokens=4, context=context).tokens
    assert got == want


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        ("gqa", "adasnapkv:kv_size=16,entries=int8"),
        ("gqa", "snapkv:kv_size=16,entries=int4"),
        ("sliding", "snapkv:kv_size=16"),
        ("mla", "full"),
        ("after_up", "snapkv:kv_size=16"),
    ],
)
def test_a_context_over_a_mesh_is_that_of_one_device(kind, policy):
    """With two devices for each KV head."""
    model, params = model_of(kind)
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    mesh = make_mesh({"data": 2, "tensor": 4}, jax.devices()[:8])
    many = place_params(model, on_host(params), mesh)
    one, spread = compressed(kind, policy), kvjax.compress(model, many, TEXT, policy)
    assert jax.tree.structure(one.cache) == jax.tree.structure(spread.cache)
    for ours, theirs in zip(*map(jax.tree.leaves, (one.cache, spread.cache)), strict=True):
        if ours.dtype == np.uint8:  # two numbers of 4 bits, or half of a range
            assert np.mean(np.asarray(ours) != np.asarray(theirs)) < 0.05
            continue
        atol = 1e-4 if ours.dtype == np.float32 else 1  # of entries in 8 bits
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (ours, theirs)), atol=atol)
    settings = {"max_new_tokens": 6, "eos_ids": ()}
    want = kvjax.generate(model, params, QUESTIONS, context=one, **settings).tokens
    for context in (one, spread):
        assert kvjax.generate(model, many, QUESTIONS, context=context, **settings).tokens == want


@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"model": {"name": "x"}},
        {"length": "70"},
        {"length": 0},
        {"cache": []},
        {"cache": {"part": "Other", "fields": {}}},
        {"cache": {"part": "Pool", "fields": {}}},
        {"cache": {"tensor": "missing"}},
    ],
)
def test_a_damaged_context_is_one_line(tmp_path, change):
    model, params = model_of("gqa")
    path = tmp_path / "text.kv"
    compressed().save(path)
    stored = read_header(path)
    content = json.loads(read_head(path)[1]["kvjax"]) | change
    kept = [NewTensor(n, t.dtype, t.shape, lambda t=t: t.open().copy()) for n, t in stored.items()]
    write_file(tmp_path / "damaged.kv", kept, {"kvjax": json.dumps(content)})
    with pytest.raises(ValueError, match=r"damaged\.kv is (a damaged|not a) context: .+"):
        kvjax.load_context(tmp_path / "damaged.kv", model, params)


@pytest.mark.parametrize("text", ["", "no JSON", "[]", "3"])
def test_a_file_that_is_no_context(tmp_path, text):
    model, params = model_of("gqa")
    write_file(tmp_path / "other.kv", [], {"kvjax": text})
    with pytest.raises(ValueError, match=r"other\.kv is not a context: (got None|its description)"):
        kvjax.load_context(tmp_path / "other.kv", model, params)


@pytest.mark.parametrize("number", [1, 2])
def test_a_context_of_an_older_format_is_refused(tmp_path, number):
    model, params = model_of("gqa")
    content = json.dumps({"format": f"kvjax context {number}", "model": "llama-0123456789ab"})
    write_file(tmp_path / "old.kv", [], {"kvjax": content})
    with pytest.raises(
        ValueError, match=rf"got 'kvjax context {number}', expected kvjax context 3$"
    ) as error:
        kvjax.load_context(tmp_path / "old.kv", model, params)
    assert "\n" not in str(error.value)


def test_errors(tmp_path):
    model, params = model_of("gqa")
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        kvjax.compress(model, params, [], "full")
    with pytest.raises(ValueError, match="a context needs"):
        kvjax.compress(model, params, TEXT, "pyramidkv:kv_size=16,ring=8")
    context = compressed()
    with pytest.raises(ValueError, match=r"prompt 0 has .* expected at most 256 in all"):
        kvjax.generate(model, params, [[1] * 180], max_new_tokens=10, context=context)
    context.save(tmp_path / "text.kv")
    with pytest.raises(ValueError, match=r"text.kv is of another model: configuration llama-"):
        kvjax.load_context(tmp_path / "text.kv", *build(GQA))
    with pytest.raises(ValueError, match="no context at"):
        kvjax.load_context(tmp_path / "nothing.kv", model, params)
    (tmp_path / "text.kv").write_bytes(b"0123456789")
    with pytest.raises(ValueError, match=r"text.kv is not a safetensors file: a header of"):
        kvjax.load_context(tmp_path / "text.kv", model, params)


def rewritten(path, change=lambda content: content, tensors=lambda arrays: arrays):
    """Writes a context again, with a changed description or other arrays."""
    arrays = tensors({name: np.array(t.open()) for name, t in read_header(path).items()})
    new = [NewTensor(name, a.dtype, a.shape, lambda a=a: a) for name, a in arrays.items()]
    content = change(json.loads(read_head(path)[1]["kvjax"]))
    text = content if isinstance(content, str) else json.dumps(content)
    write_file(path, new, {"kvjax": text})


def of_layers(content, count, places):
    """A description of so many layers, which lie there in the pool."""
    cache = content["cache"]
    fields = cache["fields"] | {"own": [None] * count, "places": places}
    return content | {"cache": cache | {"fields": fields}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: "[1]", "is not a context: its description"),
        (lambda content: "[" * 100_000, "is not a context: its description"),
        (lambda content: content | {"cache": None}, "is not a context: its description"),
        (
            lambda content: of_layers(content, 2, [None, [0, 7]]),
            "is not a context: .* layer 0 has no",
        ),
        (
            lambda content: of_layers(content, 2, [[0, 0], [0, 7]]),
            "is not a context: .* layer 1 has",
        ),
        (
            lambda content: of_layers(content, 2, [[0, 0], [5, 1]]),
            "is not a context: .* layer 1 has",
        ),
        (lambda content: of_layers(content, 2, [[0, 0], [0]]), "is not a context: .* damaged"),
        (lambda content: of_layers(content, 1, [[0, 0], [0, 1]]), "is not a context: .* damaged"),
        (
            lambda content: content | {"length": "70"},
            "is not a context: its description",
        ),
        (lambda content: content | {"model": {}}, "is not a context: its description"),
        (lambda content: content | {"model": None}, "is not a context: its description"),
        (
            lambda content: of_layers(content, 1, [[0, 0]]),
            "is a damaged context: got 1 layers, expected 2",
        ),
    ],
)
def test_a_damaged_description_is_named(tmp_path, change, said):
    model, params = model_of("gqa")
    path = tmp_path / "text.kv"
    compressed().save(path)
    rewritten(path, change)
    with pytest.raises(ValueError, match=rf"text\.kv {said}") as error:
        kvjax.load_context(path, model, params)
    assert all(line.startswith(f"{path} ") for line in str(error.value).splitlines())


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("policy", ["full", "adasnapkv:kv_size=16"])
def test_a_context_that_holds_nan_is_refused(tmp_path, policy, number):
    model, params = model_of("gqa")
    path = tmp_path / "text.kv"
    compressed("gqa", policy).save(path)

    def broken(arrays):
        # The pool's last row is one of the last layer.
        name = "cache.own.1.k" if policy == "full" else "cache.pools.0.k"
        arrays[name].flat[-1] = number
        return arrays

    rewritten(path, tensors=broken)
    with pytest.raises(ValueError, match=r"text\.kv .*: layer 1.* has NaN or infinite values"):
        kvjax.load_context(path, model, params)


def test_a_context_without_one_of_its_arrays(tmp_path):
    model, params = model_of("gqa")
    path = tmp_path / "text.kv"
    compressed("gqa", "full").save(path)
    rewritten(path, tensors=lambda arrays: dict(list(arrays.items())[1:]))
    with pytest.raises(
        ValueError, match=r"description is damaged \(KeyError: 'cache\.own\.0\.k'\)"
    ):
        kvjax.load_context(path, model, params)
