"""Programs of a model that has no weights yet, compiled for devices that are not here."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
HEAP = re.compile(r"^allocation \d+: size (\d+), (?:page \d+, )?preallocated-temp", re.MULTILINE)
CALL = re.compile(
    rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(.*?channel_id=(\d+).*?(?:op_name=\"([^\"]*)|$)",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Program:
    """One compiled program, per device.

    Attributes:
        arguments, temporaries: bytes; what is written in place counts once, as an argument.
        results: bytes of what is not written in place.
        collectives: how many of each kind.
    """

    arguments: int
    temporaries: int
    results: int
    collectives: Counter[str]


class Call(NamedTuple):
    """A call of a compiled program.

    Attributes:
        program: what it takes.
        out: the shapes that it returns, each where XLA puts it.
    """

    program: Program
    out: Any


class Compiler:
    """Compiles each program once: layers of a kind, and policies, share theirs.

    Attributes:
        calls: what was compiled, by `signature`.
    """

    def __init__(self) -> None:
        self.calls: dict[Any, Call] = {}

    def __call__(self, function: Any, *args: Any, **settings: Any) -> Call:
        """The call of a jitted function with shapes in place of arrays."""
        key = signature(function, args, settings)
        if key not in self.calls:
            self.calls[key] = compile_call(function.lower(*args, **settings))
        return self.calls[key]


def signature(function: Any, args: Any, settings: Any) -> Any:
    """Equal for calls that jax serves with the same program."""
    leaves, tree = jax.tree.flatten((args, settings))
    return function, tree, tuple(map(_kind, leaves))


def _kind(leaf: Any) -> Any:
    if not hasattr(leaf, "dtype"):
        return leaf
    return leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)


def compile_call(lowered: Any) -> Call:
    """Compiles what `jax.jit(…).lower` gave."""
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


def located(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """The leaf's shape, where it lies."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def heap_bytes(folder: Path) -> int | None:
    """Bytes that a program's temporaries take together, from what XLA wrote of their places.

    `memory_analysis` of TPU programs counts the gaps between them twice: a decode step's many
    small ones, each in 16 KiB of its own, look twice as large as they are.

    Returns:
        None where XLA wrote nothing that can be read.
    """
    texts = [file.read_text() for file in folder.glob("*buffer-assignment.txt")]
    sizes = [int(size) for text in texts for size in HEAP.findall(text)]
    return sum(sizes) if sizes else None


def count_collectives(text: str) -> Counter[str]:
    """Collectives of a compiled program; one that is done in pieces counts once."""
    return Counter(kind for kind, *_ in {call.groups() for call in CALL.finditer(text)})
