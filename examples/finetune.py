"""A training loop of your own: a converted model trains the factors of its keys and values.

`python -m train finetune` does this with packed rows, meshes, checkpoints and exact resume.
"""

import jax
import numpy as np
import optax

import kvjax


def train(model, params, batches, learning_rate=1e-3):
    """Trains the factors k_down, k_up, v_down, v_up of every layer; yields (loss, params)."""

    def loss(params, ids):
        logits, _ = model.apply({"params": params}, ids[:, :-1])
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    trained = jax.tree.map_with_path(lambda at, _: at[-1].key[:2] in ("k_", "v_"), params)
    rules = optax.adamw(learning_rate), optax.set_to_zero()
    optimizer = optax.multi_transform({True: rules[0], False: rules[1]}, trained)
    update, value_and_grad = jax.jit(optimizer.update), jax.jit(jax.value_and_grad(loss))
    state = optimizer.init(params)
    for ids in batches:
        value, gradient = value_and_grad(params, ids)
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        yield float(value), params


def main(name="builtin:needle", steps=12) -> list[float]:
    """Converts a model, and trains it on word problems."""
    model, params = kvjax.transmla.to_equal_cache(*kvjax.load(name, dtype="float32"))
    problems = kvjax.tasks.families.problems("word_problems", 16 * steps, seed=0)
    texts = [f"{problem.query} {problem.response} ." for problem in problems]
    ids = np.concatenate(kvjax.load_tokenizer(name)(texts)["input_ids"]).astype(np.int32)
    losses = []
    for value, _params in train(model, params, ids[: steps * 8 * 65].reshape(steps, 8, 65)):
        losses.append(value)
        print(f"step {len(losses)}: loss {value:.3f}")
    return losses


if __name__ == "__main__":
    main()
