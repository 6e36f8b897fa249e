"""kvpress's presses on given prompts: which answers a compressed cache still writes.

    python kvpress_presses.py PROMPTS.jsonl CHECKPOINT OUT.jsonl [--kv-sizes …] [--presses …]

Runs in an environment with kvpress and without kvjax; `python -m benchmarks.peers` makes it. The
rules are those of `kvjax.scoring.compare`: the whole prompt is compressed to a number of entries a
head, its last token is fed again in its own place, and an answer is right if each of its tokens is
the most likely one (the end of the sequence need not follow).

One prefill serves all presses and sizes. A press sees each layer as kvpress shows it, and what it
drops is masked in the whole cache, in the way that kvpress itself masks the entries of AdaKV.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from kvpress import (  # pyright: ignore[reportMissingImports]
    AdaKVPress,
    CriticalAdaKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    PyramidKVPress,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

OBSERVED = 8
"""Queries that SnapKV and its kin observe: kvjax's default. kvpress's own, 64, keeps nothing but
the last 64 tokens at the smallest sizes."""

KV_SIZES = (16, 24, 48, 96, 192)

PRESSES: dict[str, Callable[[], Any]] = {
    "snapkv": lambda: SnapKVPress(window_size=OBSERVED),
    "adakv(snapkv)": lambda: AdaKVPress(SnapKVPress(window_size=OBSERVED)),
    "criticaladakv(snapkv)": lambda: CriticalAdaKVPress(SnapKVPress(window_size=OBSERVED)),
    "pyramidkv": lambda: PyramidKVPress(window_size=OBSERVED),
    "tova": TOVAPress,
    "adakv(expected)": lambda: AdaKVPress(ExpectedAttentionPress()),
    "keydiff": KeyDiffPress,
    "streaming": StreamingLLMPress,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("checkpoint")
    parser.add_argument("out", type=Path)
    parser.add_argument("--kv-sizes", type=int, nargs="+", default=KV_SIZES)
    parser.add_argument("--presses", nargs="+", choices=list(PRESSES), default=list(PRESSES))
    args = parser.parse_args()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    facts = {
        "versions": {name: version(name) for name in ("kvpress", "torch", "transformers")},
        "kv_sizes": list(args.kv_sizes),
        "presses": args.presses,
    }
    lines = [json.loads(line) for line in args.prompts.read_text().splitlines()]
    done = args.out.read_text().splitlines() if args.out.is_file() else []
    if not done:
        args.out.write_text(json.dumps(facts) + "\n")
    elif json.loads(done[0]) != facts:
        raise SystemExit(f"{args.out}: made with {done[0]}, expected {json.dumps(facts)}")
    for index in range(max(len(done) - 1, 0), len(lines)):
        task, prompt, answer = (lines[index][name] for name in ("task", "prompt", "answer"))
        right = judge(model, prompt, answer, list(args.kv_sizes), args.presses)
        with args.out.open("a") as file:
            file.write(json.dumps({"index": index, "task": task, "right": right}) + "\n")
        print(index, task, right, flush=True)


@torch.inference_mode()
def judge(
    model: Any, prompt: list[int], answer: list[int], sizes: list[int], presses: list[str]
) -> dict[str, Any]:
    """Whether the answer is right: {"full": …, press: {size: …}}."""
    cache, kept = read(model, prompt, sizes, presses)
    cache.crop(len(prompt) - 1)
    steps = torch.tensor([[prompt[-1], *answer[:-1]]])
    positions = torch.arange(len(prompt) - 1, len(prompt) - 1 + steps.shape[1])[None]
    wanted = torch.tensor(answer)

    def right(masks: list[Any], rows: int) -> list[bool]:
        for layer, mask in zip(model.model.layers, masks, strict=True):
            layer.self_attn.masked_key_indices = mask
        copy = DynamicCache()
        for index, layer in enumerate(cache.layers):
            # kvpress writes its masks into the keys: each call gets keys of its own.
            own = (x.repeat_interleave(rows, dim=0) for x in (layer.keys, layer.values))
            copy.update(*own, index)
        ids, places = steps.repeat(rows, 1), positions.repeat(rows, 1)
        logits = model(input_ids=ids, past_key_values=copy, position_ids=places).logits
        return (logits.argmax(-1) == wanted).all(dim=1).tolist()

    layers = len(model.model.layers)
    found: dict[str, Any] = {"full": right([None] * layers, 1)[0]}
    for name, by_layer in kept.items():
        # [sizes, heads, tokens]; the last token is fed again, so it is in no cache.
        masks = [(~keep[..., :-1]).nonzero(as_tuple=True) for keep in by_layer]
        found[name] = dict(zip(map(str, sizes), right(masks, len(sizes)), strict=True))
    return found


def read(
    model: Any, prompt: list[int], sizes: list[int], names: list[str]
) -> tuple[Any, dict[str, list[Any]]]:
    """The whole cache, and for each press and layer the kept tokens [sizes, heads, tokens]."""
    presses = {name: PRESSES[name]() for name in names}
    kept: dict[str, list[Any]] = {name: [] for name in presses}
    cache = DynamicCache()

    def compress(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = cache.layers[module.layer_idx]
        seen = kwargs["hidden_states"], layer.keys, layer.values
        for name, press in presses.items():
            score_once(press, module, *seen, None, kwargs)
            rows = [kept_tokens(press, size, module, *seen, kwargs) for size in sizes]
            kept[name].append(torch.stack(rows))
        module.masked_key_indices = None

    hooks = []
    for press in presses.values():
        press.post_init_from_model(model)
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb
        hooks.append(layer.self_attn.register_forward_hook(compress, with_kwargs=True))
    try:
        model(input_ids=torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return cache, kept


def score_once(press: Any, *args: Any) -> None:
    """Computes the scores of a layer, which do not depend on the size, for all later calls."""
    scorer = getattr(press, "press", press)
    # Streaming's scores are its choice, which does depend on the size.
    if not isinstance(scorer, StreamingLLMPress):
        found = type(scorer).score(scorer, *args)
        # AdaKV writes into the scores that it gets.
        scorer.score = lambda *args, **kwargs: found.clone()


def kept_tokens(
    press: Any, size: int, module: Any, hidden: Any, keys: Any, values: Any, kwargs: Any
) -> Any:
    """[heads, tokens] whether a press keeps a token at this size."""
    heads, tokens = keys.shape[1:3]
    press.compression_ratio = max(1 - (min(size, tokens) + 0.5) / tokens, 1e-6)
    module.masked_key_indices = None
    if isinstance(press, ScorerPress):
        # The scores are there, so the values are only gathered: numbers of tokens in their place.
        numbers = torch.arange(tokens, dtype=keys.dtype)[None, None, :, None].expand_as(keys)
        chosen = press.compress(module, hidden, keys, numbers, None, kwargs)[1][0, :, :, 0].long()
        return torch.zeros(heads, tokens, dtype=torch.bool).scatter_(1, chosen, True)
    press.compress(module, hidden, keys, values, None, kwargs)
    keep = torch.ones(heads, tokens, dtype=torch.bool)
    dropped: Any = module.masked_key_indices
    keep[dropped[1:]] = False
    return keep


if __name__ == "__main__":
    main()
