"""The time of a training that is given minutes: it ends when they have passed, however fast the machine is.

The schedule follows the time: how far a training is, is the share of its time for steps that has passed, so that the
learning rate has decayed when that is over. What comes behind the last step (a validation, the report) is estimated in
units of a step's time: a machine that gets slower keeps more time for it. Each validation renews the estimate.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any, TypeVar

now = time.monotonic
T = TypeVar("T")
TINY = 1e-9  # seconds
RECENT, KNOWN = 40, 4  # the time of a step comes from so many; what was measured beforehand counts as so many
LATELY = 5  # steps, that a validation is compared with
SLOW = 0.8  # the share of them that was faster: what is kept for the end must do on a machine that other work comes to
VALIDATING = 0.3  # at most this share of the time that is left goes to validations before the last one
KEPT = 0.4  # at most this share of all time is kept for validations and the end: a machine that is slow for a moment
# would otherwise seem to need all of it, and the steps would end there
FOLLOWED = ("share", "total_s", "step_s", "validation_steps", "rest_steps", "validations", "due", "looks")


class Clock:
    """From the start of a command on; the processes of a job follow the clock of the first one.

    total_s           seconds for all of it
    share             of the time for steps that has passed, 0..1
    step_s            seconds of a step: one of the slower ones of the last
    validation_steps  what a validation takes, in steps; rest_steps: what comes behind the last one
    validations       how many are to come, the last one included
    due               the share at which the next one comes
    looks             the share of its images that a validation looks at, so that it fits in
    """

    def __init__(self, total_s: float = 0.0) -> None:
        self.total_s, self.started = total_s, now()
        self.share = self.step_s = self.validation_steps = self.rest_steps = self.due = 0.0
        self.validations, self.looks = 1, 1.0
        self._took: list[float] = []
        self.last_s = 0.0  # when the share was last brought up to date, since the start

    def given(self, total_s: float) -> Clock:
        """The clock, with so many seconds."""
        self.total_s = total_s
        return self

    @property
    def spent_s(self) -> float:
        """Seconds since the start, by the clock of the first process."""
        return of_first(now() - self.started)

    def plan(self, step_s: float, validation_s: float, rest_s: float, validations: int) -> None:
        """Before the first step: what a step and a validation take, and what comes behind the last one, in seconds; at
        most so many validations."""
        self.step_s, self.validations = max(step_s, TINY), validations
        self.validation_steps, self.rest_steps = validation_s / self.step_s, rest_s / self.step_s
        self._divide(self.spent_s)

    def left_s(self, spent_s: float) -> float:
        """Seconds that are left for steps."""
        reserved = (self.validations * self.validation_steps + self.rest_steps) * self.step_s
        return self.total_s - spent_s - min(reserved, KEPT * self.total_s)

    def begin(self) -> None:
        """Before the first step of a run, or of the rest of one. The processes of a job take over the plan of the first
        one, which measured it."""
        self._follow(of_first(self.state_dict()))
        self.last_s = self.spent_s

    def tick(self) -> None:
        """After a step."""
        spent = self.spent_s
        took, left = spent - self.last_s, self.left_s(self.last_s)
        self.share = 1.0 if took >= left else self.share + (1 - self.share) * took / left
        self._took = [*self._took, took][-RECENT:] if self._took else [self.step_s] * KNOWN + [took]
        self.step_s = max(sorted(self._took)[int(SLOW * (len(self._took) - 1))], TINY)
        self.last_s = spent
        self._drop(spent)

    @property
    def over(self) -> bool:
        """Whether the last tick was that of the last step: no other one fits in."""
        return self.share >= 1 or self.left_s(self.last_s) < self.step_s

    @property
    def validates(self) -> bool:
        """Whether a validation is due."""
        return self.over or (self.validations > 1 and self.share >= self.due)

    def validated(self) -> None:
        """After a validation, whose time is no time for steps."""
        spent = self.spent_s
        lately = statistics.median(self._took[-LATELY:] or [self.step_s])  # steps beside the same other work
        self.validation_steps = (spent - self.last_s) / max(lately, TINY)
        self.validations, self.last_s = max(1, self.validations - 1), spent
        self._divide(spent)

    def _divide(self, spent_s: float) -> None:
        """Sets when the next validation comes."""
        self._drop(spent_s)
        self.due = self.share + (1 - self.share) / self.validations

    def _drop(self, spent_s: float) -> None:
        """Leaves out validations for which there is no time, but for the last one: those that are left come later."""
        left = VALIDATING * (self.total_s - spent_s)
        while self.validations > 1 and (self.validations - 1) * self.validation_steps * self.step_s > left:
            self.validations -= 1
            self.due = self.share + (1 - self.share) / self.validations

    def steps(self, done: int) -> int:
        """How many steps there will be, at this pace."""
        return done if self.over else done + max(1, round(self.left_s(self.last_s) / self.step_s))

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FOLLOWED} | {"spent_s": now() - self.started}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Clock:
        """The clock of a run that goes on, after the time that it had before."""
        clock = cls(state["total_s"])
        clock.started -= state["spent_s"]
        clock.last_s = state["spent_s"]
        clock._follow(state)
        return clock

    def _follow(self, state: dict[str, Any]) -> None:
        for name in FOLLOWED:
            setattr(self, name, state[name])


def of_first(value: T) -> T:
    """What the first process of a job has. One alone does without PyTorch, for a command starts its clock first."""
    if "torch" not in sys.modules:
        return value

    from routeseg.collectives import gather, rank_and_world

    return gather(value)[0] if rank_and_world()[1] > 1 else value
