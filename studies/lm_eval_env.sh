#!/bin/sh
# Makes an environment with lm-evaluation-harness, once, and prints its Python.
set -eu
HERE="${RSIM_LM_EVAL_ENV:-$HOME/.cache/rsim/lm-eval-env}"
if [ ! -f "$HERE/.ready" ]; then
    python3 -m venv "$HERE" >&2
    "$HERE/bin/pip" install -q --disable-pip-version-check torch==2.13.0 >&2
    "$HERE/bin/pip" install -q --disable-pip-version-check "lm-eval[api]==0.4.13" transformers==5.23.0 >&2
    touch "$HERE/.ready"
fi
echo "$HERE/bin/python"
