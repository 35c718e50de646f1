"""Schemas of payloads: what is found when they are loaded, and what a refusal says."""

import json
import socket
from pathlib import Path
from typing import Final

import hypothesis.strategies as st
import pytest
from hypothesis import given

from trioserver import payload_schemas
from trioserver.errors import SettingsError
from trioserver.payload_schemas import MAX_PATH, MAX_REASON, PayloadSchemas

DRAFT_3: Final = "http://json-schema.org/draft-03/schema#"
DRAFT_4: Final = "http://json-schema.org/draft-04/schema#"
DRAFT_7: Final = "http://json-schema.org/draft-07/schema#"
SECRET: Final = "hunter2"
NULL: Final = {"type": "null"}

ORDER: Final[dict[str, object]] = {
    "type": "object",
    "properties": {
        "order": {"type": "integer", "minimum": 1},
        "lines": {"type": "array", "items": {"$ref": "#/$defs/line"}},
    },
    "required": ["order"],
    "additionalProperties": False,
    "$defs": {"line": {"type": "object", "properties": {"price": {"multipleOf": 0.01}}}},
}


def load(directory: Path, schemas: object) -> PayloadSchemas:
    """Write a file, of JSON or of just this text, and load it."""
    path = directory / "schemas.json"
    path.write_text(schemas if isinstance(schemas, str) else json.dumps(schemas))
    return payload_schemas.load(path)


def schema(directory: Path, one: object) -> PayloadSchemas:
    """Load one schema, of the type ``t``."""
    return load(directory, {"t": one})


def reason(schemas: PayloadSchemas, payload: str) -> tuple[str, str] | None:
    """Return where a payload of the type ``t`` does not fit, and why."""
    misfit = schemas.misfit("t", payload.encode())
    return None if misfit is None else (misfit.path, misfit.reason)


# ---- What fits


def test_what_fits(tmp_path: Path) -> None:
    """A payload that fits is let through, and so is one of a type without a schema."""
    schemas = load(tmp_path, {"order": ORDER})

    assert schemas.misfit("order", b'{"order": 1, "lines": [{"price": 1}]}') is None
    assert schemas.misfit("other", b'"anything"') is None
    assert load(tmp_path, {}).misfit("order", b"1") is None


@pytest.mark.parametrize(
    ("payload", "path", "why"),
    [
        ("1", "", "is not of type object"),
        ("{}", "", 'lacks "order"'),
        ('{"order": "hunter2"}', "/order", "is not of type integer"),
        ('{"order": 0}', "/order", "does not fit minimum: 1"),
        ('{"order": 1, "x": 1}', "", "has properties that are not foreseen"),
        ('{"order": 1, "lines": [{}, 2]}', "/lines/1", "is not of type object"),
        (
            '{"order":1,"lines":[{"price":0.001}]}',
            "/lines/0/price",
            "does not fit multipleOf: 0.01",
        ),
    ],
)
def test_what_does_not(tmp_path: Path, payload: str, path: str, why: str) -> None:
    """A refusal says where it is, and what the schema wants there."""
    assert (path, why) == reason(schema(tmp_path, ORDER), payload)


def test_a_refusal_is_a_sentence(tmp_path: Path) -> None:
    """It names the type and the place."""
    schemas = load(tmp_path, {"order": ORDER})

    assert 'the payload does not fit the schema of "order": /order is not of type integer' == str(
        schemas.misfit("order", b'{"order": null}')
    )
    assert 'the payload does not fit the schema of "order": lacks "order"' == str(
        schemas.misfit("order", b"{}")
    )


