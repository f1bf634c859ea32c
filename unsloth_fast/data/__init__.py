"""From documents to batches: what happens to a data set before it reaches the model."""
