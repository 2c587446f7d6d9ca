"""A budget: as people ask for it (asked.py), as a forward keeps it (budgeted.py), what it comes down to
(calibration.py), what choosing is worth (worth.py), and frame times that hold (pacing.py)."""
