#!/usr/bin/env bash
# The wheel, installed alone in a fresh environment in another folder, can ask.
# Needs a registry (or pip's cache) for the core dependencies, so it is not part of `make test`.
set -euo pipefail
cd "$(dirname "$0")/.."
python="$PWD/.venv/bin/python"
data="$PWD/examples/household"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work" .
"$python" -m venv "$work/fresh"
"$work/fresh/bin/python" -m pip install --quiet "$work"/qcat_llm-*.whl
if "$work/fresh/bin/python" -m pip list 2>/dev/null | grep -E '^(torch|transformers|peft) '; then
  echo "the core install must not bring these" >&2
  exit 1
fi

mkdir "$work/elsewhere"
cd "$work/elsewhere"
qcat="$work/fresh/bin/qcat"
answer=$("$qcat" ask "When was the pool pump replaced?")
test "$answer" = pool
model=$("$work/fresh/bin/python" -c 'from qcat.classifier import DEFAULT_MODEL; print(DEFAULT_MODEL)')
grep -qx "  $answer" <<<"$("$qcat" show "$model")"
grep -q '^TEMPLATE' <<<"$("$qcat" show "$model" --modelfile)"
refusal=$("$qcat" train "$data/questions.jsonl" -t "$data/task.toml" -o out 2>&1 || true)
grep -qF 'pip install "qcat-llm[train]"' <<<"$refusal"
echo "the wheel alone answers: $answer"
