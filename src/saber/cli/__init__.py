"""The command line: reads arguments, calls the library, draws with rich."""
