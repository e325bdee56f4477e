#!/bin/sh
# Makes an environment with optillm (the peer of `studies.serve overhead`), once, and prints its Python.
set -eu
HERE="${RSIM_OPTILLM_ENV:-$HOME/.cache/rsim/optillm-env}"
if [ ! -f "$HERE/.ready" ]; then
    python3 -m venv "$HERE" >&2
    "$HERE/bin/pip" install -q --disable-pip-version-check torch==2.13.0 >&2
    "$HERE/bin/pip" install -q --disable-pip-version-check optillm==0.4.0 >&2
    touch "$HERE/.ready"
fi
echo "$HERE/bin/python"
