#!/bin/sh
# Makes an environment with llama-cpp-python and its server, once (it is compiled: a quarter of an hour), and prints its Python.
set -eu
HERE="${RSIM_LLAMA_ENV:-$HOME/.cache/rsim/llama-env}"
if [ ! -f "$HERE/.ready" ]; then
    python3 -m venv "$HERE" >&2
    CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF" \
        "$HERE/bin/pip" install -q --disable-pip-version-check "llama-cpp-python[server]==0.3.36" >&2
    touch "$HERE/.ready"
fi
echo "$HERE/bin/python"
