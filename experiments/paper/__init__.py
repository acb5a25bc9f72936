"""The paper's experiments: one small file a table, over one training loop (`loop`)."""
