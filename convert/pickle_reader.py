"""Reads the pickle inside a torch file by interpreting it: nothing in it can run.

Python's own unpickler calls whatever a file names. This one knows the instructions that a file of
weights needs, and builds tensors, dictionaries, lists and numbers only; every other name that a
file mentions is an error that says it.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeAlias

from qdit_jax.errors import UserError

REMEDY = (
    "where the file came from, save the bare weights: torch.save(model.state_dict(), 'weights.pt')"
)
MALFORMED = (
    AttributeError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)


# The argument of an opcode, as `pickletools` reads it.
Argument: TypeAlias = int | float | str | bytes | bytearray | None


class Mark:
    """The pickle's mark on the stack."""


MARK = Mark()


@dataclass
class Namespace:
    """A stand-in for `argparse.Namespace`: its settings only."""

    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Name:
    """A global that the file may mention.

    `value` is our function that a call runs, or for a type that is never called, its stand-in.
    """

    name: str
    value: object


def new_dict(items: dict | Iterable[tuple[Any, Any]] = ()) -> dict:
    """Returns what `OrderedDict(items)` holds."""
    return _fill({}, items.items() if isinstance(items, dict) else items)


def read_pickle(
    data: bytes | BinaryIO, names: dict[str, Name], persistent: Callable[[Any], object]
) -> object:
    """Returns the object that `data` describes.

    Args:
        data: the pickle, or a file that is at its beginning; it is left at its end.
        names: the globals that may occur, by `module.name`.
        persistent: returns the storage of a persistent id.

    Raises:
        UserError: if the pickle is damaged, or names anything else.
    """
    machine = _Machine(names, persistent)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except UserError:
        raise
    except MALFORMED as error:
        raise UserError(f"the pickle inside is damaged ({type(error).__name__}).") from None
    raise UserError("the pickle inside is cut short.")


def mentioned_names(data: bytes | BinaryIO) -> list[str]:
    """Returns the globals that a pickle mentions, in order, as far as it can be read."""
    found, strings = [], ["", ""]
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "GLOBAL":
                found.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                found.append(".".join(strings))
            elif isinstance(argument, str):
                strings = [strings[1], argument]
    except MALFORMED:
        pass
    return found


class _Machine:
    """The stack and memo of one reading."""

    def __init__(self, names: dict[str, Name], persistent: Callable[[Any], object]) -> None:
        self.names = names
        self.persistent = persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Argument) -> None:
        if opcode in _IGNORED:
            return
        if opcode in _LITERALS:
            self.stack.append(argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode]())
        elif opcode in _ACTIONS:
            _ACTIONS[opcode](self, argument)
        else:
            raise UserError(f"the pickle inside uses {opcode}, which no file of weights needs.")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is MARK:
            raise ValueError("mark where a value belongs")
        return value

    def to_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise ValueError("no mark")

    def mention(self, name: str) -> None:
        if name not in self.names:
            raise UserError(
                f"the file names {name!r}; convert runs no code from a file and reads only tensors "
                f"({REMEDY})."
            )
        self.stack.append(self.names[name])

    def call(self, _: Argument) -> None:
        arguments, name = self.pop(), self.pop()
        if not isinstance(name, Name) or not callable(name.value) or type(arguments) is not tuple:
            raise UserError("the pickle inside calls something that is not a tensor or table.")
        self.stack.append(name.value(*arguments))

    def set_state(self, _: Argument) -> None:
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, Namespace):
            target.values.update(state)
        elif hasattr(target, "set_state"):
            target.set_state(state)
        elif not isinstance(target, dict):  # an OrderedDict's attributes (`_metadata`) are no data
            raise UserError("the pickle inside sets the state of an unknown object.")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("items of no dictionary")
        _fill(target, zip(items[::2], items[1::2], strict=True))

    def add_elements(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, set):
            raise ValueError("elements of no set")
        target.update(items)

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise ValueError("elements of no list")
        target.extend(items)


def _fill(target: dict, items: Iterable[tuple[Any, Any]]) -> dict:
    """Returns `target` with `items` put in; no pickler writes a key of one table twice."""
    for key, value in items:
        if key in target:
            raise UserError(f"the pickle inside holds {str(key)[:200]!r} twice in one table.")
        target[key] = value
    return target


def _tuple(count: int) -> Callable[[_Machine, Any], None]:
    def act(machine: _Machine, _: Argument) -> None:
        items = [machine.pop() for _ in range(count)]
        machine.stack.append(tuple(items[::-1]))

    return act


def _dict(machine: _Machine, _: Argument) -> None:
    items = machine.to_mark()
    machine.stack.append({})
    machine.set_items(items)


def _put(machine: _Machine, index: Argument) -> None:
    machine.memo[len(machine.memo) if index is None else int(index)] = machine.stack[-1]


def _pair(machine: _Machine) -> list[Any]:
    value = machine.pop()
    return [machine.pop(), value]


def _stack_global(machine: _Machine) -> str:
    module, name = _pair(machine)
    return f"{module}.{name}"


_IGNORED = {"PROTO", "FRAME"}
_LITERALS = {
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"),
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"),
    *(
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
        "BINSTRING",
        "SHORT_BINSTRING",
        "STRING",
    ),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
    "MARK": lambda: MARK,
}
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "TUPLE": lambda m, _: m.stack.append(tuple(m.to_mark())),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "LIST": lambda m, _: m.stack.append(m.to_mark()),
    "DICT": _dict,
    "SETITEM": lambda m, _: m.set_items(_pair(m)),
    "SETITEMS": lambda m, _: m.set_items(m.to_mark()),
    "APPEND": lambda m, _: m.extend([m.pop()]),
    "APPENDS": lambda m, _: m.extend(m.to_mark()),
    "ADDITEMS": lambda m, _: m.add_elements(m.to_mark()),
    "FROZENSET": lambda m, _: m.stack.append(frozenset(m.to_mark())),
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "PUT": _put,
    "MEMOIZE": _put,
    "BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "LONG_BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "GET": lambda m, index: m.stack.append(m.memo[int(index)]),
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.to_mark().clear(),
    "GLOBAL": lambda m, argument: m.mention(argument.replace(" ", ".")),
    "STACK_GLOBAL": lambda m, _: m.mention(_stack_global(m)),
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.set_state,
    "BINPERSID": lambda m, _: m.stack.append(m.persistent(m.pop())),
}
