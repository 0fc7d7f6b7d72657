"""Values on their way between the process of a program and the process of its checks: data, nothing executable.

What arrives is built anew from JSON as exact types of Python, so that no object of a program, which could call itself
equal to everything, reaches a check. A value is a JSON scalar or a list of a tag and its parts. What is no value stays
where it is, and a number for it goes over: ``hold`` turns an object into that number, ``take`` the number into what
stands for it.

>>> decode(json.loads(json.dumps(encode([{1: (2.5, None)}, {3}, b"x"]))))
[{1: (2.5, None)}, {3}, b'x']
"""

import datetime
import json
import struct
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

#: bytes of one message
MAX_BYTES = 16 << 20
MAX_DEPTH = 100
#: kinds of numpy's arrays that go over: they come back as they are sent, arrays of objects would not
_NUMBERS = "biuf"
_SCALARS: tuple[Any, ...] = (str, int, float)
_SEQUENCES: dict[Any, str] = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset", deque: "deque"}
_MAPPINGS: dict[Any, str] = {OrderedDict: "OrderedDict", Counter: "Counter", defaultdict: "defaultdict", dict: "dict"}
_VIEWS: dict[Any, str] = {type({}.keys()): "keys", type({}.values()): "values", type({}.items()): "items"}
_DATES = {kind.__name__: kind for kind in (datetime.datetime, datetime.date, datetime.time, datetime.timedelta)}
_KNOWN = (*_MAPPINGS, *_SEQUENCES, bytes, bytearray, *_SCALARS)


class NotAValue(TypeError):
    """An object that cannot leave its process."""


class TooLarge(ValueError):
    """A value that is nested too deeply or takes too many bytes."""


def encode(value: Any, hold: Callable[[Any], int] | None = None, depth: int = 0) -> Any:
    """Return a value as JSON can write it.

    Args:
        value: any object.
        hold: keeps an object that is no value and returns a number for it; without it, such an object is an error.
        depth: of the containers around it.

    Raises:
        NotAValue: it is or holds an object that is no value.
        TooLarge: it is nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise TooLarge(f"a value is nested more than {MAX_DEPTH} deep")
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind not in _KNOWN:
        # An IntEnum is a number, a subclass of list a list.
        kind = next((known for known in _KNOWN if issubclass(kind, known)), kind)
    if kind in _SCALARS:
        return _scalar(kind, value)
    if (plain := _plain_parts(kind, value)) is not None:
        return plain
    if (parts := _parts(kind, value)) is not None:
        coded = [encode(part, hold, depth + 1) for part in parts[1]]
        fields = _fields(type(value)) if kind is tuple else None
        return [parts[0], *coded] if fields is None else ["namedtuple", type(value).__name__, fields, *coded]
    if kind.__module__ == "numpy" and hasattr(value, "tolist") and value.dtype.kind in _NUMBERS:
        plain = encode(value.tolist(), hold, depth + 1)
        return ["ndarray", value.dtype.str, plain] if kind.__name__ == "ndarray" else plain
    if hold is None:
        raise NotAValue(f"an object of the type {kind.__name__} is no value")
    return ["iterator" if hasattr(kind, "__next__") else "object", hold(value)]


def _scalar(kind: Any, value: Any) -> Any:
    if kind is int:
        plain = int.__index__(value)
        return plain if -(1 << 63) < plain < 1 << 63 else ["int", hex(plain)]
    return str.__str__(value) if kind is str else float.__float__(value)


def _plain_parts(kind: Any, value: Any) -> list[Any] | None:
    """Return tag and parts of what holds no values; None for anything else."""
    if kind is bytes or kind is bytearray:
        return [kind.__name__, bytes(value).decode("latin-1")]
    if kind is complex:
        return ["complex", value.real, value.imag]
    if kind is Decimal:
        return ["Decimal", str(value)]
    if kind in _DATES.values() and getattr(value, "tzinfo", None) is None:
        return [kind.__name__, *_date_parts(value)]
    return None


def _parts(kind: Any, value: Any) -> tuple[str, Iterable[Any]] | None:
    """Return tag and values of what holds values; None for anything else."""
    if kind in _SEQUENCES:
        return _SEQUENCES[kind], kind.__iter__(value)
    if kind in _MAPPINGS:
        return _MAPPINGS[kind], (part for item in dict.items(value) for part in item)
    if kind in _VIEWS:
        return _VIEWS[kind], value
    if kind is range:
        return "range", (value.start, value.stop, value.step)
    if kind is Fraction:
        return "Fraction", (value.numerator, value.denominator)
    return None


def _fields(kind: type) -> list[str] | None:
    """Return the fields of a class of named tuples; None for another class, or where a field has no plain name."""
    fields = getattr(kind, "_fields", None)
    if not isinstance(fields, tuple) or not fields or not kind.__name__.isidentifier():
        return None
    return list(fields) if all(type(name) is str and not name.startswith("_") for name in fields) else None


@lru_cache(64)
def _named_tuple(name: str, fields: tuple[str, ...]) -> Any:
    """Return a class with the names of the program's, which are checked, and without its methods."""
    return namedtuple(name, fields)  # type: ignore[misc]


