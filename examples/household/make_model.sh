#!/usr/bin/env bash
# Makes the model that comes with qcat from the small base and the household questions: some
# minutes on two cores. Prints how it does on the test questions, beside TF-IDF.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"
work=build/household
rm -rf "$work"

qcat train examples/household/questions.jsonl -t examples/household/task.toml \
  --base examples/base/model -o "$work/run" \
  --method lora --epochs 4 --batch-size 32 --learning-rate 5e-4 --rank 32 --train-embeddings --word-dropout 0.15
qcat export "$work/run" -o "$work/dist" --quant q4_k_m
qcat eval "$work/dist/household.gguf" "$work/run/test.jsonl" --baseline tfidf \
  --off-topic examples/household/off_topic.jsonl --html "$work/report.html"
cp "$work/dist/household.gguf" qcat/models/household.gguf
