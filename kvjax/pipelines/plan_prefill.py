"""What prefill takes: the programs that `kvjax.prefill` dispatches, and what lies beside them."""

from __future__ import annotations

from kvjax.nn.transformer import block_kinds, output_params
from kvjax.pipelines.plan_programs import Compiler
from kvjax.pipelines.plan_shapes import Served
from kvjax.prefill import Watching, embed_chunks, last_logits, observed_queries, read_layer
from kvjax.topologies import device_bytes


def prefill_bytes(served: Served, compile: Compiler) -> int:
    """Bytes of a device that prefill takes besides weights and caches.

    A layer is read while the prompt of the one before may still be packed, so that the keys and
    values of two layers exist at a time, beside the residual stream.
    """
    config, work, mesh = served.model.config, served.work, served.mesh
    tokens, lengths = served.rows(served.prompt_shape[1]), served.rows()
    embedded = compile(embed_chunks, config, mesh, served.params["embedding"], tokens)
    x, caches, before = embedded.out, served.cache, 0
    most = embedded.program.temporaries
    for layer, kind in enumerate(block_kinds(config)):
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
        packing = work.packing(caches, layer, prompt.seen_by(watching.wanted[0]))
        packed = compile(packing.func, *packing.args, **packing.keywords).program
        most = max(most, before + held + read.program.temporaries, held + packed.temporaries)
        before = held
    top = {name: served.params[name] for name in output_params(config)}
    last = compile(last_logits, config, top, x, lengths)
    most = max(most, before + last.program.temporaries + last.program.results)
    return device_bytes(x) + most
