"""HTML and SVG as text, for pages that need no script: tags that escape, tables, line charts."""

import html
import math
from collections.abc import Iterable, Sequence
from statistics import fmean

WIDTH, HEIGHT = 680, 340  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 62, 28, 34, 52  # its margins
MOST_POINTS = 400  # of a line


class Html(str):
    """Markup. Every other string is text, and escaped when it becomes part of a page."""


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element. `class_` is the attribute class, `aria_label` is aria-label, None is left out."""
    given = ((key.strip("_").replace("_", "-"), value) for key, value in attributes.items())
    shown = "".join(f' {key}="{html.escape(str(v))}"' for key, v in given if v is not None)
    return Html(f"<{name}{shown}>{together(*children)}</{name}>")


def together(*children: object) -> Html:
    """One after another."""
    return Html("".join(c if isinstance(c, Html) else html.escape(str(c)) for c in children))


def section(title: str, *children: object) -> Html:
    """A part of the page, under its heading."""
    return tag("section", tag("h2", title), *children)


def quiet(*children: object) -> Html:
    """A paragraph that explains."""
    return tag("p", *children, class_="quiet")


def facts(pairs: Iterable[tuple[str, object]]) -> Html:
    """Names and values."""
    items = (tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs)
    return tag("dl", *items, class_="facts")


def table(caption: str, head: Sequence[object], rows: Iterable[Sequence[object]]) -> Html:
    """A table whose first column names its rows. A wide one can be scrolled, with the keyboard too.

    A cell is text, or an element `td` that `cell` has made.
    """
    body = []
    for first, *rest in rows:
        cells = (
            c if str(c).startswith("<td") and isinstance(c, Html) else tag("td", c) for c in rest
        )
        body.append(tag("tr", tag("th", first, scope="row"), *cells))
    columns = (tag("th", name, scope="col") for name in head)
    content = tag(
        "table", tag("caption", caption), tag("thead", tag("tr", *columns)), tag("tbody", *body)
    )
    return tag("div", content, class_="scroll", tabindex=0, role="region", aria_label=caption)


def cell(*children: object, share: float | None = None, **attributes: object) -> Html:
    """A cell of a table; the larger `share`, of 0 to 1, the stronger its colour."""
    style = None if share is None else f"--share: {share:.2f}"
    return tag("td", *children, style=style, **attributes)


def details(summary: str, *children: object) -> Html:
    """What is shown when it is asked for."""
    return tag("details", tag("summary", summary), *children)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers in a range: multiples of 1, 2 or 5 times a power of ten."""
    power = 10 ** math.floor(math.log10((high - low) / most))
    step = next(k * power for k in (1, 2, 5, 10) if (high - low) / (k * power) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten in a range; of more than three powers, these alone."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    multiples = (1, 2, 5) if high / low <= 1000 else (1,)
    values = (round(k * 10.0**power, 10) for power in powers for k in multiples)
    return [value for value in values if low <= value <= high]


def thinned(xs: Sequence[float], ys: Sequence[float], most: int) -> tuple[list, list]:
    """Fewer points, `most` of them or less: the means of blocks of neighbours."""
    size = -(-len(xs) // most)
    blocks = [slice(i, i + size) for i in range(0, len(xs), size or 1)]
    return tuple([sum(v[b]) / len(v[b]) for b in blocks] for v in (list(xs), list(ys)))


def smoothed(xs: list[float], ys: list[float], width: int = 5) -> tuple[list, list]:
    """Each value becomes the mean of it and its neighbours on both sides."""
    return xs, [fmean(ys[max(0, i - width) : i + width + 1]) for i in range(len(ys))]


class Chart:
    """A chart in SVG. It scales with the page, and takes its colours from the page's style."""

    def __init__(
        self,
        title: str,
        x: tuple[float, float],
        y: tuple[float, float],
        x_label: str,
        y_label: str,
        x_format: str = "{:g}",
        y_format: str = "{:g}",
        log_x: bool = False,
    ):
        """`title` says in words what is to be seen, for those who cannot see it."""
        self.x, self.y, self.title, self.log_x = x, y, title, log_x
        self.parts, self.legend = [], []
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        for value in ticks(*y):
            at = self.down(value)
            self._line((LEFT, at), (right, at), "grid")
            self._text(LEFT - 8, at + 4, y_format.format(value), "end")
        for value in log_ticks(*x) if log_x else ticks(*x):
            self._line((self.across(value), bottom), (self.across(value), bottom + 5), "axis")
            self._text(self.across(value), bottom + 22, x_format.format(value), "middle")
        self._line((LEFT, bottom), (right, bottom), "axis")
        self._text(right, HEIGHT - 6, x_label, "end")
        self._text(4, 16, y_label, "start")

    def across(self, x: float) -> float:
        """From a value to a place."""
        low, x, high = (math.log(v) if self.log_x else v for v in (self.x[0], x, self.x[1]))
        return LEFT + (x - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def down(self, y: float) -> float:
        """From a value to a place."""
        share = (y - self.y[0]) / (self.y[1] - self.y[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    def line(self, xs: Sequence[float], ys: Sequence[float], kind: str, name: str = "") -> None:
        """A line through the points in range; `kind` is a class of the page's style."""
        inside = [(x, y) for x, y in zip(xs, ys, strict=True) if self.x[0] <= x <= self.x[1]]
        xs, ys = thinned(*zip(*inside, strict=True), MOST_POINTS) if inside else ([], [])
        places = (f"{self.across(x):.1f},{self.down(y):.1f}" for x, y in zip(xs, ys, strict=True))
        self.parts.append(tag("polyline", points=" ".join(places), class_=kind))
        self._name(kind, name)

    def dots(self, xs: Sequence[float], ys: Sequence[float], kind: str, name: str = "") -> None:
        """A dot at each point."""
        for x, y in zip(xs, ys, strict=True):
            at = {"cx": f"{self.across(x):.1f}", "cy": f"{self.down(y):.1f}", "r": 4}
            self.parts.append(tag("circle", class_=f"dot {kind}", **at))
        self._name(f"dot {kind}", name)

    def rule(self, y: float, text: str, kind: str = "rule") -> None:
        """A line across, with its name above it."""
        self._line((LEFT, self.down(y)), (WIDTH - RIGHT, self.down(y)), kind)
        self._text(WIDTH - RIGHT, self.down(y) - 6, text, "end")

    def band(self, first: float, last: float) -> None:
        """A range of x, shaded."""
        place = {"x": f"{self.across(first):.1f}", "y": TOP, "height": HEIGHT - BOTTOM - TOP}
        width = f"{max(2.0, self.across(last) - self.across(first)):.1f}"
        self.parts.append(tag("rect", width=width, class_="band", **place))

    def draw(self) -> Html:
        """The chart, and under it what its lines are."""
        box = {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria_label": self.title}
        picture = tag("svg", *self.parts, **box)
        names = [
            tag("li", tag("svg", mark, viewBox="0 0 28 12", aria_hidden="true"), name)
            for mark, name in self.legend
        ]
        return tag("figure", picture, tag("ul", *names, class_="legend") if names else "")

    def _name(self, kind: str, name: str) -> None:
        if name and "dot" in kind.split():
            self.legend.append((tag("circle", cx=14, cy=6, r=4, class_=kind), name))
        elif name:
            self.legend.append((tag("polyline", points="2,6 26,6", class_=kind), name))

    def _line(self, start: tuple[float, float], end: tuple[float, float], kind: str) -> None:
        (x1, y1), (x2, y2) = start, end
        place = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
        self.parts.append(tag("line", class_=kind, **place))

    def _text(self, x: float, y: float, text: str, anchor: str) -> None:
        place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text_anchor": anchor}
        self.parts.append(tag("text", text, **place))
