#!/usr/bin/env bash
# The wheel, installed alone in a fresh environment in another folder, can ask.
# Needs a registry (or pip's cache) for the core dependencies, so it is not part of `make test`.
set -euo pipefail
cd "$(dirname "$0")/.."
python="$PWD/.venv/bin/python"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work" .
"$python" -m venv "$work/fresh"
"$work/fresh/bin/python" -m pip install --quiet "$work"/qcat-*.whl
if "$work/fresh/bin/python" -m pip list 2>/dev/null | grep -E '^(torch|transformers|peft) '; then
  echo "the core install must not bring these" >&2
  exit 1
fi

"$python" -W ignore - "$work" <<'PYTHON'
import sys
from pathlib import Path

sys.path.insert(0, "examples")
import tiny_model

from convert.pipeline import Request, export
from qcat.task import Task

work = Path(sys.argv[1])
task = Task.read("examples/household/task.toml")
rows = tiny_model.make_tokenizer(work / "base", [" ".join(task.labels)])
base = tiny_model.make_base(work / "base", vocabulary=rows, hidden=64)
tiny_model.make_adapter(work / "adapter", base, str(work / "base"))
export(Request(task, work / "house", adapter=work / "adapter", quantization="q8_0"))
PYTHON

mkdir "$work/elsewhere"
cd "$work/elsewhere"
qcat="$work/fresh/bin/qcat"
answer=$("$qcat" ask -m "$work/house/household.gguf" "When was the pump replaced?")
grep -qx "  $answer" <<<"$("$qcat" inspect "$work/house/household.gguf")"
grep -q '^TEMPLATE' <<<"$("$qcat" modelfile "$work/house/household.gguf")"
refusal=$("$qcat" export "$work/adapter" -t "$work/house/task.toml" -o out 2>&1 || true)
grep -q "pip install 'qcat\[train\]'" <<<"$refusal"
echo "the wheel alone answers: $answer"
