"""A scikit-learn estimator: train, export and ask behind `fit` and `predict`.

    from qcat.sklearn import QcatClassifier
    model = QcatClassifier(base="Qwen/Qwen3-0.6B", epochs=1).fit(texts, labels)
    model.predict(["When was the pool pump replaced?"])

It works in `cross_val_score` and `GridSearchCV` and can be pickled: a fitted estimator contains its
GGUF. `fit` trains and exports, which takes minutes for a base of realistic size. Needs the extra
`train`.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from qcat.classifier import Classifier
from qcat.data.dataset import Example
from qcat.encoding.prompt import clean_question
from qcat.errors import ArgumentError
from qcat.task import DEFAULT_INSTRUCTION, Task
from qcat.workflows.train import DEFAULT_BASE, prepare_base

if TYPE_CHECKING:
    from qcat.training.adapters import Method


class QcatClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Classifies short texts with a fine-tuned language model in a 4-bit GGUF.

    Args:
        base: a folder, a hub name, a GGUF file, or `ollama:NAME`.
        method: `scales` or `lora`.
        epochs: passes over the training texts; no early stopping, since all texts are trained on.
        learning_rate: the peak rate, after the warm-up; None for the method's default.
        batch_size: texts per step.
        instruction: the first lines of the prompt.
        descriptions: class to description, for the prompt.
        layers: how many layers of the base to keep; None for all.
        threads: number of threads for prediction; None for the physical cores.
        random_state: seed for training.

    Attributes:
        classes_: the classes in ascending order, shape (classes,).
    """

    def __init__(
        self,
        base: str = DEFAULT_BASE,
        *,
        method: Method = "scales",
        epochs: int = 3,
        learning_rate: float | None = None,
        batch_size: int = 8,
        instruction: str = DEFAULT_INSTRUCTION,
        descriptions: dict[Any, str] | None = None,
        layers: int | None = None,
        threads: int | None = None,
        random_state: int = 0,
    ) -> None:
        self.base = base
        self.method = method
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.instruction = instruction
        self.descriptions = descriptions
        self.layers = layers
        self.threads = threads
        self.random_state = random_state

    def fit(self, X: Iterable[str], y: Sequence[Any]) -> Self:  # noqa: N803 (scikit-learn's name)
        """Train on texts and their classes, and export.

        Raises:
            ArgumentError: the numbers of classes and texts differ, or an item is not text.
            QuestionError, TaskError: a text is empty, or the classes do not form a valid task.
            ModelError, TrainError, ExportError: the base cannot be used.
        """
        from qcat.data.split import Split
        from qcat.threads import wait_briefly
        from qcat.training.settings import Settings
        from qcat.training.train import train
        from qcat.workflows.export import convert_apart, export
        from qcat.workflows.export_job import Request

        texts = _texts(X)
        classes, numbers = np.unique(np.asarray(y), return_inverse=True)
        if len(numbers) != len(texts):
            raise ArgumentError(f"{len(texts)} texts, but {len(numbers)} classes")
        task = self._task(classes)
        examples = [
            Example(clean_question(text), int(number), line)
            for line, (text, number) in enumerate(zip(texts, numbers, strict=True), 1)
        ]
        wait_briefly()
        cleaned = [example.text for example in examples]
        settings = Settings(
            base=prepare_base(self.base, None, self.layers, task, cleaned),
            method=self.method,
            epochs=self.epochs,
            patience=self.epochs,
            batch=self.batch_size,
            rate=self.learning_rate,
            seed=self.random_state,
            layers=self.layers,
        )
        # The training texts also serve as validation and test texts here: scikit-learn holds out
        # other texts and evaluates on them itself.
        few = examples[:: max(1, len(examples) // 50)]
        with tempfile.TemporaryDirectory(prefix="qcat-") as folder:
            run, bundle = Path(folder, "run"), Path(folder, "bundle")
            train(task, Split(examples, few, few), settings, run)
            training = tuple(cleaned)
            made = Request(Task.read(run / "task.toml"), bundle, adapter=run, training=training)
            export(made, converter=convert_apart)
            gguf = Path(bundle, f"{task.name}.gguf").read_bytes()
        self._close()
        self.classes_, self.gguf_ = classes, gguf
        return self

    def predict(self, X: Iterable[str]) -> npt.NDArray[Any]:  # noqa: N803
        """The most probable class of each text, shape (texts,)."""
        best = self.predict_proba(X).argmax(1)
        return np.asarray(self.classes_[best])

    def predict_proba(self, X: Iterable[str]) -> npt.NDArray[np.float64]:  # noqa: N803
        """Probabilities of the classes, shape (texts, classes), in the order of `classes_`."""
        check_is_fitted(self, "gguf_")
        return self._opened().predict_proba(_texts(X))

    def _task(self, classes: npt.NDArray[Any]) -> Task:
        names = [str(name) for name in classes]
        described = {str(key): text for key, text in (self.descriptions or {}).items()}
        labels = {name: described.get(name, "") for name in names}
        return Task("classes", labels, instruction=self.instruction)

    def _opened(self) -> Classifier:
        """The model, opened on first use in a process and freed together with the estimator."""
        if self.__dict__.get("_classifier") is None:
            folder = Path(tempfile.mkdtemp(prefix="qcat-"))
            path = folder / "model.gguf"
            path.write_bytes(self.gguf_)
            self._classifier = Classifier.open(path, threads=self.threads)
            self._release = weakref.finalize(self, _release, self._classifier, folder)
        opened: Classifier = self._classifier
        return opened

    def _close(self) -> None:
        if self.__dict__.get("_classifier") is not None:
            self._release()
            del self._classifier, self._release

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {k: v for k, v in state.items() if k not in ("_classifier", "_release")}

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        return tags


def _release(classifier: Classifier, folder: Path) -> None:
    classifier.close()
    shutil.rmtree(folder, ignore_errors=True)


def _texts(values: Iterable[str]) -> list[str]:
    texts = list(values) if not isinstance(values, str) else [values]
    if isinstance(values, str) or not all(isinstance(text, str) for text in texts):
        raise ArgumentError("texts expected: a sequence of strings")
    return [str(text) for text in texts]
