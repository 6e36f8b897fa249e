"""The search for copies, on which tests of compiled programs rest."""

from kernels.hlo import copies

HLO = """
body {
  %c = f32[4,8]{1,0} copy(%x)
}
ENTRY main {
  %d = bf16[64]{0:T(128)} transpose(%y), dimensions={0}
  %e = f32[4096]{0} add(%y, %y)
}
"""


def test_copies():
    inside, outside = (
        "%c = f32[4,8]{1,0} copy(%x)",
        "%d = bf16[64]{0:T(128)} transpose(%y), dimensions={0}",
    )
    assert copies(HLO, 32) == [inside, outside]
    assert copies(HLO, 33) == [outside]
    assert copies(HLO, 32, only_loops=True) == [inside]
