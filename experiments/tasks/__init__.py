"""Tasks have real data, which come with Python packages or are the paper's, tokens, batches and scores."""
