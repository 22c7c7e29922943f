"""Sweeps: Ray Tune over methods and their settings."""
