"""The public decode operations: they check arguments and choose an implementation.

Shape letters: B batch, N query heads, K KV heads, S slots, P pool rows, H head dim of keys, Hv head
dim of values, L latent rank, R rope dim.

`implementation` is "auto" or a name ("xla", "pallas_tpu", "pallas_gpu"). "auto" takes the kernel of
the platform if there is one that can serve the call, else "xla"; on a platform with kernels it then
gives the reason as a RuntimeWarning, once for each operation and reason. A named implementation
that cannot serve raises NotImplementedError with the reason and is never replaced by another one.

Lengths are clipped to the slots before any implementation sees them, because a kernel would read
past the end of the cache.
"""

import functools
import importlib
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels import reference, tables, xla
from pallas_kernels.entries import NEG_INF, Entries, Newer, Segments, from_bits, is_quantized
from pallas_kernels.gpu import limits as gpu_limits
from pallas_kernels.packed import Packed
from pallas_kernels.plan import WorkList
from pallas_kernels.tpu import limits as tpu_limits

IMPLEMENTATIONS = ("auto", "xla", "pallas_tpu", "pallas_gpu")
PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}
LIMITS: dict[str, Any] = {"tpu": tpu_limits, "gpu": gpu_limits}


def gqa_decode(
    q: jax.Array,
    k: Entries,
    v: Entries,
    lengths: jax.Array,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    implementation: str = "auto",
    return_lse: bool = False,
) -> Any:
    """Attention of one query for each sequence over a dense cache.

    Args:
        q: [B, N, H]; query head n reads KV head n // (N / K).
        k, v: [B, K, S, H] and [B, K, S, Hv] entries. Slots from a sequence's length on may
            hold anything, NaN included.
        lengths: [B] integers, the number of live slots, clipped to 0 … S; 0 gives zeros.
        scale: factor of the logits; default H^-0.5.
        window: the query sees only the last `window` live slots; default all.
        softcap: logits become softcap · tanh(logits / softcap); default unchanged.
        implementation: see the module's docstring.
        return_lse: also return the logsumexp of the logits, [B, N] fp32.

    Returns:
        [B, N, Hv] in q's dtype; with `return_lse` a pair of this and the logsumexp.

    Raises:
        ValueError: the shapes do not fit together.
        NotImplementedError: the named implementation cannot serve these arguments.
    """
    _check_ranks({"q": (q, 3), "k": (k, 4), "v": (v, 4), "lengths": (lengths, 1)})
    (B, N, H), (K, S) = q.shape, k.shape[1:3]
    _check(k.shape == (B, K, S, H), f"k is {k.shape}, expected {(B, K, S, H)} for q {q.shape}")
    _check(v.shape[:3] == (B, K, S), f"v is {v.shape}, expected {(B, K, S)} + head dim")
    _check_heads(N, K)
    lengths, window = _live(lengths, (B,), S), _window(window, S)
    if 0 in (B, N, S):
        return _nothing((B, N, v.shape[3]), q.dtype, implementation, return_lse)
    k, v = from_bits(k), from_bits(v)
    packed = isinstance(k, Packed) or isinstance(v, Packed)
    plain = xla.attend_dense if packed else reference.gqa_decode
    run = kernel(implementation, "gqa_decode", q, k, v) or plain
    out, lse = run(q, k, v, lengths, _scale(scale, H), window, softcap)
    return _result(out.astype(q.dtype), lse, return_lse)


