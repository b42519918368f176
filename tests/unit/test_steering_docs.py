"""`docs/pipeline.md` tells the tables and flows that the code really has."""

from __future__ import annotations

from tests.support.pipeline_doc import PAGE, render_page


def test_the_page_is_as_the_code_is() -> None:
    text = PAGE.read_text()
    assert render_page(text) == text, "run: python -m tests.support.pipeline_doc"
    assert text.count("<!-- flows:") >= 8
    assert "cookie=0x" in text
