"""Scores and real cost over a data set.

scores.py counts; test_time.py looks at a picture several times; boundary.py has boundary IoU; submission.py writes the
files that the benchmarks take.
"""

from routeseg.evaluation.scores import Evaluation, evaluate, machine_facts
from routeseg.evaluation.test_time import Forward, MultiPass

__all__ = ["Evaluation", "Forward", "MultiPass", "evaluate", "machine_facts"]
