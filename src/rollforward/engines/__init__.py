"""What computes. `base` is the interface: what a run needs from an engine, and how one is found by name.

Each folder beside it is an engine, and the only place that knows its framework.
"""
