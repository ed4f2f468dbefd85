"""Valid inputs made slightly invalid: bytes, JSON, tables, YAML, safetensors and gzip.

Everything is drawn from the given random generator, so a seed names an input. Knows no reader.
"""

import copy
import gzip
import json
import re
import struct
from random import Random

TEXTS = (
    "", " ", "a", "0", "-1", "1e999", "nan", "-inf", "9" * 5000, "0x" + "f" * 5000, "1_0", "١٢",
    "a" * 3000, "\0", "\t", "\r", "\n", "\x1c", "\x85", "\u2028", "\ufeff", "\ud800", "\udcff",
    "é💥", "&#0;&#xD800;&amp;", '"', "'", "[", "]", "{", "::", "\\", "../../etc/passwd", "/", ".",
    "{{ title }}", "%s", "[/b]", "<script>", "<|im_end|>", "None", "true", "-0", "1" + "0" * 400,
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2, 3.5, -0.0, 5e-324, 1e308, -1e308, 2**31, -(2**63), 2**64, 10**30, True, False,
)  # fmt: skip
# What json.dumps cannot write stands in the value as a marker, and is put in afterwards.
_RAW = ("9" * 5000, "1e999", "NaN", "-Infinity", "1" + "0" * 400, r'"\ud800"', r'"\u0000"', "")
_MARKER = re.compile(r'"@(raw|deep):(\d+)@"')
_TWICE = "@twice@"
BOM = b"\xef\xbb\xbf"
_BYTES = (
    b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\r", b"\n", b"\r\n", b"\t", b'"', b"'", b"\\", b",",
    b":", b"|", b"{", b"}", b"[", b"]", b"-", b"9" * 40, b"NaN", b"null", b"\\ud800", b"\x1a", BOM,
    b"\x1f\x8b", b" " * 70, b"\x80\x80", b"\xff\xff\xff\x7f", b"\xe2\x80\xa8", b"#", b"&a ", b"*a",
)  # fmt: skip


def text(rng: Random) -> str:
    """Returns a text that readers may stumble over."""
    return rng.choice(TEXTS)


def mutate_bytes(rng: Random, data: bytes, times: int | None = None) -> bytes:
    """Returns the bytes with a few flipped, cut, repeated, moved or put in."""
    for _ in range(times or rng.choice((1, 1, 1, 2, 3, 8))):
        at, end = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
        kind = rng.randrange(9)
        if kind == 0 and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + rng.choice(_BYTES) + data[at:]
        elif kind == 2:
            data = data[:at] + rng.choice(_BYTES) + data[at + 1 :]
        elif kind == 3:
            data = data[:at]
        elif kind == 4:
            data = data[:at] + data[end:]
        elif kind == 5:
            data = data[:end] + data[at:end][:200] * rng.choice((1, 2, 30)) + data[end:]
        elif kind == 6:
            data = data[end:] + data[at:end] + data[:at]
        elif kind == 7:
            data = data.replace(b"\n", b"\r\n") if rng.random() < 0.5 else BOM + data
        else:
            data = data[:at] + rng.randbytes(rng.choice((1, 4, 20))) + data[at:]
    return data


def odd(rng: Random) -> object:
    """Returns a JSON value of any kind."""
    kind = rng.randrange(10)
    if kind < 3:
        return text(rng)
    if kind < 5:
        return rng.choice(NUMBERS)
    if kind == 5:
        return None
    if kind == 6:
        return rng.choice(([], {}, [None], {"a": 1}, [[]], ["a", "a"], {"": ""}, [{}], [1, "a"]))
    if kind == 7:
        return f"@deep:{rng.choice((5, 300, rng.randint(850, 1000), 3000))}@"
    return f"@raw:{rng.randrange(len(_RAW))}@"


def mutate_value(rng: Random, value: object, times: int | None = None) -> object:
    """Returns a JSON value with a few parts of it replaced, removed, renamed, moved or doubled."""
    root = [copy.deepcopy(value)]
    for _ in range(times or rng.choice((1, 1, 1, 2, 2, 4))):
        _mutate_once(rng, root)
    return root[0] if root else None


