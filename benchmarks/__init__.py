"""Benchmarks: speed, coding, training recipes, fine-tuning, and the figures of papers redrawn."""
