"""Ray clusters and their jobs: start or join one; submit, follow and cancel jobs."""
