"""Phrases and errors that several rooms need."""

from __future__ import annotations

DIVERGED = "the outputs hold NaN or infinite values: the network that made them has diverged"
NOT_FINITE = "the images contain NaN or infinite values: give RGB, uint8 or float in 0..1"


class NotExportable(ValueError):
    """A part of a network has no export."""
