"""What runs inside the sandbox, from its own text alone: ``python -I -c TEXT ROLE SHADOWED CONFINE SOURCE IN
OUT [VERDICT]``.

CONFINE is the text of `rsim.rewards.guest.confine`, or empty where the machine lacks what it needs; SOURCE,
IN, OUT and VERDICT are file descriptors; SHADOWED names, separated by commas, are the candidate's even where
Python has a built-in of that name.

Two processes, each in a sandbox of its own, talk by lines. *candidate* runs the model's program and then
serves calls into it; *script* runs it once for each input. *tests* runs the test program, in which the names
that it does not define itself are the candidate's, or stand-ins for them; it alone holds the verdict's pipe.
So a candidate can return wrong values, hang or die, but it can neither touch the tests nor speak for them:
leaving with status 0, patching ``assert`` or overriding ``==`` gain nothing.

Values cross as plain data of the same type; what a call changes in a list, dict or set that it was given
changes on the caller's side too. Other objects stay where they are and cross as handles. What a test compares
with plain data is never asked of a handle: it would say yes.
"""

from __future__ import annotations

import builtins
import collections
import datetime
import decimal
import fractions
import io
import json
import operator
import os
import sys
import types
from typing import Any

_CONTAINERS: dict[str, Any] = {
    "list": list,
    "set": set,
    "deque": collections.deque,
    "Counter": collections.Counter,
    "OrderedDict": collections.OrderedDict,
    "dict": dict,
    "bytearray": bytearray,
}  # what a call may change; a subclass comes before its base
_FROZEN: dict[str, Any] = {"tuple": tuple, "frozenset": frozenset}
_WRITTEN: dict[str, tuple[Any, Any]] = {
    "Decimal": (decimal.Decimal, decimal.Decimal),
    "Fraction": (fractions.Fraction, fractions.Fraction),
    "datetime": (datetime.datetime, datetime.datetime.fromisoformat),
    "date": (datetime.date, datetime.date.fromisoformat),
    "time": (datetime.time, datetime.time.fromisoformat),
}  # what crosses as the text of itself
# The types that cross by name. A function of Python's that crossed into the tests would be called there: no
# eval for them.
_TYPES = (bool, int, float, complex, str, bytes, *_CONTAINERS.values(), *_FROZEN.values())
_NAMED = {kind.__name__: kind for kind in (*_TYPES, *(pair[0] for pair in _WRITTEN.values()))}
_READ: dict[str, Any] = {
    "int": lambda content: int(content, 0),
    "float": float.fromhex,
    "complex": lambda content: complex(float.fromhex(content[0]), float.fromhex(content[1])),
    "bytes": bytes.fromhex,
    "timedelta": lambda content: datetime.timedelta(*content),
    "type": lambda content: _NAMED[content],
}
# Functions that the tests may hand over, and the other side must not call all the same.
_NEVER = (eval, exec, compile, open, getattr, setattr, delattr, vars, globals, locals, __import__, breakpoint)
_COMPARE = ("eq", "lt", "le", "gt", "ge")
_COMBINE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "matmul", "and", "or", "xor")


def _call(what: Any, *args: Any, **kwargs: Any) -> Any:
    return what(*args, **kwargs)


def _instance(kind: Any, value: Any) -> bool:
    return isinstance(value, kind)


def _enter(context: Any) -> Any:
    return type(context).__enter__(context)


def _exit(context: Any) -> Any:
    return type(context).__exit__(context, None, None, None)


_DO: dict[str, Any] = {name: vars(operator)[f"__{name}__"] for name in (*_COMPARE, *_COMBINE)}
_DO |= {name: vars(operator)[f"__{name}__"] for name in ("getitem", "setitem", "delitem")}
_DO |= {"iter": iter, "next": next, "len": len, "bool": bool, "str": str, "repr": repr, "hash": hash}
_DO |= {"instance": _instance, "call": _call}
_DO |= {"enter": _enter, "exit": _exit}


class Far:
    """A stand-in for an object on the other side."""

    def __init__(self, link: Link, number: int) -> None:
        object.__setattr__(self, "_far", (link, number))

    def __getattr__(self, name: str) -> Any:
        return _ask(self, "get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "set", name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _ask(self, "call", *args, **kwargs)

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, Far) and _ask(self, "instance", value) is True

    def __enter__(self) -> Any:
        return _ask(self, "enter")

    def __exit__(self, *_: Any) -> None:
        _ask(self, "exit")


