"""The process behind `rsim.rewards.symbolic`: compares two answers with math-verify, one JSON line in, one out.

It limits its own memory and processor time; wall-clock time is the parent's to watch, which kills it when it hangs. It ends
when its input does. Run as ``python -m rsim.rewards.symbolic_worker MEMORY_MB SECONDS``.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from typing import Any


def main() -> None:
    memory_mb, seconds = int(sys.argv[1]), float(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import math_verify  # type: ignore[import-untyped,unused-ignore]

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    both = [math_verify.LatexExtractionConfig(), math_verify.ExprExtractionConfig()]
    replies = sys.stdout
    sys.stdout = sys.stderr  # nothing that a library prints may be taken for a reply
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        allowed = int(used.ru_utime + used.ru_stime + seconds) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (allowed, resource.RLIM_INFINITY))
        print(json.dumps(_compare(math_verify, json.loads(line), both)), file=replies, flush=True)


def _compare(math_verify: Any, request: dict[str, Any], both: list[Any]) -> dict[str, Any]:
    """``{"same": bool, "failure": str}``; what cannot be read or compared is not the same."""
    try:
        gold = math_verify.parse(request["gold"], extraction_config=both, parsing_timeout=None, raise_on_error=True)
        given = math_verify.parse(request["answer"], extraction_config=both, parsing_timeout=None, raise_on_error=True)
        same = math_verify.verify(gold, given, timeout_seconds=None, raise_on_error=True, **request["options"])
    except MemoryError:
        return {"same": False, "failure": "memory"}
    except Exception as error:  # sympy raises nearly anything on malformed input: fail closed, and say so
        return {"same": False, "failure": f"error: {type(error).__name__}"}
    return {"same": bool(same), "failure": ""}


if __name__ == "__main__":
    main()
