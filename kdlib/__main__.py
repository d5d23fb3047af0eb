"""``python -m kdlib train``, ``export student_cnn.pth student.onnx`` and ``predict student.onnx picture.png``."""

import sys

from kdlib.deploy.cli import main

sys.exit(main())