def _mutate_once(rng: Random, root: list) -> None:
    spots = list(_spots(root))
    if not spots:
        return
    container, key = rng.choice(spots)
    kind = rng.randrange(10)
    if kind < 4:
        container[key] = odd(rng)
    elif kind == 4:
        del container[key]
    elif kind == 5:
        other, place = rng.choice(spots)
        if place in other if isinstance(other, dict) else place < len(other):
            container[key] = copy.deepcopy(other[place])
    elif kind == 6:
        container[key] = [container[key]]
    elif kind == 7 and isinstance(container[key], list):
        container[key] = container[key] * rng.choice((0, 2, 2, 40))
    elif kind == 8 and isinstance(container[key], int | float):
        container[key] = str(container[key])
    elif isinstance(container, dict):
        name = rng.choice((f"{key}{_TWICE}", f"{key}s", key[:-1], text(rng)))
        container[name] = odd(rng) if rng.random() < 0.5 else container[key]


def _spots(value: object) -> list:
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    else:
        return []
    return [(value, key) for key, _ in pairs] + [s for _, part in pairs for s in _spots(part)]


def dump(value: object, **options: object) -> bytes:
    """Returns the JSON of a value that `mutate_value` made; lone surrogates are escaped."""
    found = json.dumps(value, **options).replace(_TWICE, "")
    return _MARKER.sub(_raw, found).encode("utf-8", "surrogatepass")


def _raw(match: re.Match) -> str:
    number = int(match[2])
    if match[1] == "raw":
        return _RAW[number]
    opened, closed = ("[", "]") if number % 2 else ('{"a":', "}")
    return opened * number + "1" + closed * number


def json_bytes(rng: Random, value: object) -> bytes:
    """Returns a JSON value mutated as a value, as bytes, or as both."""
    kind = rng.random()
    data = dump(mutate_value(rng, value) if kind < 0.8 else value, ensure_ascii=rng.random() < 0.5)
    return mutate_bytes(rng, data) if kind > 0.7 else data


def json_lines(rng: Random, values: list) -> bytes:
    """Returns JSON lines of which one is mutated, or the bytes are."""
    lines = [json.dumps(value, ensure_ascii=False).encode() for value in values]
    if rng.random() < 0.8:
        place = rng.randrange(len(lines))
        lines[place] = json_bytes(rng, values[place])
    data = b"\n".join(lines) + b"\n"
    return data if rng.random() < 0.7 else mutate_bytes(rng, data)


def table(rng: Random, rows: str, separator: str) -> bytes:
    """Returns a table of which a few cells and rows are changed, or the bytes are."""
    cells = [line.split(separator) for line in rows.splitlines()]
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        row = rng.choice(cells)
        at = rng.randrange(len(row)) if row else 0
        kind = rng.randrange(7)
        if kind < 3 and row:
            row[at] = text(rng)
        elif kind == 3 and row:
            del row[at]
        elif kind == 4:
            row.insert(at, text(rng))
        elif kind == 5 and row:
            row[at] = rng.choice(rng.choice(cells) or [""])
        else:
            cells.insert(rng.randint(0, len(cells)), list(row))
    data = "\n".join(separator.join(row) for row in cells).encode("utf-8", "surrogatepass")
    return data if rng.random() < 0.6 else mutate_bytes(rng, data)


YAML_VALUES = (
    "", "~", "*a", "&a [*a]", "&a x", "[", "{", "]", "!!int x", "!!int ''", "!!float x", "!!bool x",
    "!!timestamp x", "!!binary =", "!!binary YQ==", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a]",
    "!!python/object/apply:os.system [true]", "!x y", "2020-13-45", "2020-01-01",
    "2001-12-14t21:59:43.10+99:99", "1:60:61", "0b", "0x", "0o8", "0x" + "f" * 5000, "9" * 5000,
    ".nan", "-.inf", "1e5", "1.0e999", "<<", "? [a]\n: b", "- a\n- b", '"\\ud800"', '"\\x00"', "'",
    '"', "|", ">-\n  x", "%YAML 9", "--- x", "...", "# x", "\t", "yes", "=", "[a, b]",
    "{a: 1, a: 2}", "{[a]: 1}", "{2020-01-01: 1}", "{1: 2}", "{~: 1}", "@", "`", "a: b", "lora",
    "builtins:int", "os:path", ":", ".x:y", "math:pi", "[" * 400, "{a: " * 300, "- " * 300,
    "&a {b: &b {c: &c [1]}, d: *b}", "{<<: *a}", "{<<: {a: 1}}", "{<<: 3}", "{<<: [1]}",
)  # fmt: skip
BOMB = "&a [x, x, x, x, x, x, x, x]" + "".join(
    f"\nk{chr(i)}: &{chr(i)} [{', '.join(['*' + chr(i - 1)] * 8)}]" for i in range(98, 112)
)
"""A list of eight lists of eight lists ...: 8**15 texts."""


