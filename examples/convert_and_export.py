"""Converts a model to latent attention with half of the cache, and exports it for transformers.

python examples/convert_and_export.py [MODEL TEXT.txt OUT]
"""

import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

import kvjax


def convert(model, params, ids, out, share=0.5):
    """Calibrates on token ids [S, T], converts, writes DeepSeek-V3's layout, and reads it again."""
    stats = kvjax.transmla.calibrate(model, params, np.split(ids, 4))
    converted = kvjax.transmla.to_decoupled(model, params, stats, cache=share, exportable=True)
    kvjax.save(*converted, out, layout="deepseek_v3")
    return converted, kvjax.load(out, dtype="float32")


def main(name="builtin:needle", path=None, out=None) -> dict[str, float]:
    """Prints the bytes of a cache of 1024 tokens, and the perplexity, of each of the models."""
    original, (rows, length) = kvjax.load(name, dtype="float32"), (16, 64)
    words = kvjax.tasks.WordVocabulary()
    examples = kvjax.tasks.make_examples("needle", words, rows + 8, length)
    ids = np.concatenate([example.prompt for example in examples])
    if path is not None:
        ids = np.asarray(kvjax.load_tokenizer(name)(Path(path).read_text())["input_ids"])
    ids = ids[: (rows + 8) * length].reshape(-1, length).astype(np.int32)
    with tempfile.TemporaryDirectory() as folder:
        converted, exported = convert(*original, ids[:rows], out or f"{folder}/mla")
        models = {"original": original, "converted": converted, "exported": exported}
        found = {}
        for kind, (model, params) in models.items():
            bytes_ = sum(leaf.nbytes for leaf in jax.tree.leaves(model.init_cache(1, 1024)))
            found[kind] = kvjax.tasks.perplexity(model, params, [ids[rows:]])
            print(f"{kind:10}{bytes_:10,} bytes of cache, perplexity {found[kind]:.3f}")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
