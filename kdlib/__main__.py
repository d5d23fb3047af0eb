"""``python -m kdlib export student_cnn.pth student.onnx`` and ``python -m kdlib predict student.onnx picture.png``."""

import sys

from kdlib.deploy.cli import main

sys.exit(main())