def yaml_text(rng: Random, source: str) -> bytes:
    """Returns YAML of which some lines have other values, keys or indents, or the bytes are."""
    lines = source.splitlines()
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        at = rng.randrange(len(lines))
        key, colon, _ = lines[at].partition(":")
        kind = rng.randrange(9)
        if kind < 4:
            lines[at] = f"{key}{colon} {rng.choice(YAML_VALUES)}"
        elif kind == 4:
            lines[at] = f"{key}: {rng.choice((BOMB, json.dumps(text(rng)), text(rng)))}"
        elif kind == 5:
            lines.insert(at, lines[rng.randrange(len(lines))])
        elif kind == 6:
            del lines[at]
            lines = lines or [""]
        elif kind == 7:
            lines[at] = " " * rng.randrange(4) + lines[at]
        else:
            lines[at] = f"{key[: len(key) - len(key.lstrip())]}{rng.choice(YAML_VALUES)}: 1"
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    return data if rng.random() < 0.7 else mutate_bytes(rng, data)


_DTYPES = (
    "F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64",
    "F6_E2M3", "X", "", "f32", "U64",
)  # fmt: skip
_SIZES = (0, 1, 2, 3, 4, 8, -1, 2**31, 2**62, 2**63, 2**64, 1.5, "4", None)


def safetensors(rng: Random, data: bytes) -> bytes:
    """Returns a safetensors file whose header says something else, or with other bytes."""
    if rng.random() < 0.25:
        return mutate_bytes(rng, data)
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(list(header))
        entry = header[name] if isinstance(header[name], dict) else {}
        kind = rng.randrange(7)
        if kind == 0:
            entry["dtype"] = rng.choice(_DTYPES)
        elif kind == 1 and isinstance(entry.get("shape"), list):
            entry["shape"].insert(rng.randint(0, len(entry["shape"])), rng.choice(_SIZES))
        elif kind == 2 and isinstance(entry.get("shape"), list) and entry["shape"]:
            entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(_SIZES)
        elif kind == 3 and isinstance(entry.get("data_offsets"), list):
            entry["data_offsets"] = [rng.choice(_SIZES), rng.choice((*_SIZES, len(body)))]
        elif kind == 4:
            header[rng.choice((text(rng), name + "x", name[:-1]))] = header.pop(name)
        elif kind == 5:
            header = mutate_value(rng, header)
        else:
            _resize(rng, entry)
        if not isinstance(header, dict) or not header:
            break
    if rng.random() < 0.2:
        body = mutate_bytes(rng, body, 1)
    packed = dump(header)
    told = len(packed) if rng.random() < 0.9 else rng.choice((0, 2, 2**31, 2**63, 10**8, size - 1))
    return struct.pack("<Q", told) + packed + body


def _resize(rng: Random, entry: dict) -> None:
    """Gives a tensor another shape of the same number of elements, where it can."""
    shape = entry.get("shape")
    if isinstance(shape, list) and all(isinstance(n, int) for n in shape):
        entry["shape"] = rng.choice((shape[::-1], [*shape, 1], [1, *shape], shape + shape))


def packed(rng: Random, data: bytes) -> bytes:
    """Returns the bytes compressed, often cut short, damaged, or with more behind."""
    found = gzip.compress(data, 1, mtime=0)
    kind = rng.randrange(5)
    if kind == 0:
        return found[: rng.randrange(len(found))]
    if kind == 1:
        return mutate_bytes(rng, found)
    if kind == 2:
        return found + rng.choice((b"x", found, b"\0" * 50, found[:9]))
    return found
