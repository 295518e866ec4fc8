"""The page as HTML. Everything that it shows is data: text of a model can neither be markup nor run.

The data stand as JSON in an element that is no script; the browser runs only the one script whose hash the page's own
policy names, which writes text and never HTML.
"""

import base64
import hashlib
import html
import json
import math
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = ("charts.js", "answers.js", "page.js")
STYLE = "page.css"


def render(content: Mapping[str, object], *, title: str) -> str:
    """The whole file."""
    script = "'use strict';\n" + "".join((HERE / name).read_text() for name in SCRIPTS)
    style = (HERE / STYLE).read_text()
    policy = f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        "<noscript>This report needs JavaScript, which is in this file.</noscript>\n"
        f'<script type="application/json" id="content">{_json(content)}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _json(content: object) -> str:
    """JSON that ends no element: `<` is written as an escape. A number that is not finite is null."""
    return json.dumps(_finite(content), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _finite(of_key) for key, of_key in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
