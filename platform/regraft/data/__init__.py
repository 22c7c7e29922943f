"""Data: chat files, dataset versions, checks, and the capture store."""
