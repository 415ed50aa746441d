#!/usr/bin/env bash
# A real Ollama for the tests, from source: the server by `go install`, and the llama-server and
# llama-quantize that it runs from the llama.cpp tree in llama-cpp-python's source distribution,
# which is the llama.cpp that qcat itself runs on. Usage: install.sh PYTHON FOLDER
#
# FOLDER becomes a link to the finished build, which is kept in the user's cache folder, as pip
# keeps the wheels it has compiled. Without Go nothing is installed and the tests skip, but under CI
# that is a failure. For Linux.
set -euo pipefail

OLLAMA=0.32.15
LLAMA_CPP_PYTHON=0.3.36

python=$1
folder=$2
cache=${XDG_CACHE_HOME:-$HOME/.cache}/qcat-tests/ollama-$OLLAMA-$LLAMA_CPP_PYTHON-$(uname -m)

if ! command -v go >/dev/null; then
    echo "tests/ollama/install.sh: no Go here: the tests against a real Ollama are skipped" >&2
    [ -z "${CI:-}" ]
    exit
fi

if [ ! -d "$cache" ]; then
    mkdir -p "$(dirname "$cache")"
    work=$(mktemp -d "$cache.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    GOBIN=$work/bin go install -ldflags "-X=github.com/ollama/ollama/version.Version=$OLLAMA" \
        "github.com/ollama/ollama@v$OLLAMA"

    "$python" -m pip download --quiet --no-deps --no-binary llama-cpp-python \
        --dest "$work" "llama-cpp-python==$LLAMA_CPP_PYTHON"
    tar -xf "$work"/llama_cpp_python-*.tar.gz -C "$work"
    command -v cmake >/dev/null || {
        "$python" -m venv "$work/cmake"
        "$work/cmake/bin/python" -m pip install --quiet cmake
        PATH=$work/cmake/bin:$PATH
    }
    # Built with AMX, llama.cpp crashes (qcat.backends.llama.repacks).
    no_amx="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    # shellcheck disable=SC2086
    echo | cc -E $no_amx - >/dev/null 2>&1 || no_amx=""
    cmake -S "$work"/llama_cpp_python-*/vendor/llama.cpp -B "$work/build" \
        -DCMAKE_C_FLAGS="$no_amx" -DCMAKE_CXX_FLAGS="$no_amx" \
        -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=ON \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF \
        -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_CURL=OFF >"$work/cmake.log"
    cmake --build "$work/build" --target llama-server llama-quantize -j "$(nproc)"
    # Where Ollama looks: ../lib/ollama beside the folder of its own binary.
    install -D --target-directory "$work/lib/ollama" "$work"/build/bin/llama-{server,quantize}
    rm -rf "$work/build" "$work/cmake" "$work"/llama_cpp_python-*
    chmod 755 "$work"
    mv -T "$work" "$cache" || [ -d "$cache" ] # another run was first
fi

mkdir -p "$(dirname "$folder")"
ln -sfn "$cache" "$folder"
echo "Ollama $OLLAMA with the llama-server of llama-cpp-python $LLAMA_CPP_PYTHON: $folder"
