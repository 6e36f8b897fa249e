"""What prefill and a decode step take, by compiling the programs that they dispatch.

Nothing runs: programs are compiled from shapes, for devices that need not be here. `Compiler`
compiles each program once; `block_step`, `fused_step` and `prefill_bytes` call the same programs in
the same order as `kvjax.generate`, and add up what exists at the same time.
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

from kvjax.cache.layers import scheduled, work_lists
from kvjax.capacity.devices import device_bytes
from kvjax.capacity.variants import Served, located
from kvjax.decoding import decode_step, embed_step, step_logits
from kvjax.nn import Transformer
from kvjax.nn.transformer import block_kinds, block_program, most_likely, output_params
from kvjax.prefilling import Watching, embed_chunks, last_logits, observed_queries, read_layer

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
HEAP = re.compile(r"^allocation \d+: size (\d+), (?:page \d+, )?preallocated-temp", re.MULTILINE)
CALL = re.compile(
    rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(.*?channel_id=(\d+).*?(?:op_name=\"([^\"]*)|$)",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Step:
    """What one decode step takes on one device.

    Attributes:
        temporaries: bytes besides weights and caches.
        layer: collectives of the last layer, by kind.
        outside: collectives outside the layers, by kind.
    """

    temporaries: int
    layer: Counter[str]
    outside: Counter[str]


def block_step(served: Served, compile: Compiler) -> Step:
    """A step that dispatches one program per layer: its largest program decides.

    The step takes the most likely token. Sampling needs hardly more memory, but its program takes
    minutes to compile for a TPU.
    """
    config, params, cache = served.model.config, served.params, served.cache
    # Embed the token, and make the kernels' schedule if the caches have head budgets.
    token, live = served.rows(), served.rows(dtype=bool)
    embedded = compile(embed_step, config, params["embedding"], token, served.rows(), live)
    x, positions, _ = embedded.out
    heads = [each.attention.query_heads for each in config.layers]

    def lists(*args: Any, **settings: Any) -> Any:
        return compile(work_lists, *args, **settings).out

    cache = scheduled(cache, positions, heads, lists)
    # Run the layers. The residual stream and the schedule exist during every layer's program.
    stream = device_bytes((x, [pool.schedule for pool in cache.pools]))
    most, layer = [taken(embedded.program)], Counter()
    for index, kind in enumerate(block_kinds(config)):
        program = block_program(kind.block, donate=True)  # type: ignore[arg-type]
        arrays = (kind.pairs, x, positions, cache[index], cache.rope_lengths)
        block = compile(program, params[f"layers_{index}"], *arrays)
        most.append(stream + taken(block.program))
        x, layer = block.out[0], block.program.collectives
    # Choose the next token.
    top = {name: params[name] for name in output_params(config)}
    ranked = compile(step_logits, config, served.placement, top, x)
    chosen = compile(jitted_most_likely, ranked.out).program
    most += [stream + taken(ranked.program), device_bytes(ranked.out) + taken(chosen)]
    outside = (embedded.program, ranked.program, chosen)
    return Step(max(most), layer, sum((p.collectives for p in outside), Counter()))


jitted_most_likely = jax.jit(most_likely)


def taken(program: Program) -> int:
    """Bytes of a program besides its arguments."""
    return program.temporaries + program.results


def fused_step(served: Served) -> Program:
    """A step that is one program."""
    return compile_call(lower_step(served)).program


def lower_step(served: Served) -> Any:
    """A step that is one program, lowered but not compiled."""
    arrays = (served.params, served.cache, served.rows(), served.rows(dtype=bool))
    return greedy_step.lower(served.model, *arrays)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def greedy_step(
    model: Transformer, params: Any, cache: Any, token: jax.Array, live: jax.Array
) -> tuple[jax.Array, Any]:
    """The most likely next tokens [B], and the cache with the given tokens.

    Args:
        token: [B] the last tokens.
        live: [B] whether each sequence continues.
    """
    logits, cache = decode_step(model, params, cache, token, live)
    return most_likely(logits), cache


def prefill_bytes(served: Served, compile: Compiler) -> int:
    """Bytes of one device that prefill takes besides weights and caches.

    Prefill reads a layer while the prompt of the layer before may still be compressed. So the keys
    and values of two layers exist at the same time, in addition to the residual stream.
    """
    config, work, mesh = served.model.config, served.work, served.mesh
    tokens, lengths = served.rows(served.prompt_shape[1]), served.rows()
    embedded = compile(embed_chunks, config, mesh, served.params["embedding"], tokens)
    x, caches, before = embedded.out, served.cache, 0
    most = embedded.program.temporaries
    for layer, kind in enumerate(block_kinds(config)):
        # Read the prompt.
        watching = Watching.of([work], layer)
        own = served.params[f"layers_{layer}"]
        read = compile(
            read_layer,
            *(kind.block, own, kind.pairs, x, lengths, caches.rope_lengths),
            observed=observed_queries([work]),
            observers=watching.observers,
            mesh=mesh,
        )
        x, prompt = read.out
        held = read.program.results
        # Compress what was read.
        most = max(most, before + held + read.program.temporaries)
        ranking, ranked = work.ranking(caches, layer, prompt.seen_by(watching.wanted[0])), None
        if ranking is not None:
            found = compile(ranking.func, *ranking.args, **ranking.keywords)
            most, ranked = max(most, held + found.program.temporaries), found.out
        packing = work.packing(caches, layer, prompt, ranked)
        packed = compile(packing.func, *packing.args, **packing.keywords).program
        most = max(most, held + device_bytes(ranked) + packed.temporaries)
        before = held
    top = {name: served.params[name] for name in output_params(config)}
    last = compile(last_logits, config, top, x, lengths)
    most = max(most, before + last.program.temporaries + last.program.results)
    return device_bytes(x) + most


@dataclass(frozen=True)
class Program:
    """One compiled program on one device.

    Attributes:
        arguments: bytes. A buffer that is written in place counts once, as an argument.
        temporaries: bytes.
        results: bytes of the results that are not written in place.
        collectives: number of collectives of each kind.
    """

    arguments: int
    temporaries: int
    results: int
    collectives: Counter[str]


class Call(NamedTuple):
    """A call of a compiled program.

    Attributes:
        program: bytes and collectives.
        out: shapes of the results, with the shardings that XLA chose.
    """

    program: Program
    out: Any


class Compiler:
    """Compiles each program once: equal layers share a program, and so do policies.

    Attributes:
        calls: the compiled programs, by `signature`.
    """

    def __init__(self) -> None:
        self.calls: dict[Any, Call] = {}

    def __call__(self, function: Any, *args: Any, **settings: Any) -> Call:
        """Calls a jitted function with shapes in place of arrays."""
        key = signature(function, args, settings)
        if key not in self.calls:
            self.calls[key] = compile_call(function.lower(*args, **settings))
        return self.calls[key]


def signature(function: Any, args: Any, settings: Any) -> Any:
    """A key that is equal for calls that jax serves with the same program."""
    leaves, tree = jax.tree.flatten((args, settings))
    return function, tree, tuple(map(_abstract, leaves))


def _abstract(leaf: Any) -> Any:
    if not hasattr(leaf, "dtype"):
        return leaf
    return leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)


def compile_call(lowered: Any) -> Call:
    """Compiles a lowered program, the result of `jax.jit(…).lower(…)`."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        temporaries = heap_bytes(Path(folder))
    memory = compiled.memory_analysis()
    program = Program(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes if temporaries is None else temporaries,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        count_collectives(compiled.as_text()),
    )
    return Call(program, jax.tree.map(located, lowered.out_info, compiled.output_shardings))


def heap_bytes(folder: Path) -> int | None:
    """Bytes of a program's temporaries, from XLA's dump of its buffers.

    `memory_analysis` is not used here because it counts the gaps between temporaries twice for TPU
    programs. A decode step has many small temporaries in 16 KiB each, and looks twice as large.

    Args:
        folder: where XLA wrote its dump.

    Returns:
        None where the folder has no readable dump.
    """
    texts = [file.read_text() for file in folder.glob("*buffer-assignment.txt")]
    sizes = [int(size) for text in texts for size in HEAP.findall(text)]
    return sum(sizes) if sizes else None


def count_collectives(text: str) -> Counter[str]:
    """Number of collectives of each kind in the text of a compiled program.

    A collective that XLA splits into pieces counts once: the pieces share channel and operation.
    """
    return Counter(kind for kind, *_ in {call.groups() for call in CALL.finditer(text)})
