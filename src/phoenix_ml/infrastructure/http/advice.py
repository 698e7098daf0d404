"""What msgspec does not say of JSON that it refuses: which key it was, and what would have been right."""

import re
from difflib import get_close_matches
from typing import Any

import msgspec
from msgspec import inspect

from phoenix_ml.domain.routing import Strategy

_STEP = re.compile(r"\.(\w+)|\[(\d+|\.\.\.)\]")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)

_LONGEST_NAME = 100


def explain(message: str, path: str, kind: Any, body: bytes) -> tuple[str, str]:
    """The path with the keys of objects in it, and what to write instead, as far as the type says it.

    >>> kind = dict[str, Strategy]
    >>> explain("Invalid enum value 'x'", "$[...]", kind, b'{"a": "single", "b": "x"}')
    ("$['b']", '; it is one of single, ab_test, canary, shadow')
    """
    nodes = _members(inspect.type_info(kind))
    value: Any = _decoded(body) if "..." in path else None
    told = "$"
    for step in _STEP.finditer(path):
        name, index = step.groups()
        nodes = [inner for node in nodes for inner in _inner(node, name)]
        key: Any = name
        if index == "..." and isinstance(value, dict):
            key = next((key for key, inner in value.items() if not _fits(inner, nodes)), None)
        elif index is not None and index.isdecimal():
            key = int(index)
        told += step[0] if index != "..." or key is None else f"[{key!r}]"
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            value = None
    return told, _advice(message, nodes)


def _decoded(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # after what was refused
        return None


def _advice(message: str, nodes: list[inspect.Type]) -> str:
    if message.startswith("Invalid enum value"):
        known = [
            member.value
            for node in nodes
            if isinstance(node, inspect.EnumType)
            for member in node.cls
            if member is not Strategy.PINNED  # of requests that name a version; it cannot be set
        ]
        return f"; it is one of {', '.join(known)}"
    unknown = _UNKNOWN.fullmatch(message)
    if unknown is None:
        return ""
    fields = [
        field.encode_name for node in nodes if isinstance(node, inspect.StructType) for field in node.fields
    ]
    # Comparing takes as long as the product of the lengths.
    if near := get_close_matches(unknown[1][:_LONGEST_NAME], fields, 1):
        return f"; is {near[0]} meant?"
    return f"; there are {', '.join(dict.fromkeys(fields))}"


def _members(node: inspect.Type) -> list[inspect.Type]:
    """The type; of a union all that it may be."""
    if isinstance(node, inspect.Metadata):
        return _members(node.type)
    return (
        [inner for one in node.types for inner in _members(one)]
        if isinstance(node, inspect.UnionType)
        else [node]
    )


def _inner(node: inspect.Type, name: str | None) -> list[inspect.Type]:
    """What the field of that name may be, or without one an element."""
    if isinstance(node, inspect.StructType):
        return [inner for field in node.fields if field.encode_name == name for inner in _members(field.type)]
    if name is not None:
        return []
    if isinstance(node, inspect.DictType):
        return _members(node.value_type)
    if isinstance(node, inspect.ListType | inspect.VarTupleType):
        return _members(node.item_type)
    return []


def _fits(value: Any, nodes: list[inspect.Type]) -> bool:
    """Whether the value is one of a struct's or an enumeration's; of other types nothing is known here."""
    kinds = [node.cls for node in nodes if isinstance(node, inspect.StructType | inspect.EnumType)]
    for kind in kinds:
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError:
            continue
        return True
    return not kinds
