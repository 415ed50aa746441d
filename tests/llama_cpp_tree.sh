#!/usr/bin/env bash
# The converter of the llama.cpp that qcat runs on, out of llama-cpp-python's source distribution,
# for the tests of `qcat export --converter`. Usage: llama_cpp_tree.sh PYTHON FOLDER
set -euo pipefail

python=$1
folder=$2
version=$("$python" -c 'from importlib.metadata import version; print(version("llama-cpp-python"))')
if [ "$(cat "$folder/VERSION" 2>/dev/null)" = "$version" ]; then
    exit
fi
mkdir -p "$(dirname "$folder")"
work=$(mktemp -d "$folder.XXXXXX")
trap 'rm -rf "$work"' EXIT
"$python" -m pip download --quiet --no-deps --no-binary llama-cpp-python \
    --dest "$work" "llama-cpp-python==$version"
tree=llama_cpp_python-$version/vendor/llama.cpp
tar -xf "$work"/llama_cpp_python-*.tar.gz -C "$work" \
    "$tree"/{convert_hf_to_gguf.py,conversion,gguf-py,models/ggml-vocab-qwen2.gguf}
echo "$version" >"$work/$tree/VERSION"
rm -rf "$folder"
mv -T "$work/$tree" "$folder"
