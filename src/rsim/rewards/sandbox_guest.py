"""What runs inside the sandbox, from its own text alone: ``python -I -c TEXT ROLE SHADOWED SOURCE IN OUT
[VERDICT]``.

SOURCE, IN, OUT and VERDICT are file descriptors; SHADOWED names, separated by commas, are the candidate's
even where Python has a built-in of that name.

Two processes, each in a sandbox of its own, talk by lines. *candidate* runs the model's program and then
serves calls into it. *tests* runs the test program, in which the names that it does not define itself are the
candidate's, or stand-ins for them; it alone holds the verdict's pipe. So a candidate can return wrong values,
hang or die, but it can neither touch the tests nor speak for them: leaving with status 0, patching ``assert``
or overriding ``==`` gain nothing. Values cross as plain data; other objects stay where they are and cross as
handles.
"""

from __future__ import annotations

import builtins
import collections
import json
import os
import sys
from typing import Any

# The types that cross by name. A function of Python's that crossed into the tests would be called there: no
# eval for them.
_TYPES = (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)
_SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


class Far:
    """A stand-in for an object on the other side."""

    def __init__(self, link: Link, number: int) -> None:
        object.__setattr__(self, "_far", (link, number))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        link, number = object.__getattribute__(self, "_far")
        return link.ask("call", number, list(args), kwargs)

    def __getattr__(self, name: str) -> Any:
        link, number = object.__getattribute__(self, "_far")
        return link.ask("get", number, name)

    def __setattr__(self, name: str, value: Any) -> None:
        link, number = object.__getattribute__(self, "_far")
        link.ask("set", number, name, value)


class Link:
    """One side of the conversation."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        self.lines = os.fdopen(incoming, "r", encoding="utf-8")
        self.out = os.fdopen(outgoing, "w", encoding="utf-8")
        self.kept: list[Any] = []

    def pack(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | str):
            return value
        if type(value) is int:
            return {"int": str(value) if abs(value) < 10**4000 else hex(value)}
        if isinstance(value, float):
            return {"float": value.hex()}
        if isinstance(value, complex):
            return {"complex": [value.real.hex(), value.imag.hex()]}
        if isinstance(value, bytes):
            return {"bytes": value.hex()}
        for name, kind in _SEQUENCES.items():
            if isinstance(value, kind):
                return {name: [self.pack(v) for v in value]}
        if isinstance(value, dict):
            return {"dict": [[self.pack(k), self.pack(v)] for k, v in value.items()]}
        if isinstance(value, collections.deque | range):
            return {"list": [self.pack(v) for v in value]}
        if isinstance(value, type) and value in _TYPES:
            return {"type": value.__name__}
        if isinstance(value, Far):
            return {"yours": object.__getattribute__(value, "_far")[1]}
        self.kept.append(value)
        return {"mine": len(self.kept) - 1}

    def unpack(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((name, content),) = value.items()
        if name == "int":
            return int(content, 0)
        if name == "float":
            return float.fromhex(content)
        if name == "complex":
            return complex(*map(float.fromhex, content))
        if name == "bytes":
            return bytes.fromhex(content)
        if name == "dict":
            return {self.unpack(k): self.unpack(v) for k, v in content}
        if name == "type":
            return {kind.__name__: kind for kind in _TYPES}[content]
        if name == "yours":
            return self.kept[content]
        if name == "mine":
            return Far(self, content)
        return _SEQUENCES[name](self.unpack(v) for v in content)

    def send(self, message: Any) -> None:
        self.out.write(json.dumps(message) + "\n")
        self.out.flush()

    def ask(self, what: str, number: int, *rest: Any) -> Any:
        self.send([what, number, [self.pack(r) for r in rest]])
        line = self.lines.readline()
        if not line:
            raise RuntimeError("the candidate is gone")
        kind, content = json.loads(line)
        if kind != "value":
            # Tests that expect an error by type get that type, if it is one of Python's own.
            error = vars(builtins).get(content)
            if isinstance(error, type) and issubclass(error, Exception):
                raise error("raised by the candidate")
            raise RuntimeError(content)
        return self.unpack(content)

    def serve(self, names: dict[str, Any]) -> None:
        for line in self.lines:
            what, number, packed = json.loads(line)
            rest = [self.unpack(p) for p in packed]
            try:
                if what == "names":
                    result = {name: names[name] for name in rest[0] if name in names}
                elif what == "get":
                    result = getattr(self.kept[number], rest[0])
                elif what == "set":
                    setattr(self.kept[number], rest[0], rest[1])
                    result = None
                else:
                    result = self.kept[number](*rest[0], **rest[1])
                self.send(["value", self.pack(result)])
            except BaseException as error:
                self.send(["error", type(error).__name__])


def main() -> None:
    role, shadowed = sys.argv[1], set(filter(None, sys.argv[2].split(",")))
    source_fd, incoming, outgoing = map(int, sys.argv[3:6])
    with os.fdopen(source_fd, "r", encoding="utf-8") as file:
        source = file.read()
    sys.setrecursionlimit(4000)
    link = Link(incoming, outgoing)
    if role == "candidate":
        names: dict[str, Any] = {"__name__": "candidate"}
        exec(compile(source, "candidate.py", "exec"), names)
        link.serve(names)
        return
    verdict_fd = int(sys.argv[6])
    tests: dict[str, Any] = {"__name__": "tests"}
    try:
        code = compile(source, "tests.py", "exec")
        wanted = _used_names(code) - _bound_names(code) - (set(vars(builtins)) - shadowed)
        given = link.ask("names", 0, sorted(wanted))
        tests |= {
            name: given[name] for name in wanted if name in given
        }  # and nothing else that it may have sent
        exec(code, tests)
        verdict = "passed"
    except BaseException as error:
        verdict = f"failed: {type(error).__name__}"
    os.write(verdict_fd, verdict.encode())


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
