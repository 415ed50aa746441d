"""qcat: short questions into a fixed list of categories, on the CPU.

`Classifier` is the public face; importing this package loads no native library and no torch.
"""

from qcat.classifier import Classifier
from qcat.errors import (
    BundleError,
    DataError,
    ExportError,
    ModelError,
    QcatError,
    QuestionError,
    ReviewError,
    TaskError,
    TrainError,
)
from qcat.prediction import Prediction
from qcat.task import Task
from qcat.version import __version__

__all__ = [
    "BundleError",
    "Classifier",
    "DataError",
    "ExportError",
    "ModelError",
    "Prediction",
    "QcatError",
    "QuestionError",
    "ReviewError",
    "Task",
    "TaskError",
    "TrainError",
    "__version__",
]
