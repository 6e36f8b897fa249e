"""The GPU kernels in the interpreter: few shapes, which between them have all that can differ.

Tensor cores take 16 bits, so all of this is in bfloat16. What the compilers say to the kernels at
the shapes of real models is in test_gpu_compiler.py.
"""

import jax
import numpy as np
import pytest
from kernels.oracle import Options, check_gqa, check_mla, check_ragged, interpreted_gpu
from kernels.test_tpu import skewed

from pallas_kernels import tables

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="jax's interpreter of GPU kernels needs 0.11.2"
)
PLAIN, CAPPED = Options("bfloat16"), Options("bfloat16", softcap=2.0)

# lengths, slots, query heads, KV heads, head dim, options
GQA = {
    "a_block_and_one_more_or_less": ((63, 64, 65), 80, 8, 2, 64, PLAIN),
    "zero_and_full": ((0, 5, 16), 16, 8, 1, 96, CAPPED),
    "window_over_blocks": ((40, 130, 200), 200, 2, 2, 128, Options("bfloat16", window=100)),
    "int8": ((9, 150), 160, 8, 2, 128, Options("bfloat16", "int8")),
    "nothing": ((0, 0), 16, 2, 1, 64, PLAIN),
}
# lengths, slots, query heads, latent rank, rope dim, options
MLA = {
    "deepseek": ((0, 63, 130), 136, 128, 512, 64, PLAIN),
    "transmla": ((100,), 104, 32, 448, 128, Options("bfloat16", window=70, softcap=2.0)),
    "fp8": ((7, 100), 104, 8, 512, 64, Options("bfloat16", "float8_e4m3fn")),
    "no_rope": ((40,), 48, 8, 256, 0, PLAIN),
}


@pytest.fixture(autouse=True)
def three_multiprocessors():
    """Segments are cut between shares, and not every share has work."""
    with tables.using(shares=3):
        yield


@pytest.fixture(autouse=True)
def no_races():
    yield
    from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import get_races

    assert not get_races().races_found


@pytest.mark.parametrize("case", GQA)
def test_gqa_decode(case):
    with interpreted_gpu():
        check_gqa(*GQA[case], "pallas_gpu")


def test_gqa_decode_with_64_bit_types():
    """The flag of the process: a context reaches only one of the interpreter's threads."""
    jax.config.update("jax_enable_x64", True)
    try:
        with interpreted_gpu():
            check_gqa(*GQA["window_over_blocks"], "pallas_gpu")
    finally:
        jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("case", MLA)
def test_mla_decode(case):
    with interpreted_gpu():
        check_mla(*MLA[case], "pallas_gpu")


@pytest.mark.parametrize(
    ("options", "hidden"), [(CAPPED, 0.3), (Options("bfloat16", "float8_e4m3fn"), 0.0)]
)
def test_ragged_gqa_decode(options, hidden):
    starts, capacities, lengths, P = skewed(0, 8, (3, 200, 0, 40, 67))
    static = (tuple(int(x) for x in xs) for xs in (starts, capacities))
    with interpreted_gpu():
        check_ragged(*static, lengths, P, 4, 64, options, "pallas_gpu", hidden=hidden)


def test_ragged_gqa_decode_in_a_sliding_window():
    starts, capacities, lengths, P = skewed(3, 8, (3, 200, 0, 40, 67))
    with interpreted_gpu():
        settings = {"align": 8, "hidden": 0.4, "newer": True}
        starts, capacities = (np.stack([x, x]) for x in (starts, capacities))
        check_ragged(starts, capacities, lengths, P, 2, 64, PLAIN, "pallas_gpu", **settings)


def test_ragged_gqa_decode_with_segments_of_each_sequence():
    pools = [skewed(seed, 8, (3, 200, 0, 40, 67)) for seed in (1, 2)]
    starts, capacities = (np.stack([pool[i] for pool in pools]) for i in (0, 1))
    lengths = np.stack([pool[2][1] for pool in pools])
    with interpreted_gpu():
        check_ragged(starts, capacities, lengths, pools[0][3], 2, 64, PLAIN, "pallas_gpu", align=8)