def _ask(far: Far, what: str, *args: Any, **kwargs: Any) -> Any:
    link, number = object.__getattribute__(far, "_far")
    return link.ask(what, number, args, kwargs)


def _give_operations() -> None:
    """Stand-ins compare with stand-ins only, and with plain data they combine to no plain data."""

    def plainly(what: str) -> Any:
        return lambda self, *args: _ask(self, what, *args)

    def compared(what: str) -> Any:
        return lambda self, other: _ask(self, what, other) if isinstance(other, Far) else NotImplemented

    def combined(what: str) -> Any:
        def combine(self: Far, other: Any) -> Any:
            result = _ask(self, what, other)
            return result if isinstance(other, Far) or isinstance(result, Far) else NotImplemented

        return combine

    for name in ("iter", "next", "len", "bool", "str", "repr", "hash", "getitem", "setitem", "delitem"):
        setattr(Far, f"__{name}__", plainly(name))
    for name in _COMPARE:
        setattr(Far, f"__{name}__", compared(name))
    for name in _COMBINE:
        setattr(Far, f"__{name}__", combined(name))


_give_operations()


class Link:
    """One side of the conversation; ``trusted`` is the tests', which shows no more than it must."""

    def __init__(self, incoming: int, outgoing: int, *, trusted: bool) -> None:
        self.lines = os.fdopen(incoming, "r", encoding="utf-8")
        self.out = os.fdopen(outgoing, "w", encoding="utf-8")
        self.trusted = trusted
        self.kept: list[Any] = []
        self.numbers: dict[int, int] = {}  # of what is kept, by id
        self.far: dict[int, Any] = {}  # stand-ins, by the other side's numbers
        self.streams = sys.stdin, sys.stdout

    # --- values; ``shared`` are the containers of one call, in the order in which they were met ---

    def pack(self, value: Any, shared: list[Any]) -> Any:
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int):
            number = int.__add__(value, 0)
            return {"int": str(number) if abs(number) < 10**4000 else hex(number)}
        if isinstance(value, float):
            return {"float": float.hex(value)}
        if isinstance(value, complex):
            return {"complex": [value.real.hex(), value.imag.hex()]}
        if isinstance(value, bytes):
            return {"bytes": value.hex()}
        for place, known in enumerate(shared):
            if value is known:
                return {"same": place}
        for name, kind in _CONTAINERS.items():
            if isinstance(value, kind):
                shared.append(value)
                return {name: self.content(value, shared)}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            values = [self.pack(v, shared) for v in value]
            return {"named": [type(value).__name__, list(value._fields), values]}
        for name, kind in _FROZEN.items():
            if isinstance(value, kind):
                return {name: [self.pack(v, shared) for v in value]}
        if isinstance(value, range | slice):
            parts = [self.pack(v, shared) for v in (value.start, value.stop, value.step)]
            return {"range" if isinstance(value, range) else "slice": parts}
        for name, (kind, _) in _WRITTEN.items():
            if isinstance(value, kind):
                return {name: str(value)}
        if isinstance(value, datetime.timedelta):
            return {"timedelta": [value.days, value.seconds, value.microseconds]}
        if isinstance(value, type):
            name = value.__name__
            if _NAMED.get(name) is value:
                return {"type": name}
            if issubclass(value, Exception):
                return {"error": self.chain(value)}
        return self.handle(value)

    def handle(self, value: Any) -> dict[str, int]:
        if isinstance(value, Far):
            return {"yours": object.__getattribute__(value, "_far")[1]}
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.kept)
            self.kept.append(value)
        return {"mine": self.numbers[id(value)]}

    def content(self, container: Any, shared: list[Any]) -> Any:
        if isinstance(container, bytearray):
            return container.hex()
        if isinstance(container, dict):
            return [[self.pack(k, shared), self.pack(v, shared)] for k, v in container.items()]
        return [self.pack(v, shared) for v in container]

    def fill(self, container: Any, content: Any, shared: list[Any]) -> None:
        """Makes ``content`` what ``container`` holds."""
        if isinstance(container, bytearray):
            container[:] = bytes.fromhex(content)
            return
        container.clear()
        if isinstance(container, dict):
            for key, value in content:
                name = self.unpack(key, shared)
                container[name] = self.unpack(value, shared)
        elif isinstance(container, set):
            container.update([self.unpack(v, shared) for v in content])
        else:
            container.extend([self.unpack(v, shared) for v in content])

    def unpack(self, value: Any, shared: list[Any]) -> Any:
        if not isinstance(value, dict):
            return value
        ((name, content),) = value.items()
        if name in _CONTAINERS:
            container = _CONTAINERS[name]()
            shared.append(container)
            self.fill(container, content, shared)
            return container
        if name in _FROZEN:
            return _FROZEN[name]([self.unpack(v, shared) for v in content])
        if name in _WRITTEN:
            return _WRITTEN[name][1](content)
        if name == "named":
            make: Any = collections.namedtuple  # its names are checked there
            return make(*content[:2])(*[self.unpack(v, shared) for v in content[2]])
        if name in ("range", "slice"):
            return {"range": range, "slice": slice}[name](*[self.unpack(v, shared) for v in content])
        if name == "mine":
            if content not in self.far:
                self.far[content] = Far(self, content)
            return self.far[content]
        if name in ("same", "yours"):
            return (shared if name == "same" else self.kept)[content]
        if name == "error":
            return self.error_type(content)
        return _READ[name](content)

    # --- errors: one by one, the program's own classes down to Python's ---

    def chain(self, kind: type) -> list[Any]:
        known: list[Any] = []
        for place in kind.__mro__:
            if vars(builtins).get(place.__name__) is place:
                return [*known, place.__name__]
            for number, stand_in in self.far.items():
                if stand_in is place:
                    return [*known, {"yours": number}]
            if issubclass(place, Exception):
                known.append([self.handle(place)["mine"], place.__name__])
        return [*known, "Exception"]

    def error_type(self, chain: list[Any]) -> Any:
        *own, base = chain
        kind: Any = self.kept[base["yours"]] if isinstance(base, dict) else vars(builtins).get(base)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            return RuntimeError
        for number, name in reversed(own):
            kind = self.far.setdefault(number, type(name, (kind,), {}))
        return kind

    # --- the conversation ---

    def send(self, message: Any) -> None:
        self.out.write(json.dumps(message) + "\n")
        self.out.flush()

    def ask(self, what: str, number: int, args: Any, kwargs: Any) -> Any:
        shared: list[Any] = []
        packed = [self.pack(list(args), shared), self.pack(kwargs, shared)]
        given = None
        if self.trusted and (sys.stdin, sys.stdout) != self.streams:  # the tests type and read in its place
            given = "" if sys.stdin is self.streams[0] else sys.stdin.read()
        self.send([what, number, packed, given])
        while line := self.lines.readline():
            kind, *content = json.loads(line)
            if kind not in ("value", "error"):
                self.answer(kind, *content)
                continue
            result, changes, printed, left = content
            if given is not None and sys.stdout is not self.streams[1]:
                sys.stdout.write(printed)
            if given and isinstance(sys.stdin, io.StringIO):
                sys.stdin.seek(sys.stdin.tell() - min(len(left), len(given)))
            if kind == "value":
                value = self.unpack(result, shared)
            else:
                error_kind = self.error_type(result[0])
                value = error_kind.__new__(error_kind)
                value.args = tuple(self.unpack(v, shared) for v in result[1])
            for place, new in changes:
                self.fill(shared[place], new, shared)
            if kind == "error":
                raise value
            return value
        raise RuntimeError("the candidate is gone")

    def answer(self, what: str, number: int, packed: Any, given: str | None) -> None:
        """Does what the other side asked for and tells it the result."""
        shared: list[Any] = []
        args, kwargs = (self.unpack(part, shared) for part in packed)
        before = [self.content(container, shared) for container in shared[:]]
        streams = sys.stdin, sys.stdout
        if given is not None:
            sys.stdin = io.TextIOWrapper(io.BytesIO(given.encode()), encoding="utf-8")
            sys.stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        try:
            kind, result = "value", self.pack(self.do(what, self.kept[number], args, kwargs), shared)
        except Exception as error:
            kind, result = "error", [self.chain(type(error)), [self.pack(v, shared) for v in error.args]]
        except BaseException:
            kind, result = "error", [["RuntimeError"], []]
        printed, left = "", ""
        if given is not None:
            left = sys.stdin.read()
            sys.stdout.seek(0)
            printed = sys.stdout.read()
            sys.stdin, sys.stdout = streams
        changes = []
        for place, old in enumerate(before):
            new = self.content(shared[place], shared)
            if new != old:
                changes.append([place, new])
        self.send([kind, result, changes, printed, left])

    def do(self, what: str, target: Any, args: Any, kwargs: Any) -> Any:
        if what in ("get", "set"):
            if self.trusted and (type(target).__module__ != "tests" or args[0].startswith("_")):
                raise AttributeError(args[0])
            return getattr(target, args[0]) if what == "get" else setattr(target, *args)
        if self.trusted and any(target is function for function in _NEVER):
            raise TypeError("not for the candidate")
        return _DO[what](target, *args, **kwargs)

    def serve(self) -> None:
        for line in self.lines:
            self.answer(*json.loads(line))


