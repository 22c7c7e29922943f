"""The command line and one entry point a stage: what a person or a scheduler runs."""