@pytest.mark.parametrize(
    "one",
    [
        {"const": 1},
        {"enum": ["a"]},
        {"type": "integer"},
        {"maxLength": 1},
        {"pattern": "^x"},
        {"not": {"type": "string"}},
        {"anyOf": [{"type": "null"}, {"required": ["x"], "type": "object"}]},
        {"oneOf": [{"type": "string"}, {"minLength": 1}]},
        {"format": "date", "minLength": 99},
        False,
    ],
)
def test_no_value_is_repeated(tmp_path: Path, one: object) -> None:
    """Whatever is wrong with a secret, the refusal does not have it."""
    for wanted, payload in ((one, SECRET), ({"items": one}, [SECRET])):
        misfit = schema(tmp_path, wanted).misfit("t", json.dumps(payload).encode())

        assert misfit is not None
        assert SECRET not in str(misfit)


def test_a_refusal_is_short_and_on_one_line(tmp_path: Path) -> None:
    """However long and odd names and schemas are."""
    deep: dict[str, object] = {"type": "integer"}
    payload: object = "x"
    for number in range(30):
        name = f"\n\x00\u202e{number}/~" + "n" * 500
        deep = {"properties": {name: deep}}
        payload = {name: payload}
    schemas = load(tmp_path, {"deep": deep, "wide": {"enum": list(range(1000))}})

    for kind in ("deep", "wide"):
        misfit = schemas.misfit(kind, json.dumps(payload).encode())
        assert misfit is not None
        assert len(misfit.path) <= MAX_PATH
        assert len(misfit.reason) <= MAX_REASON
        assert str(misfit).isprintable()
    missing = schema(tmp_path, {"required": [f"{number}" for number in range(1000)]})
    assert ("", 'lacks "0", "1", "2" and 997 more') == reason(missing, "{}")


@pytest.mark.parametrize(
    ("one", "payload", "where"),
    [
        ({"additionalProperties": NULL}, {SECRET: 1}, "/*"),
        ({"properties": {"a": {"patternProperties": {"": NULL}}}}, {"a": {SECRET: 1}}, "/a/*"),
        ({"properties": {SECRET: NULL}}, {SECRET: 1}, "/hunter2"),
        ({"required": [SECRET], "additionalProperties": NULL}, {SECRET: 1}, "/hunter2"),
        ({"additionalProperties": False}, {SECRET: 1}, ""),
        ({"unevaluatedProperties": False}, {SECRET: 1}, ""),
        ({"propertyNames": {"maxLength": 1}}, {SECRET: 1}, ""),
        ({"additionalProperties": {"items": NULL}}, {SECRET: [None, 1]}, "/*/1"),
    ],
)
def test_of_names_only_the_schemas_own_are_repeated(
    tmp_path: Path, one: object, payload: object, where: str
) -> None:
    """Maps are keyed by what may be secret, too; what stands in the schema is known anyway."""
    misfit = schema(tmp_path, one).misfit("t", json.dumps(payload).encode())

    assert misfit is not None
    assert where == misfit.path
    assert (SECRET in json.dumps(one)) == (SECRET in str(misfit))


@pytest.mark.parametrize(
    ("items", "fits"),
    [
        ("[1, 1.0]", False),
        ("[true, 1, false, 0, null, 0.5]", True),
        ('["true", true, "null", null, "list", [], "dict", {}, "1", 1]', True),
        ('[{"a": [1], "b": 2}, {"b": 2.0, "a": [1]}]', False),
        ('[{"a": 1}, {"a": true}, ["a", 1]]', True),
        ("[[1, 2], [2, 1], [[1, 2]]]", True),
        ('["a", "a"]', False),
    ],
)
def test_unique_items(tmp_path: Path, items: str, fits: bool) -> None:  # noqa: FBT001
    """Items are equal as JSON Schema has it: 1 is 1.0, but not true; order is for lists only."""
    assert fits == (reason(schema(tmp_path, {"uniqueItems": True}), items) is None)
    assert reason(schema(tmp_path, {"uniqueItems": False}), items) is None