def main() -> None:
    role, shadowed = sys.argv[1], set(filter(None, sys.argv[2].split(",")))
    source_fd, incoming, outgoing = map(int, sys.argv[4:7])
    confine: dict[str, Any] = {"for_programs": lambda: None, "hidden": lambda: None}
    exec(compile(sys.argv[3], "confine", "exec"), confine)
    with os.fdopen(source_fd, "r", encoding="utf-8") as file:
        source = file.read()
    sys.setrecursionlimit(4000)
    link = Link(incoming, outgoing, trusted=role == "tests")
    if role == "script":
        confine["hidden"]()
        link.kept.append(lambda given: _run_script(source, given, confine["for_programs"]))
        link.serve()
        return
    confine["for_programs"]()
    if role == "candidate":
        module = sys.modules["candidate"] = types.ModuleType("candidate")
        names = vars(module)
        link.kept.append(lambda wanted: {name: names[name] for name in wanted if name in names})
        exec(compile(source, "candidate.py", "exec"), names)
        link.serve()
        return
    verdict_fd = int(sys.argv[7])
    module = sys.modules["tests"] = types.ModuleType("tests")
    tests = vars(module)
    try:
        code = compile(source, "tests.py", "exec")
        wanted = _used_names(code) - _bound_names(code) - (set(vars(builtins)) - shadowed)
        if "run_script" in wanted:
            tests["run_script"] = lambda given: link.ask("call", 0, (given,), {})
        else:
            found = link.ask("call", 0, (sorted(wanted),), {})
            # and nothing else that it may have sent
            tests |= {name: found[name] for name in wanted if name in found}
        exec(code, tests)
        verdict = "passed"
    except BaseException as error:
        verdict = f"failed: {type(error).__name__}"
    os.write(verdict_fd, verdict.encode())


