"""The TPU kernels in the interpreter: few shapes, which between them have all that can differ.

The default blocks have 512 rows. That the compiler for TPUs takes the kernels at the shapes of real
models is tested in test_tpu_compiler.py.
"""

import jax._src.pallas.mosaic.interpret.interpret_pallas_call as interpreter
import numpy as np
import pytest
from kernels.oracle import Options, check_gqa, check_mla, check_ragged, interpreted_tpu

# lengths, slots, query heads, KV heads, head dim, options
GQA = {
    "a_block_and_one_more_or_less": ((511, 512, 513), 600, 8, 2, 64, Options()),
    "window_over_blocks": ((40, 700, 1030), 1030, 4, 2, 128, Options(window=520, softcap=2.0)),
    "zero_and_full": ((0, 5, 16), 16, 8, 1, 96, Options("bfloat16")),
    "int8": ((9, 600), 640, 2, 2, 256, Options("bfloat16", "int8")),
    "nothing": ((0, 0), 16, 2, 1, 64, Options(entries="float8_e4m3fn", window=6)),
}
# lengths, slots, query heads, latent rank, rope dim, options
MLA = {
    "a_block_and_one_more_or_less": ((0, 511, 512, 513), 600, 8, 96, 32, Options()),
    "deepseek": ((1, 40), 48, 128, 512, 64, Options("bfloat16", softcap=2.0)),
    "fp8_in_a_window": (
        (7, 700),
        1030,
        8,
        64,
        16,
        Options("bfloat16", "float8_e4m3fn", window=520),
    ),
    "no_rope": ((0, 40), 48, 4, 24, 0, Options(window=6)),
}


def skewed(seed, tile, sizes=(3, 1400, 0, 40, 515)):
    """Starts, capacities, lengths [2, K] and rows of a pool; the second sequence holds less."""
    rng = np.random.default_rng(seed)
    capacities = rng.permutation(sizes).astype(np.int32)
    rounded = -(-capacities // tile) * tile
    starts = np.cumsum(rounded, dtype=np.int32) - rounded
    lengths = np.stack([capacities, rng.integers(0, capacities + 1)]).astype(np.int32)
    return starts, capacities, lengths, -(-int(rounded.sum()) // 64) * 64


@pytest.fixture(autouse=True)
def no_races():
    yield
    assert not interpreter.races.races_found


@pytest.mark.parametrize("case", GQA)
def test_gqa_decode(case):
    with interpreted_tpu():
        check_gqa(*GQA[case], "pallas_tpu")


@pytest.mark.parametrize("case", MLA)
def test_mla_decode(case):
    with interpreted_tpu():
        check_mla(*MLA[case], "pallas_tpu")


@pytest.mark.parametrize(
    ("tile", "options", "hidden"),
    [
        (8, Options(), 0.0),
        (16, Options("bfloat16", softcap=2.0), 0.3),
        (32, Options("bfloat16", "int8"), 0.0),
    ],
)
def test_ragged_gqa_decode(tile, options, hidden):
    starts, capacities, lengths, P = skewed(0, tile)
    static = (tuple(int(x) for x in xs) for xs in (starts, capacities))
    with interpreted_tpu():
        check_ragged(*static, lengths, P, 4, 64, options, "pallas_tpu", hidden=hidden)


def test_ragged_gqa_decode_in_a_small_pool():
    with interpreted_tpu():
        options, lengths = Options(entries="float8_e4m3fn"), np.array([[9, 30], [0, 1]], np.int32)
        check_ragged((0, 32), (9, 30), lengths, 64, 1, 64, options, "pallas_tpu")


def test_ragged_gqa_decode_in_a_sliding_window():
    starts, capacities, lengths, P = skewed(3, 16)
    with interpreted_tpu():
        settings = {"align": 16, "hidden": 0.4, "newer": True}
        starts, capacities = (np.stack([x, x]) for x in (starts, capacities))
        arguments = (lengths, P, 2, 64, Options("bfloat16"), "pallas_tpu")
        check_ragged(starts, capacities, *arguments, **settings)


def test_ragged_gqa_decode_with_segments_of_each_sequence():
    pools = [skewed(seed, 8) for seed in (1, 2)]
    starts, capacities = (np.stack([pool[i] for pool in pools]) for i in (0, 1))
    lengths = np.stack([pool[2][1] for pool in pools])
    with interpreted_tpu():
        check_ragged(
            starts, capacities, lengths, pools[0][3], 2, 64, Options(), "pallas_tpu", align=8
        )


def test_two_cores_share_the_work():
    """On chips whose two cores are one device."""
    with interpreted_tpu("TPU v5", cores=2):
        check_gqa((300, 1500), 1536, 4, 1, 64, Options(window=1000), "pallas_tpu")
