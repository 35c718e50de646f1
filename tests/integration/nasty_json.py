"""Messages that nobody honest sends: made from the schema, and a list of the known worst."""

import json
import typing
from typing import Final

import msgspec
from hypothesis import strategies as st

from trioserver import messages

LARGEST: Final = 16 << 10
"""Bytes that a client's message may have as shipped."""

WORST: Final = {
    "nested arrays": b"[" * 8_000 + b"]" * 8_000,
    "nested objects": b'{"a":' * 3_000 + b"1" + b"}" * 3_000,
    "nested and never closed": b'{"type":"message","payload":' + b"[" * 16_000,
    "a nested payload": b'{"type":"message","payload":' + b"[" * 8_000 + b"]" * 8_000 + b"}",
    "a nested type": b'{"type":' + b"[" * 8_000 + b"]" * 8_000 + b"}",
    "an integer of 10,000 digits": b'{"type":"message","ref":' + b"9" * 10_000 + b"}",
    "a type of 10,000 digits": b'{"type":' + b"9" * 10_000 + b"}",
    "1e999": b'{"type":"ping","ref":1e999}',
    "a type of 1e999": b'{"type":1e999}',
    "NaN": b'{"type":"ping","ref":NaN}',
    "Infinity": b'{"type":"message","payload":-Infinity}',
    "types that differ": b'{"type":"ping","type":"dance"}',
    "half a character pair": b'{"type":"ping","ref":"\\ud800"}',
    "half a pair as a type": b'{"type":"\\udc00"}',
    "half a pair as a key": b'{"type":"ping","\\ud800":1}',
    "NUL": b'{"type":"pi\0ng"}',
    "NUL, escaped": b'{"type":"ping\\u0000"}',
    "a list": b'["type","ping"]',
    "a text": b'"ping"',
    "nothing": b"",
    "blanks": b" " * 16_000,
    "2,000 keys": json.dumps({"type": "dance"} | {str(i): i for i in range(1_500)}).encode(),
    "the same key 2,000 times": b'{"type":"dance"' + b',"a":1' * 2_000 + b"}",
    "a huge ref": b'{"type":"ping","ref":"' + b"x" * 16_000 + b'"}',
    "a huge type": b'{"type":"' + b"x" * 16_000 + b'"}',
    "a token of an object": b'{"type":"auth","token":{}}',
    "rubbish behind": b'{"type":"ping"}{',
    "a byte order mark": b'\xef\xbb\xbf{"type":"ping"}',
}
"""None of these is a message; each is text and small enough to be looked at."""

BEYOND: Final = {
    "nesting of 200,000": b"[" * 200_000 + b"]" * 200_000,
    "a payload nested 200,000 times": b'{"type":"message","payload":' + b"[" * 200_000,
    "10 keys to the fifth": json.dumps({str(i): i for i in range(100_000)}).encode(),
    "a user id of a megabyte": b'{"type":"auth","token":"' + b"x" * (1 << 20) + b'"}',
}
"""Larger than the limit as shipped, which an operator may raise."""

_numbers = st.one_of(
    st.integers(-(1 << 70), 1 << 70).map(str),
    st.integers(1, 10_000).map(lambda digits: "9" * digits),
    st.floats().map(json.dumps),
    st.sampled_from(["1e999", "-1e999", "-0", "0e0", "1E400", "00", "+1", "1.", ".5", "NaN"]),
)
_texts = st.one_of(
    # Without escapes of Python's: control characters and line ends stay as they are.
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30).map(lambda text: f'"{text}"'),
    st.text(max_size=30).map(json.dumps),
    st.sampled_from(
        ['"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"\\x"', '"', f'"{"x" * 9000}"']
    ),
)
_nested = st.builds(
    lambda brackets, depth, closed: brackets[0] * depth + brackets[1] * depth * closed,
    st.sampled_from([("[", "]"), ('{"a":', "}"), ('[{"":', "}]")]),
    st.integers(1, 1_500),
    st.booleans(),
)
_scalars = st.one_of(st.sampled_from(["null", "true", "false", "", "nul"]), _numbers, _texts)


def _object(pairs: list[tuple[str, str]]) -> str:
    return "{" + ",".join(f"{key}:{value}" for key, value in pairs) + "}"


_values = st.recursive(
    st.one_of(_scalars, _nested),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda items: "[" + ",".join(items) + "]"),
        st.lists(st.tuples(_texts, inner), max_size=4).map(_object),
    ),
    max_leaves=6,
)


def _of(kind: type[msgspec.Struct]) -> st.SearchStrategy[str]:
    """Return messages that claim to be of this kind; fields are right, wrong or there twice."""
    tag = json.dumps(kind.__struct_config__.tag)
    names = [json.dumps(field.encode_name) for field in msgspec.structs.fields(kind)]
    pairs = st.tuples(st.sampled_from([*names, '"type"', '"unknown"']), _values)
    right = st.sampled_from([*((name, '"good"') for name in names), ('"type"', tag)])
    return st.lists(st.one_of(right, pairs), max_size=4).map(
        lambda rest: _object([('"type"', tag), *rest])
    )


_whole = st.one_of(*map(_of, typing.get_args(messages.ClientMessage)), _values)
_cut = st.builds(lambda text, where: text[: int(len(text) * where)], _whole, st.floats(0, 1))

MESSAGES: Final = st.one_of(_whole, _whole, _cut).map(
    lambda text: text.encode("utf-8", "replace")[:LARGEST].decode("utf-8", "ignore").encode()
)
"""Valid UTF-8 of at most `LARGEST` bytes, as the codec hands it on; now and then even right."""
