"""How far does a compressed cache move the next-token distribution? Full against compressed."""

import jax
import numpy as np

import kvjax


def divergences(model, params, ids, read, policies):
    """KL(full ‖ policy) in nats, [policies, tokens]: reads `read` ids, then feeds the others."""
    tokens, lengths = np.asarray([ids[:read]], np.int32), np.asarray([read], np.int32)
    room = len(ids) - read
    _, caches = kvjax.prefill(model, params, tokens, lengths, ["full", *policies], room)
    found = []
    for token in np.asarray(ids[read:], np.int32):
        steps = [kvjax.decode_step(model, params, cache, token[None]) for cache in caches]
        caches = [cache for _, cache in steps]
        full, *others = (np.asarray(jax.nn.log_softmax(logits[0])) for logits, _ in steps)
        found.append([np.sum(np.exp(full) * (full - other)) for other in others])
    return np.transpose(found)


def main() -> np.ndarray:
    """The embedded model: a question is read under each policy, and its answer is fed."""
    model, params = kvjax.load("builtin:needle", dtype="float32")
    words = kvjax.tasks.WordVocabulary()
    [example] = kvjax.tasks.make_examples("needle", words, 1, length=256, answer_lengths=(6, 6))
    policies = [f"{name}:kv_size=24" for name in ("headkv", "snapkv", "streaming")]
    ids = [*example.prompt, *example.answer]
    found = divergences(model, params, ids, len(example.prompt), policies)
    for policy, nats in zip(policies, found, strict=True):
        print(f"{policy:22} mean {nats.mean():.3f}, by token {nats.round(3)}")
    return found


if __name__ == "__main__":
    main()
