"""Scores and real cost over a data set.

scores.py counts; test_time.py looks at an image several times, windows.py says where; boundary.py has boundary IoU;
submission.py writes the files that the benchmarks take; machine.py says what a result file was measured on.

The public names and their homes: `__init__.pyi`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
