"""Edit plans to files."""

from saber.checkpoint.merged import save_merged

__all__ = ["save_merged"]
