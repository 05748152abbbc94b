"""What the image and the page draw alike."""

from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter, LogLocator


def log_scale(axes: Axes) -> None:
    """A logarithmic y axis of plain numbers: powers need mathematical text, which labels here do not have."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.4)))
