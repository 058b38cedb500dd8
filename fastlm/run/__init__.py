"""The trainer's own: command line, directory, signals, log, plot, summary."""
