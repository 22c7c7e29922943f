"""Watching what the endpoint answers: windows, detectors, reports and the policy."""
