"""Data sets by their layout: one file each."""
