"""Sweeps: strategies × options × orders × seeds, their choices on validation rows, and what came out."""