def _run_script(source: str, given: str, confine: Any) -> str:
    """What the program prints for ``given`` on its standard input; an error if it ends with one."""
    typed, printed = os.memfd_create("in"), os.memfd_create("out")
    os.write(typed, given.encode())
    os.lseek(typed, 0, os.SEEK_SET)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.dup2(typed, 0)
            os.dup2(printed, 1)
            os.closerange(3, 64)
            sys.stdin, sys.stdout = os.fdopen(0, encoding="utf-8"), os.fdopen(1, "w", encoding="utf-8")
            confine()
            here = sys.modules["__main__"]  # kept: these functions live there
            module = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(source, "program", "exec"), vars(module))
            status = 0 if here else 1
        except SystemExit as end:
            status = 0 if end.code in (None, 0) else 1
        except BaseException:
            status = 1
        finally:
            try:
                sys.stdout.flush()
            finally:
                os._exit(status)
    _, ended = os.waitpid(pid, 0)
    os.lseek(printed, 0, os.SEEK_SET)
    with os.fdopen(printed, "rb") as file:
        said = file.read().decode("utf-8", "replace")
    os.close(typed)
    if ended:
        raise RuntimeError("the program failed")
    return said


def _used_names(code: Any) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            names |= _used_names(constant)
    return names


def _bound_names(code: Any) -> set[str]:
    """Names that the program stores itself at its top level."""
    import dis

    return {i.argval for i in dis.get_instructions(code) if i.opname in ("STORE_NAME", "STORE_GLOBAL")}


if __name__ == "__main__":
    main()