@pytest.mark.parametrize("number", ["1" + "0" * 400, "-" + "9" * 4000, "9" * 5000])
def test_numbers_beyond_all_measure(tmp_path: Path, number: str) -> None:
    """They fit or do not, but break nothing."""
    for one in ({"multipleOf": 0.1}, {"multipleOf": 3}, {"maximum": 1}, {"type": "integer"}):
        reason(schema(tmp_path, one), number)
    assert (number[0] == "-") == (reason(schema(tmp_path, {"maximum": 1}), number) is None)


def test_a_payload_nested_too_deeply(tmp_path: Path) -> None:
    """A schema that refers to itself follows a payload only so far."""
    schemas = schema(tmp_path, {"items": {"$ref": "#"}})

    assert reason(schemas, "[" * 50 + "]" * 50) is None
    assert ("", "is nested too deeply") == reason(schemas, "[" * 900 + "]" * 900)


@pytest.mark.parametrize("number", ["1e400", '"\\ud800"'])
def test_what_json_has_and_we_do_not(tmp_path: Path, number: str) -> None:
    """A number beyond all measure and half a character fit nothing."""
    told = reason(schema(tmp_path, True), number)

    assert ("", "has a number that is too large, or half a character") == told


def test_a_check_that_breaks_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the library raises, the payload is refused and not repeated."""
    schemas = schema(tmp_path, {"type": "string"})

    def broken(_flaws: object) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(payload_schemas, "_telling", broken)

    assert ("", "cannot be checked: the schema is at fault") == reason(schemas, f'"{SECRET}"')


# ---- How long it takes

TWICE: Final[dict[str, object]] = {
    "oneOf": [
        {"properties": {"op": {"enum": [op]}, "arg": {"$ref": "#"}}, "required": ["op"]}
        for op in ("and", "or")
    ]
}
TWICE_DYNAMICALLY: Final[dict[str, object]] = {
    "$dynamicAnchor": "node",
    "anyOf": [{"items": {"$dynamicRef": "#node"}, "maxItems": 0}] * 2 + [{"type": "null"}],
}


@pytest.mark.parametrize("dialect", [None, DRAFT_4, DRAFT_7, payload_schemas.DIALECT])
def test_a_check_that_takes_twice_as_long_with_every_level(
    tmp_path: Path, dialect: str | None
) -> None:
    """A small payload with many levels is refused at once, whichever draft the schema is of."""
    schemas = schema(tmp_path, TWICE if dialect is None else {"$schema": dialect, **TWICE})
    payload: object = {"op": "or"}
    for _ in range(3):
        payload = {"op": "or", "arg": payload}
    assert reason(schemas, json.dumps(payload)) is None
    for _ in range(40):
        payload = {"op": "or", "arg": payload}

    assert ("", "takes too long to check") == reason(schemas, json.dumps(payload))


def test_dynamic_references_are_counted(tmp_path: Path) -> None:
    """They lead back as others do."""
    schemas = schema(tmp_path, TWICE_DYNAMICALLY)

    assert ("", "takes too long to check") == reason(schemas, "[" * 40 + "0" + "]" * 40)


def test_comparing_each_name_with_each_is_counted(tmp_path: Path) -> None:
    """The library does it for these keywords, in one step that could take minutes."""
    schemas = schema(tmp_path, {"unevaluatedProperties": {"type": "integer"}})

    few = json.dumps({f"{number}": 1 for number in range(500)})
    assert reason(schemas, few) is None
    many = json.dumps({f"{number}": 1 for number in range(100_000)})
    assert ("", "takes too long to check") == reason(schemas, many)


def test_processor_time_is_bounded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps that take long are too much as well."""
    schemas = schema(tmp_path, {"items": {"type": "integer"}})
    payload = json.dumps([1] * 100)

    assert reason(schemas, payload) is None
    monkeypatch.setattr(payload_schemas, "SECONDS_PER_STEP", 0.0)
    assert ("", "takes too long to check") == reason(schemas, payload)


DIGITS: Final[dict[str, object]] = {
    "items": {"$ref": "#/$defs/item"},
    "$defs": {"item": {"type": "integer", "minimum": 0, "maximum": 9, "multipleOf": 1}},
}


