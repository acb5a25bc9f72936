"""Models, in Flax Linen."""
