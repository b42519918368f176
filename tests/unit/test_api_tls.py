"""The API by HTTPS: a real server, real clients, and everything that must not connect."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import aiohttp
import pytest

from appliance.api.server import open_server
from appliance.client import Client, Place, ServiceNotFound, find_place
from appliance.settings import ApiSettings
from steering.errors import HairpinError
from tests.support.api_server import ANY_PORT, TOKEN, run_api
from tests.support.certificates import NOW, Issued, issue, render_key
from tests.support.fake_control import FakeControl


class Files:
    """An authority, a certificate that it signed for 127.0.0.1, and where the tests put them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.authority = issue("authority")
        self.ca = self.write("ca.pem", self.authority.certificate)
        self.token = self.write("token", TOKEN)
        self.good = issue("api", self.authority, addresses=("127.0.0.1",))

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.write_text(text)
        return path

    def settings(self, issued: Issued) -> ApiSettings:
        return ANY_PORT.model_copy(
            update={
                "cert_file": self.write("api.pem", issued.certificate),
                "key_file": self.write("api.key", issued.key),
            }
        )


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def url(files: Files) -> Iterator[str]:
    with run_api(FakeControl(), settings=files.settings(files.good)) as url:
        yield url


def test_a_client_that_knows_the_authority_is_served(files: Files, url: str) -> None:
    assert url.startswith("https://127.0.0.1:")
    env = {"HAIRPIN_URL": url, "HAIRPIN_TOKEN_FILE": str(files.token)}
    place = find_place(None, None, {**env, "HAIRPIN_CA_FILE": str(files.ca)}, ())
    assert Client(place).read_health().status == "ok"
    alerts = Client(place).follow_alerts({}, 0, lambda lost: None)
    assert next(alerts).id
    alerts.close()


def test_a_client_that_does_not_is_told_what_to_do(files: Files, url: str) -> None:
    with pytest.raises(ServiceNotFound) as told:
        Client(Place(url, files.token, "test")).read_health()
    assert "does not prove who it is" in told.value.reason
    assert "HAIRPIN_CA_FILE" in told.value.mend
    other = files.write("other.pem", issue("other authority").certificate)
    with pytest.raises(ServiceNotFound, match="does not prove who it is"):
        Client(Place(url, files.token, "test", other)).read_health()


def test_the_name_and_the_dates_are_checked(files: Files) -> None:
    wrong_name = issue("api", files.authority, addresses=("192.0.2.1",))
    expired = issue("api", files.authority, addresses=("127.0.0.1",), ends=NOW - timedelta(hours=1))
    for issued, why in ((wrong_name, "mismatch"), (expired, "expired")):
        with (
            run_api(FakeControl(), settings=files.settings(issued)) as url,
            pytest.raises(ServiceNotFound, match=why),
        ):
            Client(Place(url, files.token, "test", files.ca)).read_health()


def test_the_authority_may_stand_in_the_clients_file(files: Files, url: str) -> None:
    text = f'{{"url": "{url}", "tokenFile": "{files.token}", "caFile": "{files.ca}"}}'
    place = find_place(None, None, {}, (files.write("client.json", text),))
    assert Client(place).read_health().status == "ok"


def test_a_very_certificate_may_stand_in_the_clients_file_and_no_other_is_taken(
    files: Files,
) -> None:
    other_name = issue("api", files.authority, addresses=("192.0.2.1",))
    with run_api(FakeControl(), settings=files.settings(other_name)) as url:
        for pinned, taken in ((other_name, True), (files.good, False), (files.authority, False)):
            file = files.write("pinned.pem", pinned.certificate + files.authority.certificate)
            text = f'{{"url": "{url}", "tokenFile": "{files.token}", "certificateFile": "{file}"}}'
            place = find_place(None, None, {}, (files.write("client.json", text),))
            if taken:
                assert Client(place).read_health().status == "ok"
            else:
                with pytest.raises(ServiceNotFound, match="does not prove who it is"):
                    Client(place).read_health()


@pytest.mark.filterwarnings("ignore:.*TLSv1_1 is deprecated")
@pytest.mark.parametrize(
    ("version", "taken"),
    [
        (ssl.TLSVersion.TLSv1_1, False),
        (ssl.TLSVersion.TLSv1_2, True),
        (ssl.TLSVersion.TLSv1_3, True),
    ],
)
def test_tls_is_1_2_or_newer(files: Files, url: str, version: ssl.TLSVersion, taken: bool) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(files.ca)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # else OpenSSL itself refuses to offer 1.1
    context.minimum_version = context.maximum_version = version
    port = int(url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), 5) as plain:
        if taken:
            with context.wrap_socket(plain, server_hostname="127.0.0.1") as secure:
                assert secure.version() == version.name.replace("_", ".")
        else:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                context.wrap_socket(plain, server_hostname="127.0.0.1")


async def test_plain_http_is_not_answered(files: Files) -> None:
    async with open_server(FakeControl(), files.settings(files.good), TOKEN) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"HTTP" not in await asyncio.wait_for(reader.read(65536), 5)
        writer.close()


@pytest.mark.parametrize("broken", ["absent", "not pem", "other key", "encrypted"])
async def test_what_can_not_be_used_is_told_at_the_start(files: Files, broken: str) -> None:
    settings = files.settings(files.good)
    assert settings.key_file is not None
    if broken == "absent":
        settings.key_file.unlink()
    elif broken == "not pem":
        settings.key_file.write_text("nothing")
    elif broken == "other key":
        settings.key_file.write_text(files.authority.key)
    else:
        settings.key_file.write_text(render_key(files.good.private, b"secret"))
    with pytest.raises(HairpinError) as told:
        async with open_server(FakeControl(), settings, TOKEN):
            pass
    assert "api.key" in told.value.reason
    assert told.value.mend


def test_a_ca_file_that_is_none_is_told(files: Files, url: str) -> None:
    for path in (files.root / "absent.pem", files.write("empty.pem", "nothing")):
        with pytest.raises(HairpinError, match="can't be used") as told:
            Client(Place(url, files.token, "test", path))
        assert "HAIRPIN_CA_FILE" in told.value.mend


@pytest.mark.parametrize(("status", "code"), [("ok", 200), ("degraded", 200), ("failing", 503)])
async def test_health_in_a_word_needs_no_token(status: str, code: int) -> None:
    control = FakeControl(status=status)  # type: ignore[arg-type]
    async with (
        open_server(control, ANY_PORT, TOKEN) as url,
        aiohttp.ClientSession() as session,
        session.get(url + "/health") as got,
    ):
        assert (got.status, await got.json()) == (code, {"status": status})
