"""GRPO in plain Python and NumPy. No framework, no files."""
