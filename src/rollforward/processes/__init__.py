"""A run's processes: launching, supervising and stopping them, and noticing when they stall."""
