"""Self-contained HTML pages: one style, one place that escapes, pictures as vectors.

A page is a template that extends ``page.html`` and fills its blocks ``title`` and ``body``. Tables stand in a
``<div class="wide">``, which scrolls by itself on a narrow screen.
"""

import re
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from io import BytesIO, StringIO
from typing import TYPE_CHECKING, Any

from fusion_plugins.escape import for_html, for_plot, for_terminal

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

#: name of a page in the folder that it is about
PAGE_NAME = "fusion_report.html"

#: colours that most kinds of colour blindness tell apart (Okabe and Ito), the first ones also in grey
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999")

#: larger numbers are drawn in units of this: matplotlib adds and subtracts them, and the sums must be floats
LARGEST_DRAWN = 1e300


def render_page(template: str, values: Mapping[str, Any]) -> str:
    """Return a page.

    Args:
        template: name of a file in ``fusion_plugins/templates``.
        values: what the template names. Every text among them is data; :func:`svg` makes the exception.

    Raises:
        ModuleNotFoundError: jinja2 is not installed.
    """
    return _environment().get_template(template).render(values)


def render_part(template: str, values: Mapping[str, Any]) -> Any:
    """Return a part of a page, as markup that a template takes as it is; see :func:`render_page`.

    Args:
        template: name of a file in ``fusion_plugins/templates`` that is no whole page.
        values: what the template names.
    """
    from markupsafe import Markup

    return Markup(_environment().get_template(template).render(values))


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def shown(value: Any) -> Any:
        # Control characters and halves of surrogate pairs can stand in no page.
        return value if isinstance(value, Markup | int | float) else for_terminal(value)

    return Environment(
        loader=PackageLoader("fusion_plugins"), autoescape=True, finalize=shown, undefined=StrictUndefined
    )


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty matplotlib figure of that many inches, with the colours of the pages.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    # Figure and canvas are made directly: pyplot would choose a backend and keep every figure alive.
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    FigureCanvasSVG(figure)
    return figure


def png(figure: "Figure") -> bytes:
    """Return the figure as a PNG, on a white ground.

    Args:
        figure: what :func:`new_figure` made.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    figure.patch.set_alpha(1)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def svg_file(figure: "Figure", salt: str, *, transparent: bool = False) -> str:
    """Return the figure as an SVG file, the same from run to run; its letters stay letters.

    Args:
        figure: what :func:`new_figure` made.
        salt: keeps the names of parts apart from those of another picture in the same page.
        transparent: leave out the ground.
    """
    import matplotlib

    buffer = StringIO()
    with (
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": for_terminal(salt)}),
        warnings.catch_warnings(),
    ):
        # The reader's fonts draw the letters, so it does not matter that matplotlib's own lacks some.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=transparent)
    return buffer.getvalue()


def svg(figure: "Figure", label: str) -> Any:
    """Return the figure as an SVG element that is safe to put into a page.

    Letters stay letters, in the page's own fonts and in its colour, so that dark pages and all scripts work.

    Args:
        figure: what :func:`new_figure` made.
        label: what the picture shows, for people who do not see it.
    """
    from markupsafe import Markup

    element = svg_file(figure, label, transparent=True).partition("<svg ")[2]
    # The page sets the size, and what is black by default takes the colour of its text.
    element = re.sub(r' (?:width|height)="[\d.]+pt"', "", element, count=2).replace("#000000", "currentColor")
    # The page has a shade of each colour for light and one for dark ground.
    for number, colour in enumerate(COLOURS):
        element = element.replace(colour, f"var(--colour-{number})")
    # Inside a page neither the namespaces nor the description of the file mean anything.
    element = re.sub(r'xmlns(?::xlink)?="[^"]*" ?|<metadata>.*?</metadata>', "", element, flags=re.DOTALL)
    # Groups of several pictures have the same names, which nothing refers to.
    element = re.sub(r'<g id="[^"]*"', "<g", element)
    width = f"width: 100%; max-width: {figure.get_figwidth() * 96:.0f}px"
    opening, _, inside = element.partition(">")
    named = f'role="img" aria-label="{for_html(label)}" style="{width}"'
    return Markup(f"<svg {named} {opening}><title>{for_html(label)}</title>{inside}")


def plot_unit(values: Iterable[float]) -> tuple[float, str]:
    """Return what finite values are divided by to be drawn, and what the axis says about it.

    Example:
        >>> plot_unit([0.1, 1e9]), plot_unit([-1e308])
        ((1.0, ''), (1e+300, ' / 1e300'))
    """
    beyond = any(abs(value) > LARGEST_DRAWN for value in values)
    return (LARGEST_DRAWN, f" / {LARGEST_DRAWN:.0e}".replace("+", "")) if beyond else (1.0, "")


def bin_edges(values: Iterable[float], bins: int = 40) -> list[float]:
    """Return the edges of equally wide bins that hold all values, also where they are all but equal.

    Args:
        values: at least one, none beyond :data:`LARGEST_DRAWN`.
        bins: their number.
    """
    low, high = min(values := list(values)), max(values)
    size = max(abs(low), abs(high), 1 / LARGEST_DRAWN)
    if high - low < size * 1e-9:  # no bins are so narrow
        low, high = low - size / 20, high + size / 20
    return [low + (high - low) * (place / bins) for place in range(bins)] + [high]


def plot_name(name: object, limit: int = 40) -> str:
    """Return a name for an axis or a legend: at most ``limit`` characters, its end kept."""
    text = str(name)
    return for_plot(text if len(text) <= limit else "…" + text[1 - limit :])
