"""What payloads must look like, by type of notification: JSON Schemas that an operator has written.

PAYLOAD_SCHEMAS is a JSON file, ``{"order.shipped": {"type": "object", ...}, ...}``. A schema may
say by ``$schema`` which draft it is of, from 4 on; without, it is of 2020-12. All are compiled when
the file is loaded, and whatever is wrong with them is found then. Should a check break all the
same, the payload is refused: nothing is published unchecked, and publishing raises nothing new.

Nothing is ever fetched: a ``$ref`` leads to somewhere in its own schema. As the specification has
it, ``format`` only describes and is not checked.

A refusal says where the payload does not fit and what the schema wants there. It repeats no values
of the payload, and of its names only those that the schema has, too: it may end in a log.

A schema that refers to itself twice may take twice as long with every level of a payload. So checks
have a budget: `MAX_STEPS` and, per byte of the payload, `STEPS_PER_BYTE`; and of processor time
`SECONDS_PER_STEP` for each. What is not done then is refused. Within a step nothing interrupts: a
regular expression that backtracks without end is for the author of the schema to avoid.
"""

import contextlib
import itertools
import re
import threading
import time
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import attrs
import msgspec

from trioserver.errors import SettingsError
from trioserver.setting_kinds import quoted

# Not imported above: jsonschema costs a tenth of a second, and only who has schemas needs it.

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
"""Of schemas that do not say."""
MAX_FILE_BYTES: Final = 4 << 20
MAX_STEPS: Final = 20_000
"""Of one check: keywords that are held against a value. Most take 1 to 4 microseconds."""
STEPS_PER_BYTE: Final = 4
"""And so many more for each byte of the payload, for large ones that are not intricate."""
SECONDS_PER_STEP: Final = 20e-6
"""On average, for a step may be a long one: of processor time, whatever else the machine does."""
MAX_PATH: Final = 200
"""Characters of the path that a refusal shows."""
MAX_REASON: Final = 200
"""Characters of the reason."""
_MAX_WORD: Final = 64
_FEW: Final = 3
_ERRORS_COMPARED: Final = 20
"""Of these the one that says most is told: with ``anyOf`` the first may say little."""
_LOOKS_AT_CLOCK: Final = 16
"""Steps between two; each costs a system call."""
_PROBES: Final = (b"null", b"{}", b"[]")
"""Payloads that every schema is tried with."""
_ALL_PAIRS: Final = frozenset({"unevaluatedItems", "unevaluatedProperties"})
"""Keywords for which the library compares each item or name with each."""
_PAIRS_PER_STEP: Final = 64

Schema: TypeAlias = bool | dict[str, Any]
Validator: TypeAlias = Any  # jsonschema's; see above
Flaw: TypeAlias = Any
Dialect: TypeAlias = Any
Resolver: TypeAlias = Any
Check: TypeAlias = Callable[[Validator, Any, Any, Any], Iterable[Flaw] | None]


@attrs.frozen(kw_only=True)
class Misfit:
    """Where a payload does not fit its schema."""

    type: str
    """Of the notification."""
    path: str
    """JSON Pointer (RFC 6901) into the payload; empty is the whole. At most `MAX_PATH`."""
    reason: str
    """What the schema wants there, as the rest of a sentence. At most `MAX_REASON`."""

    def __str__(self) -> str:
        where = f"{self.path} " if self.path else ""
        return f"the payload does not fit the schema of {quoted(self.type)}: {where}{self.reason}"


@attrs.frozen(kw_only=True)
class _Compiled:
    """A schema that payloads can be held against."""

    validator: Validator
    words: frozenset[str]
    """All that stands in it: what of a payload is in here can be told."""


class PayloadSchemas:
    """Schemas by type of notification. Types that are not in it may carry anything."""

    def __init__(self, compiled: Mapping[str, _Compiled]) -> None:
        self._compiled = compiled

    def misfit(self, kind: str, payload: bytes) -> Misfit | None:
        """Return why a payload does not fit; None if it does, or if its type has no schema.

        Args:
            kind: Type of the notification.
            payload: JSON.
        """
        compiled = self._compiled.get(kind)
        if compiled is None:
            return None
        try:
            decoded = msgspec.json.decode(payload)
            _budget.open(len(payload))
            flaws = compiled.validator.iter_errors(decoded)
            flaw = _telling(list(itertools.islice(flaws, _ERRORS_COMPARED)))
            if flaw is None:
                return None
            path = _pointer(flaw.absolute_path, compiled.words)
            return Misfit(type=kind, path=path, reason=_reason(flaw))
        except RecursionError:
            reason = "is nested too deeply"
        except _TooLongError:
            reason = "takes too long to check"
        except msgspec.DecodeError:
            reason = "has a number that is too large, or half a character"
        except (ArithmeticError, ValueError):
            reason = "has a number that is too large"
        except Exception:  # noqa: BLE001 - what it says may have the payload in it
            reason = "cannot be checked: the schema is at fault"
        return Misfit(type=kind, path="", reason=reason)


class _TooLongError(Exception):
    """The budget of a check is spent."""


