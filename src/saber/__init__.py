"""SABER: find, measure and edit the residual-stream directions that carry a behaviour."""

__version__ = "0.1.0"
