"""Headers of safetensors files that break the rules of the format."""

import json
import re

import pytest

from kvjax.checkpoint_files import read_head, read_header


def entry(first, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, end]}


def write_raw(path, header, size, length=None):
    """A safetensors file from its header, as text or object, and zeros for data."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + bytes(size))


TWICE = '{"a": %s, "a": %s}' % (json.dumps(entry(0, 8)), json.dumps(entry(8, 16)))  # noqa: UP031


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"a": entry(-8, 0)}, 0, "a.data_offsets[0] is -8, expected a whole number of at least 0"),
        ({"a": entry(8, 0)}, 8, "-8 bytes for shape (2,) F32"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "b overlaps another tensor: begins at byte 4"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "b overlaps another tensor: begins at byte 0"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "b follows a hole: begins at byte 12"),
        ({"a": entry(8, 16)}, 16, "a follows a hole: begins at byte 8, expected 0"),
        ({"a": entry(0, 8)}, 9, "x.safetensors is damaged: got "),
        ({"a": entry(0, 8)}, 7, "x.safetensors is truncated: got "),
        ({}, 3, "x.safetensors is damaged: got "),
        ({"a": entry(0, 8, (-2,))}, 8, "a.shape[0] is -2, expected a whole number of at least 0"),
        ({"a": entry(0, 8, (2.0,))}, 8, "a.shape[0] is 2.0, expected a whole number of at"),
        ({"a": entry(0, 8, (True, 2))}, 8, "a.shape[0] is True, expected a whole number of"),
        ({"a": entry(0, 8, (2**62, 4))}, 8, "8 bytes for shape (4611686018427387904, 4) F32"),
        ({"a": entry(0, 8, (3,))}, 8, "8 bytes for shape (3,) F32"),
        ({"a": entry(0, 8, dtype="F4")}, 8, "a.dtype is 'F4', expected one of F64, F32"),
        ({"a": {**entry(0, 8), "dtype": ["F32"]}}, 8, "is not a safetensors file"),
        ({"a": {**entry(0, 8), "data_offsets": [0, 4, 8]}}, 8, "is not a safetensors file"),
        ({"a": {**entry(0, 8), "data_offsets": 8}}, 8, "is not a safetensors file"),
        ({"a": "F32"}, 8, "is not a safetensors file"),
        (
            {"a": entry(0, 8), "__metadata__": {"step": 3}},
            8,
            "its __metadata__: step is 3, expected a text",
        ),
        (TWICE, 16, "its header is not JSON: 'a' comes twice in an object"),
        ("[1]", 0, "is not a safetensors file: its header holds a list, expected an object"),
        ('"text"', 0, "is not a safetensors file: its header holds 'text', expected an object"),
        ("\udcff{}", 0, "is not a safetensors file"),
        ("[" * 100_000, 0, "is not a safetensors file"),
    ],
)
def test_headers_that_break_the_rules_of_the_format(tmp_path, header, size, message):
    path = tmp_path / "x.safetensors"
    if isinstance(header, str):
        header = header.encode("utf-8", "surrogateescape")
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    else:
        write_raw(path, header, size)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_header(path)
    assert "\n" not in str(error.value) and "x.safetensors" in str(error.value)


def test_safetensors_itself_refuses_these(tmp_path):
    """Holes, overlaps and trailing bytes are against the format, not against our taste."""
    from safetensors import SafetensorError, safe_open

    for header, size in (
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20),
        ({"a": entry(0, 8)}, 9),
    ):
        write_raw(tmp_path / "x.safetensors", header, size)
        with pytest.raises(SafetensorError), safe_open(tmp_path / "x.safetensors", "numpy"):
            pass


def test_metadata_may_be_null_as_in_safetensors_itself(tmp_path):
    from safetensors import safe_open

    path = tmp_path / "x.safetensors"
    write_raw(path, {"__metadata__": None, "a": entry(0, 8)}, 8)
    with safe_open(path, "numpy") as file:
        assert list(file.keys()) == list(read_header(path)) == ["a"]
    assert read_head(path)[1] == {}


def test_an_absurd_header_length(tmp_path):
    write_raw(tmp_path / "x.safetensors", {}, 0, length=2**60)
    with pytest.raises(
        ValueError, match="is not a safetensors file: a header of 1152921504606846976"
    ):
        read_header(tmp_path / "x.safetensors")
