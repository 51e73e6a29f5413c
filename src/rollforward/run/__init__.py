"""What ties the rest together: configuration, wiring, recovery, launching, metrics and progress."""