@pytest.mark.parametrize("size", [5_000, 20_000])
def test_what_is_only_large_is_checked(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many values there are, for each several keywords."""
    monkeypatch.setattr(payload_schemas, "SECONDS_PER_STEP", 1.0)
    schemas = schema(tmp_path, DIGITS)

    assert reason(schemas, "[" + "1," * size + "1]") is None
    assert (f"/{size}", "does not fit minimum: 0") == reason(schemas, "[" + "1," * size + "-1]")


def test_a_budget_is_for_one_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What others have used up is not missing."""
    monkeypatch.setattr(payload_schemas, "SECONDS_PER_STEP", 1.0)
    schemas = schema(tmp_path, DIGITS)
    payload = "[" + "1," * 3000 + "1]"

    assert [None] * 5 == [reason(schemas, payload) for _ in range(5)]


_json: Final = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> PayloadSchemas:
    """A schema with much in it."""
    return schema(tmp_path_factory.mktemp("schemas"), EVERYTHING)


@given(payload=_json)
def test_any_payload(everything: PayloadSchemas, payload: object) -> None:
    """There is a verdict about every payload, and it is printable."""
    misfit = everything.misfit("t", json.dumps(payload).encode())

    assert misfit is None or str(misfit).isprintable()


EVERYTHING: Final[dict[str, object]] = {
    "anyOf": [{"type": "object"}, {"type": "array"}, {"type": "number", "multipleOf": 0.3}],
    "items": {"$ref": "#"},
    "uniqueItems": True,
    "contains": {"type": "string"},
    "additionalProperties": {"$ref": "#"},
    "propertyNames": {"pattern": "^[a-z]*$"},
    "maxProperties": 2,
    "dependentRequired": {"a": ["b"]},
    "unevaluatedItems": False,
}


# ---- What is found when they are loaded


@pytest.mark.parametrize(
    ("schemas", "problem"),
    [
        ("", "is not JSON of the form"),
        ("[]", "is not JSON of the form"),
        ('{"t": ' + "[" * 3000, "is not JSON of the form"),
        ({"t": 1}, '"t" is not a schema'),
        ({"t": {"type": "text"}}, '"t": /type '),
        ({"t": {"properties": {"x": {"minimum": "1"}}}}, '"t": /properties/x/minimum '),
        ({"t": {"pattern": "("}}, '"t": /pattern '),
        ({"t": {"patternProperties": {"(": {}}}}, '"t": /patternProperties '),
        ({"t": {"$schema": "http://x/y"}}, '"t": "http://x/y" is no known draft'),
        ({"t": {"$schema": 5}}, '"t": "5" is no known draft'),
        ({"t": {"$schema": DRAFT_3}}, "is no known draft"),
        ({"t": {"items": {"$schema": DRAFT_7}}}, '"t" is of two drafts'),
        ({"t": {"items": {"$schema": "http://x/y"}}}, '"t": "http://x/y" is no known draft'),
        ({"t": {"pattern": "a{99999999999}"}}, '"t" cannot be used: OverflowError'),
        ({"t": {"$schema": DRAFT_4, "patternProperties": {"(": {}}}}, '"t" cannot be used: error'),
        ({"t": {"$ref": "#/enum/0", "enum": [1]}}, '"t": $ref "#/enum/0" leads to no schema'),
        ({"t": {"items": {"$ref": "#/enum/0"}, "enum": [{"type": "x"}]}}, '"t": /type '),
        ({"t": {"items": {"$ref": "#/enum/0"}, "enum": [{"$ref": "#/x"}]}}, "leads nowhere"),
        ({"t": {"$ref": "#"}}, '"t" refers to itself without end'),
        ({"t": {"$ref": "#/nowhere"}}, '"t": $ref "#/nowhere" leads nowhere'),
        ({"t": {"items": {"$ref": "other.json"}}}, '"t": $ref "other.json" leads nowhere'),
        ({"t": {"$schema": DRAFT_7, "items": {"$ref": "#/definitions/x"}}}, "leads nowhere"),
        ({"t": {"allOf": [{"$dynamicRef": "#x"}]}}, '$dynamicRef "#x" leads nowhere'),
        ({"t": {"$ref": "#/x", "x": {"$ref": "file:///etc/passwd"}}}, "leads nowhere"),
        ({"a": True, "t": {"not": {"items": {"$ref": "http://127.0.0.1:1/"}}}}, "leads nowhere"),
    ],
)
def test_what_cannot_be_used(tmp_path: Path, schemas: object, problem: str) -> None:
    """It is said which schema it is, and what is wrong, before anything is published."""
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, schemas)

    assert "PAYLOAD_SCHEMAS" == caught.value.setting
    assert problem in caught.value.problem
    assert str(caught.value).isprintable()


