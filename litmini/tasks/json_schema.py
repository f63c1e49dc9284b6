"""Checks values against a JSON schema: the keywords that describe data, and no references.

https://json-schema.org/draft/2020-12/json-schema-validation. A keyword that is not implemented is an error, never ignored.
"""

import re
from typing import Any

from litmini.errors import UserError

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
NOTES = {"$schema", "$id", "title", "description", "default", "examples", "$comment"}
"""Keywords that say nothing about values."""
KEYWORDS = NOTES | {
    *("type", "enum", "const", "properties", "required", "additionalProperties", "items", "minItems", "maxItems"),
    *("minLength", "maxLength", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "anyOf"),
}


def check_schema(schema: Any, where: str) -> None:
    """Raise a `UserError` that names the first keyword of a schema that is not implemented, or has an impossible value."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise UserError(f"{where} is {schema!r:.80}, expected a JSON schema: an object such as {{type: object}}.")
    if unknown := sorted(schema.keys() - KEYWORDS):
        raise UserError(f"{where}: {', '.join(unknown)} is not implemented; there are {', '.join(sorted(KEYWORDS))}.")
    types = schema.get("type", [])
    if wrong := [t for t in (types if isinstance(types, list) else [types]) if t not in TYPES]:
        raise UserError(f"{where}: type {wrong[0]!r:.80}, expected one of {', '.join(TYPES)}.")
    try:
        re.compile(schema.get("pattern", ""))
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{where}: pattern {schema['pattern']!r:.80} is no regular expression: {error}.") from None
    for name, part in schema.get("properties", {}).items():
        check_schema(part, f"{where}: {name}")
    for name in ("items", "additionalProperties"):
        check_schema(schema.get(name, True), f"{where}: {name}")
    for part in schema.get("anyOf", []):
        check_schema(part, f"{where}: anyOf")


def is_valid(value: Any, schema: Any) -> bool:
    """Return whether a value, as `json.loads` gives it, is what a checked schema describes."""
    if isinstance(schema, bool):
        return schema
    types = schema.get("type")
    if types is not None and not any(_is(value, t) for t in (types if isinstance(types, list) else [types])):
        return False
    if "enum" in schema and not any(_equal(value, one) for one in schema["enum"]):
        return False
    if "const" in schema and not _equal(value, schema["const"]):
        return False
    if "anyOf" in schema and not any(is_valid(value, part) for part in schema["anyOf"]):
        return False
    if isinstance(value, str):
        fits = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
        return fits and re.search(schema.get("pattern", ""), value) is not None
    if isinstance(value, list):
        fits = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return fits and all(is_valid(one, schema.get("items", True)) for one in value)
    if isinstance(value, dict):
        return _is_valid_object(value, schema)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (
            schema.get("minimum", value) <= value <= schema.get("maximum", value)
            and ("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
            and ("exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"])
        )
    return True


def _is_valid_object(value: dict[str, Any], schema: dict[str, Any]) -> bool:
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    return all(name in value for name in schema.get("required", [])) and all(
        is_valid(one, properties.get(name, others)) for name, one in value.items()
    )


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    whole = name == "integer" and isinstance(value, float) and value.is_integer()  # 1.0 is one
    return whole or isinstance(value, TYPES[name])


def _equal(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)
