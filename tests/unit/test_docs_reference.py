"""The references that are generated are what the program says of itself.

python tests/unit/test_docs_reference.py     writes them anew
"""

from pathlib import Path

import pytest

from rollforward.cli.reference import command_line_page, configuration_page

DOCS = Path(__file__).resolve().parents[2] / "docs" / "reference"
PAGES = {"cli.md": command_line_page, "config.md": configuration_page}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_not_stale(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name](), f"run python {__file__}"


if __name__ == "__main__":
    for page, generate in PAGES.items():
        (DOCS / page).write_text(generate(), encoding="utf-8")
