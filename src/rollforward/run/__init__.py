"""What joins the rest: configuration, wiring, recovery, launching, metrics and progress."""
