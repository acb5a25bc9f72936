"""Tasks: real data that comes with Python packages, or the paper's; tokens, batches, scores."""
