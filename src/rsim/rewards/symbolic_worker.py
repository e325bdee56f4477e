"""The process behind `rsim.rewards.symbolic`: compares two answers, one JSON line in, one out.

It limits its own memory and processor time; wall-clock time is the parent's to watch, which kills it when it hangs. It ends
when its input does. Run as ``python -m rsim.rewards.symbolic_worker MEMORY_MB SECONDS``.
"""

from __future__ import annotations

import base64
import importlib
import json
import logging
import pickle
import resource
import sys
from typing import Any


def main() -> None:
    memory_mb, seconds = int(sys.argv[1]), float(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    replies = sys.stdout
    sys.stdout = sys.stderr  # nothing that a library prints may be taken for a reply
    for line in sys.stdin:
        request = json.loads(line)
        if "import" in request:
            importlib.import_module(request["import"])
            resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
            reply: dict[str, Any] = {"loaded": request["import"]}
        else:
            used = resource.getrusage(resource.RUSAGE_SELF)
            allowed = int(used.ru_utime + used.ru_stime + seconds) + 2
            resource.setrlimit(resource.RLIMIT_CPU, (allowed, resource.RLIM_INFINITY))
            reply = _compare(request)
        print(json.dumps(reply), file=replies, flush=True)


def _compare(request: dict[str, Any]) -> dict[str, Any]:
    """``{"same": bool, "failure": str}``; what cannot be read or compared is not the same."""
    try:
        same = _math_verify(request) if request["library"] == "math_verify" else _gym(request)
    except MemoryError:
        return {"same": False, "failure": "memory"}
    except Exception as error:  # these libraries raise nearly anything on malformed answers: fail closed, and say so
        return {"same": False, "failure": f"error: {type(error).__name__}"}
    return {"same": bool(same), "failure": ""}


def _math_verify(request: dict[str, Any]) -> bool:
    import math_verify  # type: ignore[import-untyped,unused-ignore]

    both = [math_verify.LatexExtractionConfig(), math_verify.ExprExtractionConfig()]
    gold, given = (
        math_verify.parse(request[key], extraction_config=both, parsing_timeout=None, raise_on_error=True)
        for key in ("gold", "answer")
    )
    same: bool = math_verify.verify(gold, given, timeout_seconds=None, raise_on_error=True, **request["options"])
    return same


def _gym(request: dict[str, Any]) -> bool:
    """Full marks only: these verifiers give wrong answers a part."""
    from reasoning_gym.factory import get_score_answer_fn  # type: ignore[import-untyped,unused-ignore]

    entry = pickle.loads(base64.b64decode(request["entry"]))  # our own process wrote it
    mark: float = get_score_answer_fn(request["task"])(request["answer"], entry)
    return mark > 0.99


if __name__ == "__main__":
    main()
