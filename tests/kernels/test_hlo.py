"""The search for copies, on which tests of compiled programs rest."""

from kernels.hlo import copies

HLO = """
%body.1 (x: f32[4,8]) -> f32[4,8] {
  %c = f32[4,8]{1,0} copy(%x)
  %w = f32[4,8]{1,0} fusion(%c), kind=kLoop, calls=%wrapped_copy_computation
}
%branch (x: f32[4,8]) -> f32[4,8] {
  %b = f32[4,8]{1,0} convert(%x)
}
ENTRY %main (y: bf16[64]) -> bf16[64] {
  %d = bf16[64]{0:T(128)} transpose(%y), dimensions={0}
  %e = f32[4096]{0} add(%y, %y)
  %f = (s32[], f32[4,8]{1,0}) while(%t), condition=%cond, body=%body.1
}
"""


def names(**settings):
    return [line.split()[0] for line in copies(HLO, **settings)]


def test_copies():
    assert names(size=32) == ["%c", "%w", "%b", "%d"]
    assert names(size=33) == ["%d"]
    assert names(size=32, where="not entry") == ["%c", "%w", "%b"]
    assert names(size=32, where="loop") == ["%c", "%w"]
