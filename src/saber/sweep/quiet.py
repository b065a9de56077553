"""Imported by the server of worker processes before all else: Ctrl-C ends it, and them, without a word.

A terminal sends it to every process; the driver is the one that says so. Where the driver ignores it, as
one in the background of a script does, they do too.
"""

import signal


def end_without_a_word() -> None:
    """Let Ctrl-C end this process, unless it is ignored here."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


end_without_a_word()
if hasattr(signal, "pthread_sigmask"):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
