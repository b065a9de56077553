"""Imported by the server of worker processes before all else: Ctrl-C ends it, and them, without a word.

A terminal sends it to every process; the driver is the one that says so.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