def ragged_gqa_decode(
    q: jax.Array,
    k_pool: Entries,
    v_pool: Entries,
    starts: Sequence[int] | jax.Array,
    lengths: jax.Array,
    *,
    capacities: Sequence[int] | jax.Array | None = None,
    align: int = 8,
    span: int | None = None,
    live: jax.Array | Newer | None = None,
    schedule: WorkList | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str = "auto",
    return_lse: bool = False,
) -> Any:
    """Attention of one query for each sequence over a pool in which each KV head has a segment.

    Args:
        q: [B, N, H]; query head n reads the segment of KV head n // (N / K).
        k_pool, v_pool: [B, P, H] and [B, P, Hv] entries. The segment of head k has
            the rows starts[k] … starts[k] + capacities[k] − 1; the pool may hold other segments.
        starts: [B, K] integers; or [K], or a sequence of K ints, for all sequences.
        lengths: [B, K] integers, the number of live rows of each segment, clipped to 0 … capacity.
        capacities: like `starts`; default: up to the next start.
        align: if `starts` is an array: a number of which all starts and P are multiples.
        span: if `starts` is an array: an upper bound on the rows of all segments of one sequence;
            see `Segments`. Default P.
        live: [B, P] bool, the rows that the queries may see; or `Newer` for a sliding window over
            the kept entries, of which only the segments' own rows are read. Default all.
        schedule: one layer's part of the result of `schedule`, for the same starts, lengths and
            span. Default: the kernel's work list is made in this call.
        scale, softcap, implementation, return_lse: as in `gqa_decode`.

    Returns:
        [B, N, Hv] in q's dtype; with `return_lse` a pair of this and the logsumexp.

    Raises:
        ValueError: the shapes do not fit together.
        NotImplementedError: the named implementation cannot serve these arguments.
    """
    _check_ranks({"q": (q, 3), "k_pool": (k_pool, 3), "v_pool": (v_pool, 3)})
    (B, N, H), P = q.shape, k_pool.shape[1]
    segments = _segments(starts, capacities, align, span, (B, P))
    K = segments.num_heads
    _check(k_pool.shape == (B, P, H), f"k_pool is {k_pool.shape}, expected {(B, P, H)}")
    _check(v_pool.shape[:2] == (B, P), f"v_pool is {v_pool.shape}, expected {(B, P)} + head dim")
    _check_heads(N, K)
    seen = live.positions if isinstance(live, Newer) else live
    _check(seen is None or seen.shape == (B, P), f"live is not {(B, P)}, the pool's rows")
    lengths = _live(lengths, (B, K), segments.room(P))
    if 0 in (B, N, P):
        return _nothing((B, N, v_pool.shape[2]), q.dtype, implementation, return_lse)
    run = kernel(implementation, "ragged_gqa_decode", q, k_pool, v_pool, segments, live)
    settings = (lengths, _scale(scale, H), softcap)
    # Kernels read floats. XLA:CPU slices bit patterns and converts the slices to floats.
    if run is not None:
        live = live if live is None or isinstance(live, Newer) else Newer.of_mask(live)
        out, lse = run(q, from_bits(k_pool), from_bits(v_pool), segments, *settings, live, schedule)
    else:
        seen = live if live is None or isinstance(live, Newer) else live[:, None]
        out, lse = xla.attend(q[:, None], k_pool, v_pool, segments, *settings, seen)
        out, lse = out[:, 0], lse[:, 0]
    return _result(out.astype(q.dtype), lse, return_lse)


def _segments(
    starts: Any, capacities: Any, align: int, span: int | None, pool: tuple[int, int]
) -> Segments:
    """The segments of pools [B, P]; starts that are Python ints are checked against the pool."""
    rows = pool[1]
    # Ints are known now: they give the best alignment and span.
    if isinstance(starts, Sequence):
        capacities = _checked_capacities(starts, capacities, rows)
        align, span = max(math.gcd(*starts, rows), 1), sum(capacities)
        starts, capacities = (jnp.asarray(x, jnp.int32) for x in (starts, capacities))
    starts = _of_each_sequence(starts, "starts", pool)
    _check(rows % align == 0, f"{rows} pool rows are not a multiple of align = {align}")
    # Each segment ends where the next one in the pool starts, the last one at the pool's end.
    if capacities is None:
        later = starts[:, None] > starts[:, :, None]
        capacities = jnp.min(jnp.where(later, starts[:, None], rows), axis=2) - starts
    capacities = _of_each_sequence(capacities, "capacities", pool)
    _check(
        capacities.shape == starts.shape,
        f"capacities is {capacities.shape}, expected {starts.shape}, as starts",
    )
    return Segments(starts, capacities, align, span)


