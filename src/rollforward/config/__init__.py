"""The configuration: keys and their meaning, read from YAML and the command line."""
