"""Fine-tuning: a checkpoint and a file of texts become a trained checkpoint, `flora-jax finetune`."""
