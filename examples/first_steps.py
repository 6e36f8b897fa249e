# %% [markdown]
# # First steps, in pictures
# This page is a notebook. It asks one small model the same questions from caches of different
# sizes, draws which heads of the model find the answers, tries a new policy, and converts the model
# to latent attention. The file `examples/first_steps.py` is plain Python: run it as it is, or make
# a notebook of it with `jupytext --to ipynb examples/first_steps.py` (`pip install jupytext`).
#
# The model, `builtin:needle`, comes with kvjax and needs no download. It has 5 layers, each with 8
# query heads and 4 KV heads, and answers questions in [a small language of its
# own](../docs/embedded_model.md). Other models behave differently: [what to use
# when](../docs/frontier.md) has measurements of a real one.

# %%
import matplotlib.pyplot as plt
import numpy as np

import kvjax
from kvjax.policies import Compress, Request
from kvjax.scoring import compare

model, params = kvjax.load("builtin:needle")
tokenizer = kvjax.load_tokenizer("builtin:needle")

# %% [markdown]
# ## A question about a long text
# Each prompt is a text of 512 tokens with one fact in it. A question about the fact ends the
# prompt.

# %%
words, count, length = kvjax.tasks.WordVocabulary(), 16, 512
examples = kvjax.tasks.make_examples("needle", words, count, length, answer_lengths=(4, 8))
example = examples[0]
start, end = example.span  # the tokens of the fact
print("…", tokenizer.decode(example.prompt[start - 20 : end + 20]), "…")
print("…", tokenizer.decode(example.prompt[-20:]))
print("answer:", tokenizer.decode(example.answer))

# %% [markdown]
# The full cache keeps the keys and values of every token, in every head. `headkv`, `snapkv` and
# `streaming` keep 24 tokens a head on average: their caches have the same size, but not the same
# tokens. The bytes include room for 64 new tokens in every head.


# %%
def ask(model, params, policy):
    out = kvjax.generate(model, params, [example.prompt], max_new_tokens=9, policy=policy)
    print(f"{policy:21}{out.cache_bytes:10,} bytes  {tokenizer.decode(out.tokens[0])}")


for policy in ("full", "headkv:kv_size=24", "snapkv:kv_size=24", "streaming:kv_size=24"):
    ask(model, params, policy)

# %% [markdown]
# The first word is right in each answer, because reading the prompt predicts it before anything is
# dropped. After it, `streaming` has lost the fact: it keeps the first four tokens of the text and
# the last ones.
#
# ## Which heads find the answer?
# The importance of a query head is the share of its attention that falls on the fact while the
# model answers. It was measured once, and comes with the model; `kvjax score` measures it for
# others. `headkv` turns it into a number of tokens for each KV head, which two query heads share.
# Eight recent tokens a head come on top.

# %%
scores = kvjax.headkv.default_scores(model.config)
assert scores is not None  # this model has its own
caps = kvjax.headkv.allocate(scores, kv_size=24, num_kv_heads=4, prompt_len=length)

# %% importance of the query heads, and tokens that each KV head keeps
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), dpi=120, layout="constrained")
panels = {"query head": (scores.mean, "attention on the fact (share)"), "KV head": (caps, "tokens")}
for ax, (head, (values, unit)) in zip(axes, panels.items(), strict=True):
    image = ax.imshow(values, aspect="auto", vmin=0)
    ax.set(xlabel=head, ylabel="layer", xticks=range(values.shape[1]))
    figure.colorbar(image, label=unit)
axes[0].set_title("Importance")
axes[1].set_title("Tokens kept, besides 8 recent ones")
plt.show()

# %% [markdown]
# Left: the heads of layers 3 and 4 look at the fact with about a third of their attention, and one
# of layer 4 does not. The heads of the other layers look elsewhere. Right: `headkv` gives about 35
# tokens to the KV heads that look at the fact, and 3 to 15 to the others.
#
# ## Answers against bytes
# `compare` reads each prompt once and judges the answer under every policy. An answer is right if
# every word of it is, and here the first word too must come from the compressed cache.

