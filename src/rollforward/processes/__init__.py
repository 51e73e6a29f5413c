"""Processes of a run: launched, supervised, told to end, and noticed when they are late."""
