"""One file from data: HTML with everything in it, nothing to load.

The chart library and the data are packed (gzip, base64), so that the file is small and nothing in the data
can be taken for markup: base64 has no `<`. The scripts that may run are named by their SHA-256 in a content
security policy: ours, and the library's, which our script unpacks. No other script runs, and no address is
loaded, except the server's own by a page that follows a run.
"""

import base64
import gzip
import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from rollforward.errors import ConfigError
from rollforward.inputs import open_input, read_input
from rollforward.inspection.report.gathering import encode
from rollforward.storage import LocalStorage
from rollforward.storage.failures import storage_error

MARK = b"<!doctype html>\n<!-- made by rollforward report -->\n"
"""What every page begins with."""
LANGUAGES = ("en", "zh")
_SCRIPTS = ("page.js", "curves.js", "timeline.js", "rollouts.js", "health.js", "main.js")
_LIBRARY = "package_data/plotly.min.js"
_MOST_BYTES = 32 << 20


def language_of(environment: Mapping[str, str]) -> str:
    """The language of the user's locale, as programs find it; English where there is no page in it."""
    locale = next(filter(None, (environment.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))), "")
    return next((language for language in LANGUAGES if locale.startswith(language)), LANGUAGES[0])


def make_page(data: dict[str, Any], *, language: str, live: bool) -> bytes:
    """The page. `live`: it asks the server that it came from what is new."""
    texts = json.loads(_file("texts.json"))[language]
    whole = data | {"language": language, "texts": texts, "live": live}
    page = Template(_file("page.html")).substitute(
        language={"en": "en", "zh": "zh-Hans"}[language],
        title=texts["title"],
        policy=policy(live=live),
        style=_file("style.css"),
        needs_script=texts["needs_script"],
        kept_out=_kept_out(),
        library=_packed_library(),
        data=_packed(encode(whole)),
        script=_script(),
    )
    return MARK + page.encode()


def write_page(path: Path, page: bytes) -> None:
    """Write a page, durably, in place of an earlier one; ConfigError when something else has the name."""
    try:
        with open_input(path) as file:
            there = file.read(len(MARK))
    except FileNotFoundError:
        there = MARK
    except OSError:
        there = b""
    if there != MARK:
        raise ConfigError(
            f"{path} is there already, and is not a report", hint="name another file with --out"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error("making the folder of", str(path), error) from error
    LocalStorage(path.parent).write(path.name, [page])


@cache
def policy(*, live: bool) -> str:
    """The content security policy of a page."""
    # Plotly makes one empty style element, and fills it by script.
    styles = f"{_named(_file('style.css'))} {_named('')}"
    asked = "'self'" if live else "'none'"
    return (
        f"default-src 'none'; script-src {_named(_script())} {_named(_library())}; style-src {styles}; "
        f"connect-src {asked}; base-uri 'none'; form-action 'none'"
    )


@cache
def _script() -> str:
    return "\n".join(_file(name) for name in _SCRIPTS)


@cache
def _file(name: str) -> str:
    """One of the files beside this one."""
    folder = resources.files("rollforward.inspection.report") / "page"
    return read_input(str(folder / name), _MOST_BYTES).decode()


@cache
def _library() -> str:
    """Plotly's JavaScript, out of its Python package, which is not imported."""
    found = importlib.util.find_spec("plotly")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("the charts of a report need plotly: pip install 'rollforward[report]'")
    return read_input(Path(found.submodule_search_locations[0]) / _LIBRARY, _MOST_BYTES).decode()


@cache
def _kept_out() -> str:
    """Elements named like the style elements that the library would make for its maps, which no chart needs.

    It makes none that is there already, and the policy would refuse it.
    """
    names = re.findall(r'document\.getElementById\("([0-9a-f]{32,})"\)', _library())
    return "".join(f'<span hidden id="{name}"></span>' for name in names)


@cache
def _packed_library() -> str:
    return _packed(_library().encode())


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode()


def _named(text: str) -> str:
    """A script or a style as a content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
