"""How sketches and states are sharded over devices.

`state.py` derives the shardings of an optimizer's state from those of the params, by the rule in
`partition.py`. `explicit.py` is for meshes with explicit axes, and `manual.py` for the inside of
`jax.shard_map`.
"""
