"""kdlib: the code that the chapters of *Knowledge Distillation, Measured* share.

data         data sets, splits and views             soft_labels  the teacher's answers, saved or live
models       the networks, and running them          evaluate     accuracy, calibration, agreement, latency
losses       the distillation loss                   plots        every figure and table of the book
train        one loop for everybody                  profiles     quick and full: data set, networks, recipes
fused        batch norm and ReLU in one operation  experiments  measurements that resume, claims that they decide
artefacts    saving, and using again only what fits
"""

from kdlib.data import load_data
from kdlib.losses import CrossEntropy, Distillation, distillation_loss
from kdlib.models import build, count_parameters, predict_logits
from kdlib.profiles import resolve
from kdlib.soft_labels import LiveTeacher, SoftLabels, load_or_generate, load_published
from kdlib.train import Recipe, load_or_train, train

__all__ = [
    "CrossEntropy",
    "Distillation",
    "LiveTeacher",
    "Recipe",
    "SoftLabels",
    "build",
    "count_parameters",
    "distillation_loss",
    "load_data",
    "load_or_generate",
    "load_or_train",
    "load_published",
    "predict_logits",
    "resolve",
    "train",
]
