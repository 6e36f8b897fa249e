"""Ways to spoil a file: fields that are odd, missing, unknown or there twice, and damaged bytes."""

import copy
import gzip
import json
import lzma
from pathlib import Path

from hypothesis import strategies as st

ODD = [
    *(None, True, False, "", "x", "3", "1e-3", "\0", "../../x", "/etc/passwd", "C:\\x", "a" * 5000),
    *(-1, 0, 1, 3, 7, 0.5, -0.5, 1e-50, 1e39, 1e308, 2**31, 2**53, 2**63, 10**15, 10**400),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        [],
        {},
        [[]],
        [None],
        [1, "x"],
        {"x": 1},
        [0] * 99,
    ),
    *("full", "gqa", "silu", "linear", "full_attention", "../x:kv_size=3", "gs://b/x"),
]
"""Values that are wrong in most places."""
BOMB = "&a [x, x, x, x, x, x, x, x, x, x]"
TEXTS = [
    *(b"", b"\n", b"null", b"[]", b"{}", b"3", b'"x"', b"[" * 100_000, b'{"a":' * 100_000, b"\xff"),
    *(
        b"\xef\xbb\xbf{}",
        "{}".encode("utf-16"),
        b'{"a": 1, "a": 2}',
        b'{"a": "\\ud800"}',
        b"- " * 99,
    ),
    *(b"9" * 5000, b"{\x00}", b"\0" * 64, b"a: !!python/object:os.system x", b"a: &a [*a]"),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 16060617592\n",
    f"a: {BOMB}\n".encode()
    + b"".join(
        b"%c: &%c [%s]\n" % (n, n, b", ".join([b"*%c" % (n - 1)] * 10)) for n in b"bcdefghi"
    ),
]
"""Contents that are wrong for most files."""


def places(value, above=()):
    """The keys that lead to each value inside of a JSON value."""
    yield above
    parts = value.items() if isinstance(value, dict) else ()
    parts = enumerate(value) if isinstance(value, list) else parts
    for key, part in parts:
        yield from places(part, (*above, key))


def with_odd_fields(draw, value):
    """A JSON text with one to three fields that are odd, missing, unknown or there twice."""
    value, twice = copy.deepcopy(value), False
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from([p for p in places(value) if p] or [()]))
        how = draw(st.sampled_from(["odd", "odd", "odd", "odd", "missing", "unknown", "twice"]))
        if not place:
            value = copy.deepcopy(draw(st.sampled_from(ODD)))
            continue
        inside = value
        for key in place[:-1]:
            inside = inside[key]
        if how == "odd":
            inside[place[-1]] = copy.deepcopy(draw(st.sampled_from(ODD)))
        elif how == "missing":
            del inside[place[-1]]
        elif isinstance(inside, dict) and how == "unknown":
            inside[draw(st.sampled_from(["x", "", "0-0", "../../x"]))] = inside[place[-1]]
        else:
            twice = True
    text = json.dumps(value)
    return text.replace("{", '{"seed": 1, "seed": 1, ', 1) if twice else text


def with_odd_header(draw, data):
    """A safetensors file whose header has odd fields, in it or in the JSON of its metadata."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    texts = header.get("__metadata__", {})
    inner = [name for name, text in texts.items() if text[:1] in ("{", "[")]
    if inner and draw(st.integers(0, 3)):
        name = draw(st.sampled_from(inner))
        texts[name] = with_odd_fields(draw, json.loads(texts[name]))
        text = json.dumps(header).encode()
    else:
        text = with_odd_fields(draw, header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def with_odd_bytes(draw, data, other):
    """Bytes that are cut, flipped, inserted, taken out, exchanged or of another file."""
    how = draw(st.sampled_from(["cut", "flip", "flip", "insert", "take", "swap", "other", "text"]))
    at = draw(st.integers(0, max(0, len(data) - 1)))
    if how == "cut":
        return data[:at]
    if how == "flip":
        spoilt = bytearray(data or b"\0")
        for _ in range(draw(st.integers(1, 8))):
            spoilt[draw(st.integers(0, len(spoilt) - 1)) if at % 2 else at] = draw(
                st.integers(0, 255)
            )
        return bytes(spoilt)
    if how == "insert":
        return data[:at] + draw(st.binary(min_size=1, max_size=12)) + data[at:]
    if how == "take":
        return data[:at] + data[at + draw(st.integers(1, 40)) :]
    if how == "swap":
        return data[at:] + data[:at]
    return other if how == "other" else draw(st.sampled_from(TEXTS))


def spoilt(draw, kind, others):
    """The bytes of the file that is spoilt."""
    name, data = kind.spoilt, kind.files[kind.spoilt]
    packs = {".gz": (gzip.decompress, gzip.compress), ".xz": (lzma.decompress, lzma.compress)}
    unpack, pack = packs.get(Path(name).suffix, (bytes, bytes))
    if draw(st.integers(0, 2)) == 0:
        return with_odd_bytes(draw, data, draw(st.sampled_from(others)))
    if name.endswith((".safetensors", ".kv")):
        return with_odd_header(draw, data)
    if ".jsonl" in name:
        lines = unpack(data).splitlines()
        at = draw(st.integers(0, len(lines) - 1))
        lines[at] = with_odd_fields(draw, json.loads(lines[at])).encode()
        return pack(b"\n".join(lines) + b"\n")
    if ".json" in name:
        return pack(with_odd_fields(draw, json.loads(unpack(data))).encode())
    if name.endswith(".yaml"):
        import yaml

        # JSON is YAML, apart from the names of a few numbers.
        return with_odd_fields(draw, yaml.safe_load(data)).replace("NaN", ".nan").encode()
    return with_odd_bytes(draw, data, draw(st.sampled_from(others)))
