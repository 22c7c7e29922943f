"""Engines: what turns token ids into an answer, behind one small interface."""
