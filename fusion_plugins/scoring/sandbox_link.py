"""The two ends of the link between a program and its checks, each in a process that the other cannot reach.

The checks ask (call a function, get an attribute, take the next item), the program answers with values. Objects that
are no values stay with the program; the checks hold a :class:`Remote` for each, which has no order of the program's
making, and an equality only with other objects of the program.
"""

import builtins
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any

from fusion_plugins.scoring.sandbox_values import NotAValue, TooLarge, decode, encode, read, update, write

#: what may be asked of an object beside calls and attributes; each gives a value, which the checks compare themselves
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "len": len,
    "item": operator.getitem,
    "iter": iter,
    "str": str,
    "repr": repr,
    "bool": bool,
    "next": next,
    "eq": operator.eq,
}


class ProgramEnded(Exception):
    """The process of the program is gone, or says what no program can say."""


# The program's end


def serve(module: types.ModuleType, requests: Any, replies: Any) -> None:
    """Answer requests about the names of a program until they end; the first reply tells its names."""
    names = [name for name in vars(module) if not name.startswith("__")]
    held: list[Any] = [vars(module)[name] for name in names]
    numbers: dict[int, int] = {}

    def hold(thing: Any) -> int:
        if id(thing) not in numbers:
            numbers[id(thing)] = len(held)
            held.append(thing)
        return numbers[id(thing)]

    reply: list[Any] = ["value", encode(names), None]
    while True:
        try:
            write(replies, reply)
        except TooLarge as error:
            write(replies, ["error", "ValueError", str(error)])
        try:
            number, action, *given = read(requests)
        except EOFError:
            return
        try:
            reply = ["value", *_answer(held[number], action, given, hold, held)]
        except BaseException as error:
            reply = error_reply(error)


def _answer(thing: Any, action: str, given: list[Any], hold: Callable[[Any], int], held: list[Any]) -> list[Any]:
    """Return the value that was asked for, and the arguments where the call has changed them."""
    if action == "get":
        return [encode(getattr(thing, given[0]), hold), None]
    arguments, keywords = decode(given[0], lambda kind, number: held[number])
    if action != "call":
        return [encode(_OPERATIONS[action](thing, *arguments), hold), None]
    result = encode(thing(*arguments, **keywords), hold)
    after = encode([arguments, keywords], hold)
    return [result, after if after != given[0] else None]


def error_reply(error: BaseException) -> list[Any]:
    """Return an exception by the name of its nearest built-in class, with its text."""
    kinds = [kind for kind in type(error).__mro__ if vars(builtins).get(kind.__name__) is kind]
    try:
        values = [encode(argument) for argument in error.args] if kinds[0] is type(error) else [str(error)]
    except Exception:
        values = [f"{type(error).__name__} without a text"]
    return ["error", kinds[0].__name__, *values]


# The end of the checks


class Remote:
    """Stands for an object of the program."""

    __slots__ = ("_link", "_number")

    def __init__(self, link: "Link", number: int) -> None:
        self._link = link
        self._number = number

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Call the object in the program."""
        return self._link.ask(self._number, "call", arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._link.get(self._number, name)

    def __len__(self) -> int:
        return self._link.ask(self._number, "len")  # type: ignore[no-any-return]

    def __getitem__(self, key: Any) -> Any:
        return self._link.ask(self._number, "item", (key,))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._link.ask(self._number, "iter"))

    def __bool__(self) -> bool:
        return self._link.ask(self._number, "bool") is True

    def __str__(self) -> str:
        return self._link.ask(self._number, "str")  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return self._link.ask(self._number, "repr")  # type: ignore[no-any-return]

    def __eq__(self, other: object) -> bool:
        # Of two objects of the program it may say that they are equal; it could as well give the same one twice.
        if self is other or not isinstance(other, Remote):
            return self is other
        return self._link.ask(self._number, "eq", (other,)) is True

    __hash__ = object.__hash__


class RemoteIterator(Remote):
    """Stands for an iterator of the program."""

    __slots__ = ()

    def __iter__(self) -> "RemoteIterator":
        return self

    def __next__(self) -> Any:
        return self._link.ask(self._number, "next")


class Link:
    """Asks the program.

    Args:
        requests: file to write to.
        replies: file to read from.
        may_stop: whether a call may raise StopIteration. Where no check expects it, it would end the loop of the checks
            in which the call is, as if all of them had passed: ``all(map(passes, cases))``.

    Attributes:
        failure: why nothing that the checks find counts any more: the program has ended, or a check has sent what is no
            value; None normally.
    """

    def __init__(self, requests: Any, replies: Any, *, may_stop: bool = False) -> None:
        self._requests = requests
        self._replies = replies
        self._may_stop = may_stop
        self._remotes: dict[int, Remote] = {}
        self.failure: Exception | None = None

    def names(self) -> dict[str, Remote]:
        """Return what the program defines, once it has run; raises what it raises."""
        names, _ = self._reply()
        if type(names) is not list or not all(type(name) is str for name in names):
            raise self._broken(ProgramEnded("the program's process gave no names"))
        return {name: Remote(self, number) for number, name in enumerate(names)}

    def ask(self, number: int, action: str, arguments: tuple[Any, ...] = (), keywords: Any = None) -> Any:
        """Return what an object of the program gives for arguments, which are changed as the program changes them."""
        try:
            given = encode([arguments, keywords or {}], self._number)
        except NotAValue as error:
            raise self._broken(error) from None
        result, changed = self._request([number, action, given])
        if changed is not None:
            update([arguments, keywords or {}], changed)
        return result

    def get(self, number: int, name: str) -> Any:
        """Return an attribute of an object of the program."""
        return self._request([number, "get", name])[0]

    def _number(self, thing: Any) -> int:
        if isinstance(thing, Remote):
            return thing._number
        raise NotAValue(f"an object of the type {type(thing).__name__} is no value")

    def _request(self, message: list[Any]) -> tuple[Any, Any]:
        if self.failure is not None:
            raise self.failure
        try:
            write(self._requests, message)
        except OSError:
            raise self._broken(ProgramEnded("the program has ended")) from None
        try:
            return self._reply()
        except StopIteration as error:
            if message[1] == "next" or self._may_stop:
                raise
            raise RuntimeError("the program raises StopIteration") from error

    def _reply(self) -> tuple[Any, Any]:
        try:
            kind, *parts = read(self._replies)
            values = [decode(part, self._take) for part in parts]
            if kind == "value":
                result, changed = values
                return result, changed
            name, *arguments = values
            raised = _exception(getattr(builtins, name), arguments)
        except EOFError:
            raise self._broken(ProgramEnded("the program has ended")) from None
        except Exception as error:
            raise self._broken(ProgramEnded(f"the program's process answers wrongly: {error!r:.100}")) from None
        raise raised

    def _take(self, kind: str, number: int) -> Any:
        if type(number) is not int:
            raise ValueError("an object has a number")
        # One for each object, because checks may ask whether two are the same.
        made = RemoteIterator if kind == "iterator" else Remote
        return self._remotes.setdefault(number, made(self, number))

    def _broken(self, error: Exception) -> Exception:
        self.failure = self.failure or error
        return error


def _exception(kind: Any, arguments: list[Any]) -> BaseException:
    """Return an exception of a built-in class."""
    allowed = isinstance(kind, type) and (issubclass(kind, Exception) or kind is SystemExit)
    if not allowed:
        return RuntimeError(*arguments)
    try:
        made = kind(*arguments)
    except Exception:  # some classes want arguments of certain types
        return RuntimeError(*arguments)
    return made if isinstance(made, BaseException) else RuntimeError(*arguments)
