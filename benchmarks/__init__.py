"""Timings of ours beside others', taken turn by turn in one process."""