# %%
sizes = 12, 24, 48
names = "headkv", "snapkv", "streaming"
policies = {f"{name}:kv_size={size}": f"{name}:kv_size={size}" for name in names for size in sizes}
found = compare(model, params, examples, policies)
share = {name: 100 * size / found.cache_bytes["full"] for name, size in found.cache_bytes.items()}
right = {name: 100 * hits.mean() for name, hits in found.right.items()}

# %% right answers against the share of the full cache's bytes
figure, ax = plt.subplots(figsize=(7, 3.8), dpi=120, layout="constrained")
for name, marker in zip(names, "os^", strict=True):
    keys = [f"{name}:kv_size={size}" for size in sizes]
    ax.plot([share[key] for key in keys], [right[key] for key in keys], marker=marker, label=name)
ax.axhline(right["full"], color="gray", linestyle="--", label="full cache")
ax.set(xlabel="cache bytes (% of the full cache)", ylabel="right answers (%)", ylim=(-4, 104))
ax.legend()
plt.show()

# %% [markdown]
# The same bytes give more right answers where they go to the heads that need them: `headkv` answers
# as well as the full cache from about 5 % of its bytes, `snapkv` comes near it with twice as many,
# and `streaming` answers nothing at these sizes. Sixteen prompts are few: the standard error of a
# point is up to 13 percentage points.
#
# ## A policy of your own
# A policy is an allocator, which divides the budget among the heads, and a scorer, which rates the
# tokens. The picture of importance suggests a simple allocator: the last two layers get four times
# as many tokens as the others. `spankv` has the scorer of `headkv` and equal budgets. With this
# scorer in all three, the policies differ in their budgets only.


# %%
def last_layers(request: Request) -> np.ndarray:
    """[L, K] whole tokens."""
    weights = np.ones((request.num_layers, request.num_kv_heads))
    weights[-2:] = 4
    return np.minimum(request.budget * weights // weights.mean(), request.limit).astype(np.int32)


size, equal = 16, kvjax.policies.spankv(kv_size=16)
own = Compress(last_layers, equal.scorer, kv_size=size)
tried = {"equal budgets": equal, "last layers": own, "headkv": f"headkv:kv_size={size}"}
for name, hits in compare(model, params, examples, tried).right.items():
    print(f"{name:14}{hits.mean():5.0%} right")

# %% [markdown]
# [Write your own policy](../docs/own_policy.md) has the details.
#
# ## Fewer numbers a token
# Policies drop tokens. TransMLA makes each token smaller instead: the heads of a layer share one
# latent vector and one rotary key. `to_decoupled` converts the weights without training, from
# moments of a calibration text. Here 64 + 64 numbers replace the 256 of keys and values.
# `refit=False` leaves out the fits that follow the closed form, which take longer.

# %%
texts = kvjax.tasks.make_examples("needle", words, count, length // 2, seed=1)
ids = np.asarray([text.prompt for text in texts], np.int32)
stats = kvjax.transmla.calibrate(model, params, np.split(ids, 2))
recipe = kvjax.transmla.Recipe(refit=False)
latent = kvjax.transmla.to_decoupled(model, params, stats, kv_rank=64, rope_dim=64, recipe=recipe)

# %% [markdown]
# A converted model takes policies and smaller entries too. The shares are of the original model's
# full cache.

# %%
converted = compare(*latent, examples, {"in 8 bits": "full:entries=int8"})
print(f"{'original':10}{right['full']:4.0f} % right from 100.0 % of the bytes")
for name, hits in converted.right.items():
    part = 100 * converted.cache_bytes[name] / found.cache_bytes["full"]
    label = {"full": "latent"}.get(name, name)
    print(f"{label:10}{100 * hits.mean():4.0f} % right from {part:5.1f} % of the bytes")
