"""Updates of the parameters leaf by leaf, without a tree of updates as large as the parameters.

`train_step.py` makes a compiled training step of it, and `apply_gradients.py` is the update itself. It
traces the optimizer to a list of operations (`program.py`), and evaluates those of a stacked weight
slice by slice (`slices.py`).
"""
