"""qcat: short questions into a fixed list of categories, on the CPU.

`Classifier` answers questions; `train`, `export` and `evaluate` make a model and measure it.
Importing this package loads neither native libraries nor torch: they are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qcat.classifier import Classifier
from qcat.errors import (
    ArgumentError,
    BundleError,
    DataError,
    ExportError,
    ModelError,
    NotPromotedError,
    QcatError,
    QuestionError,
    RecordError,
    ReviewError,
    ServerError,
    TaskError,
    TrainError,
)
from qcat.prediction import Prediction
from qcat.task import Task
from qcat.version import __version__

if TYPE_CHECKING:
    from qcat.monitor.recorder import Recorder
    from qcat.workflows.evaluate import evaluate
    from qcat.workflows.export import export_run as export
    from qcat.workflows.train import train

_LATER = {
    "Recorder": ("qcat.monitor.recorder", "Recorder"),
    "evaluate": ("qcat.workflows.evaluate", "evaluate"),
    "export": ("qcat.workflows.export", "export_run"),
    "train": ("qcat.workflows.train", "train"),
}

__all__ = [
    "ArgumentError",
    "BundleError",
    "Classifier",
    "DataError",
    "ExportError",
    "ModelError",
    "NotPromotedError",
    "Prediction",
    "QcatError",
    "QuestionError",
    "RecordError",
    "Recorder",
    "ReviewError",
    "ServerError",
    "Task",
    "TaskError",
    "TrainError",
    "__version__",
    "evaluate",
    "export",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LATER[name]
    return getattr(import_module(module), attribute)
