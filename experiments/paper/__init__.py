"""The paper's experiments: each table is one small file, and all share one training loop (`loop`)."""
