"""A finished run as plots, a page and a model card; reads run.json and never opens a model."""

from saber.report.audit_page import build_audit, is_audit, read_audit
from saber.report.build import ANSWERS, Report, build, read_answers, read_run, write_answers
from saber.report.card import model_card
from saber.report.html import html_report
from saber.report.plots import PLOTS
from saber.report.sweep_card import build_sweep, is_sweep, read_sweep

__all__ = [
    "ANSWERS",
    "PLOTS",
    "Report",
    "build",
    "build_audit",
    "build_sweep",
    "html_report",
    "is_audit",
    "is_sweep",
    "model_card",
    "read_answers",
    "read_audit",
    "read_run",
    "read_sweep",
    "write_answers",
]
