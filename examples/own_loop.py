"""A sampling loop of your own over a compressed cache, with `kvjax.prefill` and `decode_step`."""

import jax
import numpy as np

import kvjax


def sample(model, params, prompt, policy, count=32, temperature=0.7, seed=0):
    """`count` tokens after a prompt, from the softmax at a temperature."""
    tokens, lengths = np.asarray([prompt], np.int32), np.asarray([len(prompt)], np.int32)
    logits, cache = kvjax.prefill(model, params, tokens, lengths, policy, max_new_tokens=count)
    answer = []
    for key in jax.random.split(jax.random.key(seed), count):
        token = jax.random.categorical(key, logits / temperature).astype(np.int32)
        answer.append(int(token[0]))
        logits, cache = kvjax.decode_step(model, params, cache, token)
    return answer


def main() -> list[int]:
    """Answers a question of the embedded model from 24 tokens a head."""
    model, params = kvjax.load("builtin:needle", dtype="float32")
    [example] = kvjax.tasks.make_examples("needle", kvjax.tasks.WordVocabulary(), 1, length=256)
    answer = sample(model, params, example.prompt, "headkv:kv_size=24", count=4, temperature=0.1)
    print(kvjax.load_tokenizer("builtin:needle").decode(answer))
    return answer


if __name__ == "__main__":
    main()
