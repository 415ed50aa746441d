"""The main job from end to end, offline, in about a minute: train, export, prove, ask.

A Qwen3 small enough to be made on the spot stands in for Qwen3-0.6B: random weights, a tokenizer
of the example questions' own words. It knows nothing but these questions, so its answers are far
from what the real base gives; the path is the same. Run it with `make demo`.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny_model import LINEAR, make_base, make_tokenizer
from tqdm import tqdm

from qcat.learn.dataset import Example, read_examples
from qcat.prompt import build_prompt, encode_answers, encode_segments
from qcat.task import Task
from qcat.tokenization import HubTokenizer

HERE = Path(__file__).parent
DATA = HERE / "household"
WORK = HERE.parent / "build" / "demo"
EPOCHS, BATCH, RATE = 6, 16, 2e-3
QUESTIONS = (
    "When was the pool pump replaced?",
    "who fixed the gate latch",
    "Is the dishwasher still under warranty?",
    "how do I set the sprinklers for summer",
    "the AC is blowing warm air again",
    "What shade of white is on the living room walls?",
)


def main() -> None:
    """Make a base, train an adapter on it, then call the commands that a user calls."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    random.seed(0)
    shutil.rmtree(WORK, ignore_errors=True)
    task = Task.read(DATA / "task.toml")
    examples = read_examples(DATA / "questions.jsonl", task)
    texts = [example.text for example in examples]
    words = [f"{task.instruction}\n\nValid categories:\n\n{task.question}: x\n{task.answer}:"]
    words += [f" {label}" for label in task.labels]
    count = make_tokenizer(WORK / "base", texts + words * 20)
    print(f"training a tiny Qwen3 on {len(examples)} questions (the demo's, not `qcat train`)")
    train(make_base(WORK / "base", vocabulary=count), task, examples)
    run(
        "export", "build/demo/adapter", "-t", "examples/household/task.toml",
        "--data", "examples/household/held_out.jsonl",
        "--train-data", "examples/household/questions.jsonl", "-o", "build/demo/house",
        "--max-flips", "0.15",  # so small a model is often undecided, and then a hair tips it
    )  # fmt: skip
    run("ask", "-m", "build/demo/house/household.gguf", *QUESTIONS)
    run("ask", "-m", "build/demo/house/household.gguf", "--top", "3", QUESTIONS[0])
    print("\nThis base was made of nothing a minute ago; a real one answers far better.")


def train(model: Any, task: Task, examples: list[Example]) -> None:
    """LoRA on all linear layers; the embedding, random here, is trained and saved whole."""
    tokenizer = HubTokenizer(WORK / "base")
    prompt = build_prompt(task, tokenizer)
    prefix = encode_segments(prompt.prefix, tokenizer)
    answers = encode_answers(task, tokenizer)
    rows = [
        (
            prefix + encode_segments(prompt.rest(example.text), tokenizer),
            [*answers[example.label], tokenizer.end],
        )
        for example in examples
    ]
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=LINEAR,
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(model, config)
    tuned.peft_config["default"].base_model_name_or_path = "build/demo/base"
    steps = EPOCHS * -(-len(rows) // BATCH)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    with tqdm(total=steps, file=sys.stderr, disable=None) as bar:
        for _ in range(EPOCHS):
            random.shuffle(rows)
            for start in range(0, len(rows), BATCH):
                loss = tuned(**collate(rows[start : start + BATCH])).loss
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                bar.update()
    tuned.save_pretrained(WORK / "adapter")


def collate(rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """A batch padded on the right; only the answer counts in the loss."""
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(rows):
        whole = torch.tensor(prompt + answer)
        ids[row, : len(whole)] = whole
        labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
    return {"input_ids": ids, "labels": labels}


def run(*args: str) -> None:
    """Show a qcat command and run it."""
    print("\n$ qcat " + " ".join(json.dumps(arg) if " " in arg else arg for arg in args))
    sys.stdout.flush()
    program = Path(sys.executable).with_name("qcat")
    subprocess.run([str(program), *args], cwd=HERE.parent, check=True)


if __name__ == "__main__":
    main()
