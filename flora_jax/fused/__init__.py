"""The fused route: gradients compressed inside the backward pass, and never materialized.

`value_and_grad.py` is the function that users call. It traces the loss to a jaxpr, and `interpreter.py`
evaluates that jaxpr with each compressed weight replaced by a `Weight` (`weight.py`). `rules/` says what
each JAX primitive does with one. `lazy.py` has arrays that are computed where they are used, and
`leaves.py` sorts the leaves of pytrees.
"""
