"""A finished run, sweep or audit as a page to look through; of a run, the model before and after."""

from saber.ui.page import build_page
from saber.ui.serve import Served, serve
from saber.ui.talk import Talk

__all__ = ["Served", "Talk", "build_page", "serve"]