def _date_parts(value: Any) -> list[int]:
    if isinstance(value, datetime.timedelta):
        return [value.days, value.seconds, value.microseconds]
    names = ("year", "month", "day", "hour", "minute", "second", "microsecond")
    return [getattr(value, name) for name in names if hasattr(value, name)]


def decode(coded: Any, take: Callable[[str, int], Any] | None = None) -> Any:
    """Return the value that :func:`encode` has written; ``take`` gives what stands for an object, by kind and number.

    Raises:
        ValueError: nothing that :func:`encode` writes; TypeError and KeyError are possible as well.
    """
    if not isinstance(coded, list):
        if isinstance(coded, dict):
            raise ValueError("expected a value, got a JSON object")
        return coded
    tag, *parts = coded
    if tag in _BUILT:
        return _BUILT[tag](*parts)
    if tag in ("object", "iterator") and take is not None:
        return take(tag, parts[0])
    if tag == "ndarray":
        import numpy

        kind = numpy.dtype(parts[0])
        if kind.kind not in _NUMBERS:
            raise ValueError("expected an array of numbers")
        return numpy.array(decode(parts[1], take), kind)
    if tag == "namedtuple":
        name, fields, *rest = parts
        return _named_tuple(name, tuple(fields))(*(decode(part, take) for part in rest))
    values = [decode(part, take) for part in parts]
    if tag in _FROM_PARTS:
        return _FROM_PARTS[tag](*values)
    if tag in _CONTAINERS:
        return _CONTAINERS[tag](values)
    mapping = dict(zip(values[::2], values[1::2], strict=True))
    return defaultdict(None, mapping) if tag == "defaultdict" else _FROM_MAPPING[tag](mapping)


#: tag -> function of parts that hold no values
_BUILT: dict[str, Callable[..., Any]] = {
    "int": lambda text: int(text, 16),
    "bytes": lambda text: text.encode("latin-1"),
    "bytearray": lambda text: bytearray(text.encode("latin-1")),
    "complex": complex,
    "Decimal": Decimal,
    **_DATES,
}
_FROM_PARTS: dict[str, Callable[..., Any]] = {"range": range, "Fraction": Fraction}
_CONTAINERS: dict[str, Callable[..., Any]] = {
    **{name: kind for kind, name in _SEQUENCES.items()},
    "keys": lambda values: dict.fromkeys(values).keys(),
    "items": lambda values: dict(values).items(),
    "values": lambda values: dict(enumerate(values)).values(),
}
_FROM_MAPPING: dict[str, Callable[..., Any]] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}


def update(old: Any, new: Any) -> Any:
    """Make a container equal to another one and return it, so that all who hold it see what a call has changed.

    >>> row = [2, 1]; table = {"row": row}
    >>> update(table, {"row": [1, 2]}) is table, row
    (True, [1, 2])
    """
    if type(old) is not type(new):
        return new
    if isinstance(old, list | deque):
        parts = [update(*pair) for pair in zip(old, new, strict=False)] + list(new)[len(old) :]
        old.clear()
        old.extend(parts)
    elif isinstance(old, dict):
        items = {key: update(old[key], value) if key in old else value for key, value in new.items()}
        old.clear()
        old.update(items)
    elif isinstance(old, set):
        old.clear()
        old |= new
    elif isinstance(old, bytearray):
        old[:] = new
    elif isinstance(old, tuple):
        return tuple(update(*pair) for pair in zip(old, new, strict=False)) if len(old) == len(new) else new
    elif type(old).__module__ == "numpy" and getattr(old, "shape", None) == new.shape and old.shape:
        old[...] = new
    else:
        return new
    return old


def write(file: Any, message: Any) -> None:
    """Write a message to a file.

    Raises:
        TooLarge: it has more than :data:`MAX_BYTES`.
    """
    data = json.dumps(message).encode()
    if len(data) > MAX_BYTES:
        raise TooLarge(f"a value takes more than {MAX_BYTES >> 20} MiB")
    file.write(struct.pack("<I", len(data)) + data)
    file.flush()


def read(file: Any) -> Any:
    """Return the next message of a file.

    Raises:
        EOFError: there is none.
        ValueError: it is no message.
    """
    head = file.read(4)
    size = struct.unpack("<I", head)[0] if len(head) == 4 else 0
    if size > MAX_BYTES:
        raise ValueError("a message is too long")
    data = file.read(size)
    if len(head) < 4 or len(data) < size:
        raise EOFError("the other process has ended")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("a message is nested too deeply") from None
