"""What computes: one package for each framework, behind `grpo.ports.Engine`."""
