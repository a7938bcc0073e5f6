"""Exports a trained run."""