def _checked_capacities(
    starts: Sequence[int], capacities: Sequence[int] | None, rows: int
) -> Sequence[int]:
    """The capacities of segments with known starts; raises ValueError outside of the pool."""
    if capacities is None:
        capacities = [end - start for start, end in zip(starts, [*starts[1:], rows], strict=True)]
    _check(
        len(capacities) == len(starts), f"got {len(capacities)} capacities for {len(starts)} heads"
    )
    for start, capacity in zip(starts, capacities, strict=True):
        _check(
            start >= 0 and capacity >= 0 and start + capacity <= rows,
            f"segment {start}:{start + capacity} is outside of the pool's {rows} rows",
        )
    return capacities


def _of_each_sequence(table: Any, name: str, pool: tuple[int, int]) -> jax.Array:
    """[B, K] int32 of a table [K] or [B, K]."""
    (B, rows), shape = pool, table.shape
    _check(
        len(shape) == 1 or (len(shape) == 2 and shape[0] == B),
        f"{name} is {shape}, expected (KV heads,) or ({B}, KV heads)",
    )
    return jnp.broadcast_to(_int32(table, name, rows), (B, shape[-1]))


def schedule(
    starts: Int[Array, "L B K"],
    lengths: Int[Array, "L B K"],
    *,
    queries_per_head: int,
    k_pool: Any,
    v_pool: Any,
    align: int = 8,
    span: int | None = None,
    implementation: str = "auto",
) -> WorkList | None:
    """The work lists of `ragged_gqa_decode` for all layers of a decode step.

    One call before the layers replaces about a dozen small operations in each layer.

    Args:
        starts, lengths: the segments of L layers, whose pools have the same shape.
        queries_per_head: query heads for each KV head.
        k_pool, v_pool: [B, P, H] the pools of a layer, or their shapes and dtypes.
        align, span, implementation: as in `ragged_gqa_decode`; `span` holds for every layer.

    Returns:
        Arrays with a leading axis of L layers: `jax.tree.map(lambda x: x[layer], …)` is the
        argument `schedule` of `ragged_gqa_decode`. None if "xla" is used, which has no work list.

    Raises:
        NotImplementedError: the named implementation cannot serve these arguments.
    """
    (B, P, H), K = k_pool.shape, starts.shape[2]
    # Limits look at the queries' dtype, which the caller need not know yet: the entries' dtype,
    # or bfloat16 for quantized entries.
    dtype = jnp.bfloat16 if is_quantized(k_pool.dtype) else k_pool.dtype
    q = jax.ShapeDtypeStruct((B, K * queries_per_head, H), dtype)
    shape = jax.ShapeDtypeStruct((B, K), jnp.int32)
    operands = q, k_pool, v_pool, Segments(shape, shape, align, span), None
    work_list = scheduler(implementation, *operands)
    if work_list is None:
        return None

    def of_layer(starts: jax.Array, lengths: jax.Array) -> WorkList:
        segments = Segments(starts, lengths, align, span)
        return work_list(segments, jnp.clip(lengths, 0, segments.room(P)), queries_per_head, P)

    return jax.vmap(of_layer)(starts, lengths)


