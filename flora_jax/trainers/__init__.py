"""Trainers: what the loops and trainers that people run need, one file for each."""
