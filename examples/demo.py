"""The main job in a second, offline: the shipped model answers six questions.

The last one belongs to none of its categories, and the model abstains. Run it with
`make demo`.
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
    """Ask, and print what is answered, with which confidence, or why the model abstained."""
    with Classifier.open() as house:
        print(f"{'question':42}{'answer':14}{'confidence':12}abstained")
        for question, answer in zip(QUESTIONS, house.ask_many(QUESTIONS), strict=True):
            shown = "-" if answer.abstained else answer.label
            print(
                f"{question:42}{shown:14}{answer.confidence:<12.3f}{answer.reason or ''}".rstrip()
            )


if __name__ == "__main__":
    main()