class _Budget(threading.local):
    """What is left of the check that is under way in this thread."""

    steps = 0
    until = 0.0

    def open(self, size: int) -> None:
        """Begin with a check of a payload of ``size`` bytes."""
        self.steps = MAX_STEPS + STEPS_PER_BYTE * size
        self.until = time.thread_time() + SECONDS_PER_STEP * self.steps

    def spend(self, steps: int = 1) -> None:
        """Note steps.

        Raises:
            _TooLongError: There are no more.
        """
        self.steps -= steps
        if self.steps < 0 or (
            self.steps % _LOOKS_AT_CLOCK == 0 and time.thread_time() > self.until
        ):
            raise _TooLongError


_budget: Final = _Budget()


def load(path: Path) -> PayloadSchemas:
    """Read and compile the schemas.

    Raises:
        SettingsError: The file, or one of the schemas in it, cannot be used; names PAYLOAD_SCHEMAS.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise _unusable(f"{quoted(str(path))} cannot be read: {why}") from None
    if len(text) > MAX_FILE_BYTES:
        raise _unusable(f"{quoted(str(path))} has more than {MAX_FILE_BYTES} bytes")
    try:
        schemas = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        problem = f'{quoted(str(path))} is not JSON of the form {{"type": schema}}: {error}'
        raise _unusable(problem) from None
    return PayloadSchemas({kind: _compiled(kind, schema) for kind, schema in schemas.items()})


def _compiled(kind: str, schema: object) -> _Compiled:
    """Return what checks payloads of one type."""
    from jsonschema import SchemaError  # noqa: PLC0415

    if not isinstance(schema, bool | dict):
        raise _unusable(f"{quoted(kind)} is not a schema, which is an object")
    try:
        return _Built(kind, schema).compiled()
    except SettingsError:
        raise
    except SchemaError as error:
        problem = f": {_pointer(error.absolute_path)} {_brief(error.message)}"
    except RecursionError:
        problem = " is nested too deeply"
    except Exception as error:  # noqa: BLE001 - patterns, numbers, whatever the library stumbles over
        problem = f" cannot be used: {type(error).__name__}: {_brief(str(error))}"
    raise _unusable(f"{quoted(kind)}{problem}")


class _Built:
    """A schema on its way to being compiled. May raise whatever the library does."""

    def __init__(self, kind: str, schema: Schema) -> None:
        from jsonschema import Draft202012Validator  # noqa: PLC0415
        from jsonschema.validators import validator_for  # noqa: PLC0415

        self._kind = kind
        self._schema = schema
        self._specification = self._dialect(schema)
        self._class = validator_for(schema, default=Draft202012Validator)
        self._known: set[int] = set()
        """The ids of all that was found to be a schema."""

    def compiled(self) -> _Compiled:
        """Check it, and return it as it is used."""
        from jsonschema.validators import extend  # noqa: PLC0415
        from referencing.jsonschema import EMPTY_REGISTRY  # noqa: PLC0415

        # The format checker that this uses finds regular expressions that are none.
        self._class.check_schema(cast("dict[str, Any]", self._schema))
        self._check_references()
        keywords = {**self._class.VALIDATORS, "uniqueItems": _unique_items}
        counted = {name: _counted(name, check) for name, check in keywords.items()}
        # Without a registry it would fetch what a reference names.
        made = cast("Callable[..., Validator]", extend)(self._class, counted)
        validator = made(self._schema, registry=EMPTY_REGISTRY)
        self._probe(validator)
        return _Compiled(validator=validator, words=frozenset(_words(self._schema)))

    def _probe(self, validator: Validator) -> None:
        try:
            for text in _PROBES:
                _budget.open(len(text))
                validator.is_valid(msgspec.json.decode(text))
        except RecursionError:
            raise self._unusable(" refers to itself without end") from None
        except _TooLongError:
            raise self._unusable(" takes too long to check") from None

    def _dialect(self, schema: Schema) -> Dialect:
        from referencing.jsonschema import UnknownDialect, specification_with  # noqa: PLC0415

        name = str(schema.get("$schema", DIALECT) if isinstance(schema, dict) else DIALECT)
        with contextlib.suppress(UnknownDialect):
            specification = specification_with(name)
            if specification.name != "draft-03":
                return specification
        raise self._unusable(f": {quoted(name)} is no known draft; they begin with 4")

    def _check_references(self) -> None:
        """Follow every reference, so that none is found later to lead nowhere, or to no schema."""
        from referencing.exceptions import Unresolvable  # noqa: PLC0415
        from referencing.jsonschema import EMPTY_REGISTRY  # noqa: PLC0415

        root = self._specification.create_resource(self._schema)
        references = list(self._walk(self._schema, EMPTY_REGISTRY.resolver_with_root(root)))
        while references:
            keyword, reference, resolver = references.pop()
            try:
                found = resolver.lookup(reference)
            except Unresolvable:
                problem = f": {keyword} {quoted(reference)} leads nowhere; nothing is fetched"
                raise self._unusable(problem) from None
            contents = found.contents
            if not isinstance(contents, bool | dict):
                raise self._unusable(f": {keyword} {quoted(reference)} leads to no schema")
            if id(contents) not in self._known:
                # Somewhere where nobody expects a schema, so it was not seen as one above.
                self._class.check_schema(cast("dict[str, Any]", contents))
                references += self._walk(contents, found.resolver)

    def _walk(self, schema: Schema, resolver: Resolver) -> Iterator[tuple[str, str, Resolver]]:
        """Yield the references in a schema and in those inside it, and adapt these."""
        todo = [(schema, resolver)]
        while todo:
            contents, within = todo.pop()
            if id(contents) in self._known:
                continue
            self._known.add(id(contents))
            if isinstance(contents, dict):
                self._adapt(contents)
                for keyword in ("$ref", "$dynamicRef", "$recursiveRef"):
                    reference = contents.get(keyword)
                    if isinstance(reference, str):
                        yield keyword, reference, within
            inside = self._specification.create_resource(contents).subresources()
            todo += [(inner.contents, within.in_subresource(inner)) for inner in inside]

    def _adapt(self, schema: dict[str, Any]) -> None:
        """Prepare one schema for the library."""
        if schema.get("$schema") is not None:
            if self._dialect(schema) != self._specification:
                raise self._unusable(" is of two drafts")
            # The library would use its own keywords from there on, which are not counted.
            del schema["$schema"]
        # Drafts differ in which of them they declare to be regular expressions.
        for pattern in schema.get("patternProperties", ()):
            re.compile(pattern)

    def _unusable(self, problem: str) -> SettingsError:
        return _unusable(f"{quoted(self._kind)}{problem}")


def _counted(name: str, check: Check) -> Check:
    """Return a keyword's check as steps of the budget."""

    def counted(
        validator: Validator, wanted: object, value: object, schema: object
    ) -> Iterable[Flaw] | None:
        size = len(value) if name in _ALL_PAIRS and isinstance(value, list | dict) else 0
        _budget.spend(1 + size * size // _PAIRS_PER_STEP)
        return check(validator, wanted, value, schema)

    return counted


def _words(schema: object) -> Iterator[str]:
    """Yield all names and texts in a schema."""
    todo = [schema]
    while todo:
        match todo.pop():
            case str(text):
                yield text
            case list(items):
                todo += items
            case dict(members):
                todo += [*members, *members.values()]


def _unique_items(
    _validator: Validator, wanted: object, items: object, _: object
) -> Iterator[Flaw]:
    """Yield a flaw if two items are equal; the library compares each with each."""
    from jsonschema import ValidationError  # noqa: PLC0415

    if wanted and isinstance(items, list) and len(set(map(_as_key, items))) < len(items):
        yield ValidationError("items are equal")


def _as_key(value: object) -> Hashable:
    """Return something that is equal if two values are, as JSON Schema has it."""
    match value:
        case bool():
            return "true" if value else "false", None  # not 1 or 0
        case list():
            return "list", *map(_as_key, value)
        case dict():
            return "dict", frozenset((name, _as_key(inner)) for name, inner in value.items())
        case str():
            return value
        case _:
            return "number", value


def _unusable(problem: str) -> SettingsError:
    return SettingsError("PAYLOAD_SCHEMAS", problem)


# ---- What a refusal says


def _telling(flaws: Sequence[Flaw]) -> Flaw | None:
    from jsonschema.exceptions import best_match  # noqa: PLC0415

    return best_match(flaws)


def _reason(flaw: Flaw) -> str:
    """Return what is wrong, in words of the schema; values of the payload are not repeated."""
    wanted, instance = flaw.validator_value, flaw.instance
    match flaw.validator:
        case "required" if isinstance(wanted, list):
            missing = [name for name in wanted if name not in instance]
            text = f"lacks {_listed(missing)}"
        case "additionalProperties" | "unevaluatedProperties":
            text = "has properties that are not foreseen"
        case "type":
            names = [wanted] if isinstance(wanted, str) else wanted
            text = f"is not of type {' or '.join(map(str, names))}"
        case None:
            text = "is not allowed at all"
        case keyword:
            text = f"does not fit {keyword}: {_shown(wanted)}"
    return _brief(text)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return ", ".join(quoted(str(name)[:_MAX_WORD]) for name in names[:_FEW]) + more


def _shown(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}..."


def _pointer(path: Iterable[str | int], words: Container[str] | None = None) -> str:
    """Return a JSON Pointer, on one line and not too long.

    Args:
        path: Names and indices.
        words: Names that may be told; the others become ``*``. None is all.
    """
    return _brief("".join(_steps(path, words)), MAX_PATH)


def _steps(path: Iterable[str | int], words: Container[str] | None) -> Iterator[str]:
    for step in itertools.islice(path, MAX_PATH):
        if isinstance(step, str) and words is not None and step not in words:
            yield "/*"
            continue
        word = str(step)[:_MAX_WORD].replace("~", "~0").replace("/", "~1")
        yield "/" + "".join(char if char.isprintable() else "\ufffd" for char in word)


def _brief(text: str, most: int = MAX_REASON) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."
