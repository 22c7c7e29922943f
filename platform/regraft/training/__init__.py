"""Training: batches and one loop in plain torch, and the adapter that runs it on Ray Train."""
