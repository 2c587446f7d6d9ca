from .machine import machine_facts as machine_facts
from .scores import Evaluation as Evaluation
from .scores import evaluate as evaluate
from .test_time import Forward as Forward
from .test_time import MultiPass as MultiPass
