"""A model is adapted by LoRA, its variants, Flora, or in full: `python -m experiments.adapt`."""
