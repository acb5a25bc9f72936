"""Experiments with flora_jax; `python3 -m experiments` sets itself up and runs the main one."""
