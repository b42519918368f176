"""Where the service is, and what is said when it is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from appliance.client import (
    ServiceNotFound,
    build_refusal,
    check_url,
    find_media_type,
    find_place,
    read_place,
)
from appliance.logs import configure_logs
from steering.errors import HairpinError, WrongInput


def write_place(path: Path, url: str) -> Path:
    path.write_text(json.dumps({"url": url, "tokenFile": f"{path}.token"}))
    return path


def test_options_go_before_the_environment_and_that_before_files(tmp_path: Path) -> None:
    first = write_place(tmp_path / "etc.json", "http://127.0.0.1:1")
    second = write_place(tmp_path / "lab.json", "http://127.0.0.1:2")
    files = (tmp_path / "none.json", first, second)
    env = {"HAIRPIN_URL": "http://127.0.0.1:3", "HAIRPIN_TOKEN_FILE": "/env"}

    assert find_place(None, None, {}, files).url == "http://127.0.0.1:1"
    assert find_place(None, None, {}, files).token_file == Path(f"{first}.token")
    assert find_place(None, None, env, files).url == "http://127.0.0.1:3"
    assert find_place("http://[::1]:4/", Path("/o"), env, files).url == "http://[::1]:4"
    # A URL alone takes the token of the file that names the same service.
    assert find_place("http://127.0.0.1:2", None, {}, files).token_file == Path(f"{second}.token")
    assert find_place(None, Path("/o"), {}, files).token_file == Path("/o")
    with pytest.raises(WrongInput, match="--token-file"):
        find_place("http://127.0.0.1:9", None, {}, files)
    with pytest.raises(ServiceNotFound, match="hairpin lab up"):
        find_place(None, None, {}, ())


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"url": "http://x"}', '{"url": 1, "tokenFile": 2}']
)
def test_a_wrong_client_file_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "client.json"
    path.write_text(text)
    with pytest.raises(WrongInput, match=r"client\.json"):
        read_place(path)


@pytest.mark.parametrize(
    "url",
    ["x", "ftp://x", "http://", "http://x:99999", "http://x/path", "http://u@x", "http://x?q"],
)
def test_wrong_urls_are_refused(url: str) -> None:
    with pytest.raises(WrongInput):
        check_url(url, "--url")


def test_something_else_that_answers_is_told() -> None:
    error = build_refusal(502, "<html>proxy</html>")
    assert isinstance(error, HairpinError)
    assert "not the management service (status 502)" in error.reason


def test_an_unknown_log_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAIRPIN_LOG", "loud")
    with pytest.raises(WrongInput, match="HAIRPIN_LOG"):
        configure_logs()


@pytest.mark.parametrize(
    ("text", "media_type"),
    [
        ('{"apiVersion": "hairpin/v1", "kind": "List", "items": []}', "application/json"),
        ("{apiVersion: hairpin/v1, kind: List, items: []}", "application/yaml"),
        ("apiVersion: hairpin/v1\nkind: List\nitems: []\n", "application/yaml"),
    ],
)
def test_documents_in_braces_are_not_yet_json(text: str, media_type: str) -> None:
    assert find_media_type(text) == media_type
