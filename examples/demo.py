"""The main job in a second, offline: the shipped model answers six questions.

The last one belongs to none of its categories. Run it with `make demo`.
"""

from __future__ import annotations

from qcat import Classifier

QUESTIONS = (
    "When was the pool pump replaced?",
    "who fixed the gate latch",
    "Is the dishwasher still under warranty?",
    "how do I set the sprinklers for summer",
    "the AC is blowing warm air again",
    "What is the capital of Mongolia?",
)


def main() -> None:
    """Ask, and print label, confidence and label mass of each answer."""
    with Classifier.open() as house:
        print(f"{'question':42}{'label':16}{'confidence':>10}{'label mass':>12}")
        for question, answer in zip(QUESTIONS, house.ask_many(QUESTIONS), strict=True):
            print(
                f"{question:42}{answer.label:16}{answer.confidence:10.3f}{answer.label_mass:12.3f}"
            )


if __name__ == "__main__":
    main()
