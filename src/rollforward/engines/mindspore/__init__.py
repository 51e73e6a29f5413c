"""The engine on MindSpore's graph mode. Importing this package alone does not load the framework."""
