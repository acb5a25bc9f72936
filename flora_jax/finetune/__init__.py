"""Trains a checkpoint on a file of the user's texts."""