def mla_decode(
    q_latent: jax.Array,
    q_rope: jax.Array,
    latent: Entries,
    k_rope: Entries,
    lengths: jax.Array,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    implementation: str = "auto",
    return_lse: bool = False,
) -> Any:
    """Absorbed multi-head latent attention: the latent is key and value of every head.

    Args:
        q_latent: [B, N, L] queries multiplied with the key up-projection.
        q_rope: [B, N, R] rotated queries.
        latent, k_rope: [B, S, L] and [B, S, R] entries: the cache.
        lengths: [B] integers, the number of live slots, clipped to 0 … S.
        scale: factor of the logits.
        window, softcap, implementation, return_lse: as in `gqa_decode`.

    Returns:
        [B, N, L] in q_latent's dtype: weighted sums of latents, before the value up-projection;
        with `return_lse` a pair of this and the logsumexp.

    Raises:
        ValueError: the shapes do not fit together.
        NotImplementedError: the named implementation cannot serve these arguments.
    """
    ranks = {"q_latent": (q_latent, 3), "q_rope": (q_rope, 3), "latent": (latent, 3)}
    _check_ranks({**ranks, "k_rope": (k_rope, 3), "lengths": (lengths, 1)})
    (B, N, L), S, R = q_latent.shape, latent.shape[1], k_rope.shape[-1]
    _check(q_rope.shape == (B, N, R), f"q_rope is {q_rope.shape}, expected {(B, N, R)}")
    _check(latent.shape == (B, S, L), f"latent is {latent.shape}, expected {(B, S, L)}")
    _check(k_rope.shape == (B, S, R), f"k_rope is {k_rope.shape}, expected {(B, S, R)}")
    lengths, window = _live(lengths, (B,), S), _window(window, S)
    if 0 in (B, N, S):
        return _nothing(q_latent.shape, q_latent.dtype, implementation, return_lse)
    latent, k_rope = from_bits(latent), from_bits(k_rope)
    run = kernel(implementation, "mla_decode", q_latent, q_rope, latent, k_rope)
    run = run or reference.mla_decode
    out, lse = run(q_latent, q_rope, latent, k_rope, lengths, scale, window, softcap)
    return _result(out.astype(q_latent.dtype), lse, return_lse)


class Target(NamedTuple):
    """The device that a program is traced for.

    Attributes:
        platform: "cpu", "tpu" or "gpu".
        device_kind: jax's name of it, such as "TPU v5 lite".
        cores: multiprocessors of a GPU, cores of a TPU device; None if jax does not say.
        partitioned: why XLA may partition the program over several devices, which it cannot do to
            a kernel; None for one device, and under `jax.shard_map`.
    """

    platform: str
    device_kind: str
    cores: int | None
    partitioned: str | None


def target() -> Target:
    """The device of the mesh in context (`jax.sharding.use_abstract_mesh`), else the default one.

    To compile for a device that is not there, use a mesh without axes that has an abstract device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.abstract_device is None:
        device = jax.devices()[0]
        platform, kind = device.platform, device.device_kind
        cores = getattr(device, "core_count", None)
    else:
        device = mesh.abstract_device
        platform, kind, cores = device.platform, device.device_kind, device.num_cores
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    return Target(platform, kind, cores, _partitioned(mesh))


def _partitioned(mesh: jax.sharding.AbstractMesh) -> str | None:
    """See `Target`. A trace does not know the devices of its arrays, so all devices count."""
    if mesh.axis_names:
        if mesh.are_all_axes_manual:
            return None
        axes = ", ".join(map(str, mesh.axis_names))
        return f"XLA partitions the program over the mesh axes {axes}: call it under jax.shard_map"
    if mesh.abstract_device is not None or jax.device_count() == 1:
        return None
    return (
        f"there are {jax.device_count()} devices, and XLA may partition the program over them: put "
        "the parameters on a mesh, kvjax.load(…, mesh=…), or call it under jax.shard_map"
    )


def kernel(implementation: str, operation: str, *operands: Any) -> Callable | None:
    """The operation's kernel with its sizes for the target; None for "xla".

    Args:
        implementation: "auto" or a name.
        operation: name of a public function.
        operands: the arguments of `limits.<operation>` after `sizes`.

    Raises:
        ValueError: the implementation has an unknown name.
        NotImplementedError: the named implementation cannot serve.
    """
    return _function(operation, implementation, operation, operands)


def scheduler(implementation: str, *operands: Any) -> Callable | None:
    """The function that makes the work list of `ragged_gqa_decode`; otherwise like `kernel`."""
    return _function("ragged_work_list", implementation, "ragged_gqa_decode", operands)


def _function(
    function: str, implementation: str, operation: str, operands: tuple[Any, ...]
) -> Callable | None:
    """A function of the platform's module `operations`, with its sizes; see `kernel`."""
    check_name(implementation)
    on = target()
    if implementation == "xla" or (implementation == "auto" and on.platform not in LIMITS):
        return None
    # "auto" falls back to XLA, a name does not.
    if implementation == "auto":
        reason = _reason(operation, on, operands) or on.partitioned
        if reason is not None:
            _warn(operation, reason)
            return None
    else:
        platform = PLATFORMS[implementation]
        reason = f"it compiles for a {platform}, and this is a {on.platform}"
        if on.platform == platform:
            reason = _reason(operation, on, operands)
        if reason is not None:
            raise NotImplementedError(f"{operation} with {implementation}: {reason}")
    # Imported here, so that a process without kernels does not load Pallas.
    module = importlib.import_module(f"pallas_kernels.{on.platform}.operations")
    return functools.partial(getattr(module, function), **_sizes(operation, on))


