"""The configuration: keys and their meanings, read from YAML and the command line."""
