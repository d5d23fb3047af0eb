"""kdlib: the code that the chapters of *Knowledge Distillation, Measured* share. Read it in this order:

data         images, views, batches, augmentation    soft_labels  the teacher's logits, saved or live
datasets     where images come from                  profiles     quick, laptop, full: data, networks, recipes
models       the networks                            published    what the repository holds, without a teacher
losses       the distillation loss                   plots        every figure and table of the book
evaluate     logits, accuracy, calibration, latency
train        one loop for everybody

sources/ reads files and folders of images and splits them; records/ saves what was computed and uses it again only if
it is what is wanted; gpu/ makes it fast, and changes no result beyond rounding; checks/ looks for mistakes before
a long training; lab/ is part two's bench, deploy/ makes ONNX files, and scale/ leaves one machine's memory: nothing
here needs these three.
"""

from kdlib.checks.preflight import preflight
from kdlib.datasets import from_dataset, load_data
from kdlib.evaluate import predict_logits
from kdlib.losses import distillation_loss, distillation_terms
from kdlib.models import build, count_parameters
from kdlib.profiles import notebook_settings, resolve
from kdlib.published import Network, load_published, load_student, load_teacher, measured
from kdlib.soft_labels import LiveTeacher, SoftLabels, generate, load_or_generate
from kdlib.sources.teachers import adapt_teacher
from kdlib.train import Recipe, load_or_train, train

# Raised by hand if a change alters what a GPU computes; pages that one computed under another number are stale.
NUMERICS = 1

__all__ = [
    "NUMERICS",
    "LiveTeacher",
    "Network",
    "Recipe",
    "SoftLabels",
    "adapt_teacher",
    "build",
    "count_parameters",
    "distillation_loss",
    "distillation_terms",
    "from_dataset",
    "generate",
    "load_data",
    "load_or_generate",
    "load_or_train",
    "load_published",
    "load_student",
    "load_teacher",
    "measured",
    "notebook_settings",
    "predict_logits",
    "preflight",
    "resolve",
    "train",
]
