"""What computes. `base` is the door: what a run asks of an engine, and how one is found by its name.

Each folder beside it is an engine, and the only room that knows its framework.
"""
