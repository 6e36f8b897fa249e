"""What a step of decoding takes: a program for each kind of layer, or one for all of it."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax

from kvjax.cache.layers import scheduled, work_lists
from kvjax.decoding import decode_step, embed_step, most_likely, step_logits
from kvjax.nn import Transformer
from kvjax.nn.transformer import block_kinds, block_program, output_params
from kvjax.pipelines.plan_programs import Compiler, Program, compile_call
from kvjax.pipelines.plan_shapes import Served
from kvjax.topologies import device_bytes


@dataclass(frozen=True)
class Step:
    """A step of decoding, per device.

    Attributes:
        temporaries: bytes besides weights and caches.
        layer, outside: collectives of the last layer, and those besides the layers'.
    """

    temporaries: int
    layer: Counter[str]
    outside: Counter[str]


def block_step(served: Served, compile: Compiler) -> Step:
    """A step that dispatches a program for each layer: the largest one's temporaries count.

    The next token is the most likely one. Sampling takes no more to speak of, but minutes to
    compile for a TPU.
    """
    config, params, cache = served.model.config, served.params, served.cache
    token, live = served.rows(), served.rows(dtype=bool)
    embedded = compile(embed_step, config, params["embedding"], token, served.rows(), live)
    x, positions, _ = embedded.out
    heads = [each.attention.query_heads for each in config.layers]

    def lists(*args: Any, **settings: Any) -> Any:
        return compile(work_lists, *args, **settings).out

    cache = scheduled(cache, positions, heads, lists)
    stream = device_bytes((x, [pool.schedule for pool in cache.pools]))
    most, layer = [taken(embedded.program)], Counter()
    for index, kind in enumerate(block_kinds(config)):
        program = block_program(kind.block, donate=True)  # type: ignore[arg-type]
        arrays = (kind.pairs, x, positions, cache[index], cache.rope_lengths)
        block = compile(program, params[f"layers_{index}"], *arrays)
        most.append(stream + taken(block.program))
        x, layer = block.out[0], block.program.collectives
    top = {name: params[name] for name in output_params(config)}
    ranked = compile(step_logits, config, served.layout, top, x)
    chosen = compile(jitted_most_likely, ranked.out).program
    most += [stream + taken(ranked.program), device_bytes(ranked.out) + taken(chosen)]
    outside = (embedded.program, ranked.program, chosen)
    return Step(max(most), layer, sum((p.collectives for p in outside), Counter()))


def fused_step(served: Served) -> Program:
    """A step as one program."""
    return compile_call(lower_step(served)).program


def lower_step(served: Served) -> Any:
    """A step as one program, to be compiled."""
    arrays = (served.params, served.cache, served.rows(), served.rows(dtype=bool))
    return greedy_step.lower(served.model, *arrays)


jitted_most_likely = jax.jit(most_likely)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def greedy_step(
    model: Transformer, params: Any, cache: Any, token: jax.Array, live: jax.Array
) -> tuple[jax.Array, Any]:
    """The most likely next tokens [B], and the cache with the ones that were given."""
    logits, cache = decode_step(model, params, cache, token, live)
    return most_likely(logits), cache


def taken(program: Program) -> int:
    """Bytes of a program besides its arguments."""
    return program.temporaries + program.results
