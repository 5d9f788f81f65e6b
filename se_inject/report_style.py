"""Report, the style: charts in the colours of the page that they stand on, or as pictures in colours of their own.

Takes drawings of Altair's, gives Vega-Lite specifications, the code that draws them in a browser, and files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from se_inject.errors import OptionError
from se_inject.files import write_whole

INK = "currentColor"
"""Of text and lines: that of the text around a chart."""
LINES = (INK, "var(--line-1)", "var(--line-2)", "var(--line-3)", "var(--line-4)", "var(--line-5)")
"""Of all images, and of a class each."""
ACCENT, SOFT, FAINT = "var(--accent)", "var(--soft)", "var(--faint)"
WIDTH = 560
"""Of a picture's chart, in pixels of the screen."""
_SCALE = 2
"""Pixels of a picture to one of the screen."""
_PRINTED = {
    INK: "#1b1f24", LINES[1]: "#0b62a8", LINES[2]: "#c2410c", LINES[3]: "#0f8a6d", LINES[4]: "#9333a8",
    LINES[5]: "#8a6a00", ACCENT: "#0b62a8", SOFT: "#a9c4de", FAINT: "#c9ccd1",
}  # fmt: skip
_CONFIG = {
    "background": "transparent",
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": INK, "titleColor": INK, "gridColor": INK, "domainColor": INK, "tickColor": INK,
        "gridOpacity": 0.12, "domainOpacity": 0.4, "tickOpacity": 0.4, "labelFontSize": 11, "titleFontSize": 11,
        "titleFontWeight": "normal", "tickSize": 4, "labelFlush": False,
    },
    "legend": {
        "labelColor": INK, "titleColor": INK, "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal",
        "labelLimit": 220,
    },
    "title": {"color": INK, "fontSize": 12, "fontWeight": 600, "anchor": "start"},
}  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """A chart of the page.

    Attributes:
        name: As the page and the file of a picture call it.
        alt: What it shows, for those who do not see it.
        drawing: Of Altair's.
    """

    name: str
    alt: str
    drawing: Any

    def to_spec(self) -> dict[str, Any]:
        """Write as a Vega-Lite specification, as wide as the page lets it be."""
        drawing = self.drawing.properties(width="container", autosize={"type": "fit-x", "contains": "padding"})
        spec: dict[str, Any] = drawing.properties(description=self.alt).configure(**_CONFIG).to_dict()
        return spec


def import_altair() -> Any:
    """Import Altair, and see that what goes with it is there: they are an extra.

    Raises:
        OptionError: They are not installed.
    """
    try:
        import altair  # noqa: PLC0415
        import jinja2  # noqa: F401, PLC0415
        import vl_convert  # noqa: F401, PLC0415
    except ImportError as error:
        raise OptionError(f"a report needs {error.name}: pip install 'se-inject[report]'") from error
    return altair


def make_bundle() -> str:
    """Make the code that draws charts in a browser: Vega, Vega-Lite and Vega-Embed."""
    version = _get_version()
    import vl_convert  # noqa: PLC0415

    bundle: str = vl_convert.javascript_bundle(vl_version=version)  # type: ignore[call-arg]  # the snippet has a default
    # Within a string too, this would end a script of HTML.
    return bundle.replace("</script", "<\\/script")


def write_picture(drawing: Any, path: Path) -> None:
    """Write a drawing as pixels and as vectors, in colours for paper.

    Args:
        drawing: Of Altair's, with a width.
        path: Without suffix; `.png` and `.svg` are written.

    Raises:
        ArtifactError: The files cannot be written.
    """
    version = _get_version()
    import vl_convert  # noqa: PLC0415

    values = drawing.configure(**{**_CONFIG, "background": "white"}).to_dict()
    spec = json.dumps(values, ensure_ascii=False).encode(errors="replace").decode()  # of names that are no UTF-8
    for name, colour in _PRINTED.items():
        spec = spec.replace(f'"{name}"', f'"{colour}"')
    pixels = vl_convert.vegalite_to_png(spec, vl_version=version, scale=_SCALE)
    vectors = vl_convert.vegalite_to_svg(spec, vl_version=version).encode()
    write_whole(path.with_name(f"{path.name}.png"), lambda file: file.write(pixels))
    write_whole(path.with_name(f"{path.name}.svg"), lambda file: file.write(vectors))


def _get_version() -> str:
    """Return the version of Vega-Lite that Altair writes, as the converter wants it."""
    return "_".join(import_altair().SCHEMA_VERSION.split(".")[:2])