def check_name(implementation: str) -> None:
    """Raises ValueError for an unknown implementation."""
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation {implementation!r} is not one of {names}")


def _sizes(operation: str, on: Target) -> dict[str, int]:
    return tables.sizes(on.platform, operation, on.device_kind, on.cores)


def _reason(operation: str, on: Target, operands: tuple[Any, ...]) -> str | None:
    """Why the target's kernel cannot serve; None if it can."""
    limit = getattr(LIMITS[on.platform], operation)
    return limit(on.device_kind, _sizes(operation, on), *operands)


_WARNED: set[tuple[str, str]] = set()


def _warn(operation: str, reason: str) -> None:
    """Warns once for each operation and reason; reasons that differ in numbers only are one."""
    kind = operation, re.sub(r"\d+", "", reason)
    if kind in _WARNED:
        return
    _WARNED.add(kind)
    warnings.warn(
        f"{operation} runs without its kernel, and slower: {reason} "
        '(pass implementation="xla" to do so without this warning)',
        RuntimeWarning,
        stacklevel=5,  # the caller of the public function
    )


def _live(lengths: jax.Array, shape: tuple[int, ...], room: int | jax.Array) -> jax.Array:
    """Lengths of any integer dtype as int32, clipped to 0 … room."""
    _check(lengths.shape == shape, f"lengths is {lengths.shape}, expected {shape}")
    most = np.iinfo(np.int32).max
    return jnp.clip(_int32(lengths, "lengths", most), 0, room)


def _int32(x: jax.Array, name: str, most: int) -> jax.Array:
    """Integers as int32; wider dtypes are clipped to 0 … `most` before."""
    _check(
        jnp.issubdtype(x.dtype, jnp.integer), f"{name} is of {x.dtype}, expected an integer dtype"
    )
    narrow = jnp.iinfo(x.dtype).max <= np.iinfo(np.int32).max
    return (x if narrow else jnp.clip(x, 0, most)).astype(jnp.int32)


def _window(window: int | None, slots: int) -> int | None:
    """The window, or None if it holds all slots."""
    _check(window is None or window >= 0, f"window is {window}, expected at least 0")
    return None if window is None or window >= slots else window


def _nothing(shape: tuple[int, ...], dtype: Any, implementation: str, return_lse: bool) -> Any:
    """The result without entries or queries: zeros, and the logsumexp of no logits."""
    check_name(implementation)
    out, lse = jnp.zeros(shape, dtype), jnp.full(shape[:2], NEG_INF, jnp.float32)
    return _result(out, lse, return_lse)


def _check_ranks(arrays: dict[str, tuple[Any, int]]) -> None:
    for name, (array, rank) in arrays.items():
        _check(len(array.shape) == rank, f"{name} is {array.shape}, expected {rank} axes")


def _check_heads(queries: int, heads: int) -> None:
    _check(
        heads > 0 and queries % heads == 0,
        f"{queries} query heads are not a multiple of {heads} KV heads",
    )


def _scale(scale: float | None, head_dim: int) -> float:
    _check(head_dim > 0 or scale is not None, "head dim is 0, expected at least 1")
    return float(head_dim) ** -0.5 if scale is None else scale


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _result(out: jax.Array, lse: jax.Array, return_lse: bool):
    return (out, lse) if return_lse else out
