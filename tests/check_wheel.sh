#!/usr/bin/env bash
# The distributions as a user gets them: sdist and wheel build and are valid, and the wheel alone, in
# fresh environments in another folder, can ask: on each supported Python that this machine has, and
# with the lowest versions of its dependencies that it allows.
# Needs a registry (or pip's cache) for the core dependencies, so it is not part of `make test`.
set -euo pipefail
cd "$(dirname "$0")/.."
python="$PWD/.venv/bin/python"
data="$PWD/examples/household"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m pip install --quiet build twine uv
"$python" -m build --outdir "$work/dist" . >"$work/build.log" || { cat "$work/build.log"; exit 1; }
"$python" -m twine check --strict "$work"/dist/*
wheel=$(echo "$work"/dist/qcat_llm-*.whl)
# llama.cpp as it was compiled for .venv: pip keeps it, and every Python can use it.
llama=$("$python" -c 'from importlib.metadata import version; print(version("llama-cpp-python"))')
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work/wheels" "llama-cpp-python==$llama"

# Pythons by version, from the PATH or where pyenv keeps them.
find_python() {
  local found
  for found in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python; do
    if "$found" -c "import sys; exit(sys.version_info[:2] != tuple(map(int, '$1'.split('.'))))" \
        2>/dev/null; then
      command -v "$found"
      return
    fi
  done
}

# smoke ENVIRONMENT: what works without torch, run in a folder of its own
smoke() {
  local qcat="$1/bin/qcat" answer model refusal
  if "$1/bin/python" -c "import importlib.metadata as m; print(*{d.name for d in m.distributions()})" \
      | grep -Ew 'torch|transformers|peft'; then
    echo "the core install must not bring these" >&2
    exit 1
  fi
  mkdir "$1/elsewhere"
  pushd "$1/elsewhere" >/dev/null
  answer=$("$qcat" ask "When was the pool pump replaced?")
  test "$answer" = pool
  model=$("$1/bin/python" -c 'from qcat.classifier import DEFAULT_MODEL; print(DEFAULT_MODEL)')
  grep -qx "  $answer" <<<"$("$qcat" show "$model")"
  grep -q '^TEMPLATE' <<<"$("$qcat" show "$model" --modelfile)"
  "$qcat" init "$data/questions.jsonl" -o task.toml >/dev/null
  head -c 2000 "$data/questions.jsonl" | head -n -1 >few.jsonl
  "$qcat" batch few.jsonl -o answers.csv --prefix qcat_
  test "$(wc -l <answers.csv)" -gt 5
  "$qcat" ask --log log.jsonl --review queue.db --threshold 1 "what is it?" >/dev/null || test $? = 3
  "$qcat" review csv queue.db -o sheet.csv >/dev/null
  for command in $("$qcat" --help | sed -n 's/^  \([a-z]\+\)  .*/\1/p'); do
    "$qcat" "$command" --help >help.txt
  done
  refusal=$("$qcat" train "$data/questions.jsonl" -t "$data/task.toml" -o out 2>&1 || true)
  grep -qF 'pip install "qcat-llm[train]"' <<<"$refusal"
  popd >/dev/null
}

for version in 3.11 3.12 3.13; do
  found=$(find_python "$version")
  if [ -z "$found" ]; then
    echo "Python $version: not on this machine"
    continue
  fi
  "$found" -m venv "$work/$version"
  "$work/$version/bin/python" -m pip install --quiet --find-links "$work/wheels" "$wheel"
  smoke "$work/$version"
  echo "Python $version: the wheel alone answers"
done

lowest=$(find_python 3.11)
"$lowest" -m venv "$work/lowest"
install_lowest=("$python" -m uv pip install --quiet --python "$work/lowest/bin/python")
"${install_lowest[@]}" --find-links "$work/wheels" --resolution lowest-direct -r pyproject.toml
"${install_lowest[@]}" --no-deps "$wheel"
smoke "$work/lowest"
echo "lowest versions: the wheel alone answers"
"$python" -m uv pip list --python "$work/lowest/bin/python" 2>/dev/null | grep -iE 'llama|numpy|click|platformdirs|tomli|tqdm'