def test_a_schema_nested_too_deeply(tmp_path: Path) -> None:
    """It is refused like any other that cannot be used."""
    with pytest.raises(SettingsError, match="nested too deeply"):
        load(tmp_path, '{"t": ' + '{"not": ' * 300 + "{}" + "}" * 301)


@pytest.mark.parametrize(
    ("keyword", "last"), [("allOf", {}), ("anyOf", {"not": {}}), ("oneOf", {"not": {}})]
)
def test_definitions_that_use_each_other_twice(tmp_path: Path, keyword: str, last: object) -> None:
    """What takes too long for the smallest payload is refused when it is loaded."""
    each = {f"d{n}": {keyword: [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)}

    with pytest.raises(SettingsError, match='"t" takes too long to check'):
        schema(tmp_path, {"$ref": "#/$defs/d0", "$defs": {**each, "d40": last}})


def test_many_references_to_one_schema(tmp_path: Path) -> None:
    """Each is followed, what it leads to is looked at once, and the draft may be said again."""
    inner = {"$schema": payload_schemas.DIALECT, "type": "integer"}
    refs = {f"p{number}": {"$ref": "#/default"} for number in range(2000)}
    schemas = schema(tmp_path, {"properties": refs, "default": inner})

    assert reason(schemas, '{"p7": 1}') is None
    assert ("/p7", "is not of type integer") == reason(schemas, '{"p7": "x"}')


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Neither what is not there, nor a directory, nor what is too large."""
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(payload_schemas.MAX_FILE_BYTES + 1)
    for path in (tmp_path / "none.json", tmp_path, large, Path("\0")):
        with pytest.raises(SettingsError, match="PAYLOAD_SCHEMAS"):
            payload_schemas.load(path)


def test_nothing_is_fetched(tmp_path: Path) -> None:
    """A reference to somewhere else is refused without asking there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x.json"
        for one in ({"$ref": url}, {"$id": url, "$ref": "y.json"}, {"$schema": url}):
            with pytest.raises(SettingsError):
                schema(tmp_path, one)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize(
    "one",
    [
        {"$schema": DRAFT_4, "properties": {"n": {"type": "integer"}}, "required": ["n"]},
        {
            "$schema": DRAFT_7,
            "definitions": {"n": {"type": "integer"}},
            "properties": {"n": {"$ref": "#/definitions/n"}},
            "required": ["n"],
        },
        {
            "$id": "https://example.com/t",
            "$defs": {"n": {"$anchor": "n", "type": "integer"}},
            "properties": {"n": {"$ref": "https://example.com/t#n"}},
            "required": ["n"],
        },
    ],
)
def test_every_draft(tmp_path: Path, one: object) -> None:
    """A schema means what it says in the draft that it names, references within it included."""
    schemas = schema(tmp_path, one)

    assert reason(schemas, '{"n": 1}') is None
    assert ("/n", "is not of type integer") == reason(schemas, '{"n": "x"}')
    assert reason(schemas, "{}") is not None
