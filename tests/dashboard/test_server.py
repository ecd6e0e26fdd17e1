"""Who may read a page, what a page may load, and that looking changes nothing."""

from __future__ import annotations

import asyncio
import hashlib
import queue
import re
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvicorn
from starlette.testclient import TestClient

from fedtune.core.errors import InfrastructureError
from fedtune.dashboard import connections, server
from fedtune.dashboard.kinds import page_of
from fedtune.dashboard.server import HERE, POLICY, app_of, serve
from fedtune.observe import StatusFile
from fedtune.observe.status import read_status
from tests.expected import raises_nothing

TOKEN = "a-token-of-this-test"
LICENSES = HERE / "static" / "LICENSES.md"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    status = StatusFile(tmp_path / "run")
    status("start", {"study": "gait", "done": 0, "rounds": 4})
    status.close()
    return tmp_path / "run"


def client(path: Path, host: str = "127.0.0.1:8000") -> TestClient:
    return TestClient(app_of(page_of(path), TOKEN), base_url=f"http://{host}")


PATHS = ("/", "/live/top", "/series", "/events", "/slow/verified", "/static/dashboard.css", "/none")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("query", ["", "?token=", "?token=wrong", f"?token={TOKEN}x"])
def test_without_the_token_there_is_401_and_nothing_else(run: Path, path: str, query: str) -> None:
    answer = client(run).get(path + query)
    assert answer.status_code == 401 and "gait" not in answer.text
    assert "set-cookie" not in answer.headers


def test_a_wrong_cookie_is_401_and_the_right_token_becomes_one(run: Path) -> None:
    browser = client(run)
    answer = browser.get(f"/?token={TOKEN}", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie
    assert browser.get("/").status_code == 200
    name = cookie.partition("=")[0]
    assert client(run).get("/", headers={"cookie": f"{name}=wrong"}).status_code == 401


@pytest.mark.parametrize("other", ["a@b=1", "x/y=1", "(=1", "=", "; ;", "é=1"])
def test_a_cookie_of_another_program_changes_nothing(run: Path, other: str) -> None:
    """Browsers send all cookies of 127.0.0.1, whichever port set them, and whatever their names."""
    browser = client(run)
    found = browser.get(f"/?token={TOKEN}", follow_redirects=False)
    own = found.headers["set-cookie"].partition(";")[0]
    browser.cookies.clear()
    for sent, status in ((other, 401), (f"{other}; {own}", 200), (f"{own}; {other}", 200)):
        answer = browser.get("/", headers={"cookie": sent.encode("latin-1")})
        assert answer.status_code == status and "content-security-policy" in answer.headers


REBOUND = ("attacker.example", "127.0.0.1.attacker.example", "[::1].attacker.example")
FOREIGN = (*REBOUND, "[::1]attacker", "[::1]:80.attacker", "localhost:80:90", "[::2]:80", "")


@pytest.mark.parametrize("host", FOREIGN)
def test_a_name_that_was_rebound_to_this_machine_is_no_way_in(run: Path, host: str) -> None:
    """A page of another name may send the browser here under its own name; the token too."""
    answer = client(run).get(f"/?token={TOKEN}", headers={"host": host})
    assert answer.status_code == 421 and "set-cookie" not in answer.headers


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "[::1]:80", "127.0.0.1"])
def test_a_name_of_this_machine_is_one(run: Path, host: str) -> None:
    assert client(run).get("/", headers={"host": host}).status_code == 401


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_a_page_is_only_read(run: Path, method: str) -> None:
    assert client(run).request(method, f"/?token={TOKEN}").status_code == 405


def test_every_answer_may_load_from_here_alone(run: Path) -> None:
    browser = client(run)
    for path in (f"/?token={TOKEN}", "/", "/static/htmx.min.js", "/none"):
        headers = browser.get(path, follow_redirects=False).headers
        assert headers["content-security-policy"] == POLICY
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers
    assert "unsafe" not in POLICY and "http" not in POLICY


def test_no_template_or_file_of_ours_names_another_machine() -> None:
    scripts = [HERE / "static" / name for name in ("dashboard.js", "dashboard.css", "theme.js")]
    for path in [*HERE.glob("templates/*.html"), *scripts]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?:src|href)=\"(?:https?:)?//", text), path
        if path.suffix == ".html":
            assert not re.search(r"<style|\sstyle=|\son\w+=|<script>", text), path


def test_what_is_anothers_is_as_it_was_published() -> None:
    rows = re.findall(r"^\| (\S+\.(?:js|css)) \| ([0-9a-f]{64}) \|$", LICENSES.read_text(), re.M)
    assert len(rows) == 4
    for name, digest in rows:
        assert hashlib.sha256((HERE / "static" / name).read_bytes()).hexdigest() == digest
    ours = {"dashboard.css", "dashboard.js", "theme.js", "mark.svg", "LICENSES.md"}
    assert {path.name for path in (HERE / "static").iterdir()} == ours | {name for name, _ in rows}


def test_a_path_out_of_the_folder_is_none(run: Path) -> None:
    browser = client(run.parent)
    assert browser.get(f"/?token={TOKEN}").status_code == 200
    assert browser.get("/runs/run/").status_code == 200
    for path in ("/runs/%2e%2e/", "/runs/..%2f..%2fetc/", "/static/../server.py", "/runs/none/"):
        assert browser.get(path).status_code == 404, path


def test_a_taken_port_is_an_error_with_what_to_do(run: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InfrastructureError, match="--port"):
            serve(page_of(run), taken.getsockname()[1])


def files_of(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    passing = ("-wal", "-shm")  # SQLite's own, of whoever has the ledger open
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if not path.name.endswith(passing)
    }


def looked_at(browser: TestClient, page: Any) -> str:
    """Every answer that a browser gets of a page, joined."""
    lives, slow = (f"live/{part}" for part in page.parts), (f"slow/{what}" for what in page.slow)
    parts = [browser.get(f"/?token={TOKEN}").text]
    for path in (*lives, "series", *slow):
        answer = browser.get(f"/{path}")
        assert answer.status_code == 200, (path, answer.text)
        parts.append(answer.text)
    return "\n".join(parts)


def test_looking_changes_no_file_and_nothing_of_a_record_is_shown(
    tried: Path, released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The records of that study all read "Record N: is it so?"; the study is not over for it."""
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", root)
    before = files_of(tried) | files_of(released)
    shown = {}
    for path in (tried / "runs" / "tried", tried / "runs", tried / "north" / "site.toml", released):
        page = page_of(path)
        browser = TestClient(app_of(page, TOKEN), base_url="http://127.0.0.1")
        shown[page.kind] = looked_at(browser, page)
    assert files_of(tried) | files_of(released) == before
    assert set(shown) == {"run", "runs", "site", "release"}
    assert all("is it so" not in text for text in shown.values())
    assert "spent of 8 for life" in shown["site"] and "entries, whole and signed" in shown["site"]
    assert all("Unchanged, but a simulation" in shown[kind] for kind in ("run", "release"))
    assert read_status(tried / "runs" / "tried").state == "done"


def test_a_figure_that_takes_for_ever_is_given_up_and_its_process_ends(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder from a stranger may ask the accountant for hours of work."""
    pid = tmp_path / "pid"
    slow = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(9999)"
    monkeypatch.setattr(server.boot, "command", lambda *_: [sys.executable, "-c", slow])
    monkeypatch.setattr(server, "WORK_SECONDS", 5.0)
    given, timeout = list[float](), asyncio.timeout

    def noted(seconds: float) -> asyncio.Timeout:
        given.append(seconds)
        return timeout(seconds)

    monkeypatch.setattr(server.asyncio, "timeout", noted)
    browser = client(run)
    browser.get(f"/?token={TOKEN}")
    assert "takes more than 5 s" in browser.get("/slow/verified").text
    assert given == [5.0]
    if pid.exists():  # it had begun
        assert not Path(f"/proc/{pid.read_text()}").exists()


@pytest.fixture
def address(run: Path) -> Iterator[tuple[str, int, str]]:
    """Host, port and token of a page that is served in this process."""
    told: queue.Queue[str] = queue.Queue()
    ends: list[uvicorn.Server] = []

    class Ending(uvicorn.Server):
        def __init__(self, config: uvicorn.Config) -> None:
            super().__init__(config)
            ends.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.uvicorn, "Server", Ending)
        thread = threading.Thread(target=serve, args=(page_of(run),), kwargs={"say": told.put})
        thread.start()
        url = urlsplit(told.get(timeout=60))
        assert url.hostname and url.port
        yield url.hostname, url.port, url.query
        ends[0].should_exit = True
        thread.join(60)


def asked_of(place: tuple[str, int], query: str, path: str = "/") -> bytes:
    with socket.create_connection(place, timeout=60) as door:
        door.sendall(f"GET {path}?{query} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode())
        return door.recv(1024)


def test_the_address_without_its_token_is_on_this_server(address: tuple[str, int, str]) -> None:
    host, port, query = address
    for path in ("//evil.example/", "///evil.example/"):
        answer = asked_of((host, port), query, path)
        assert b" 303 " in answer and b"location: /evil.example/\r\n" in answer


def test_who_only_connects_keeps_nobody_out(
    address: tuple[str, int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest of the silent connections give way."""
    monkeypatch.setattr(connections, "FIRST_SECONDS", 600.0)  # so that none ends by its own time
    host, port, query = address
    with ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection((host, port), timeout=60))
            for _ in range(connections.SILENT + 20)
        ]
        with raises_nothing():
            assert all(door.recv(1) == b"" for door in silent[:20])
        assert b"303" in asked_of((host, port), query)
        assert b"401" in asked_of((host, port), "token=wrong")


def test_a_request_that_never_ends_is_closed(
    address: tuple[str, int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "FIRST_SECONDS", 0.2)
    host, port, _ = address
    with socket.create_connection((host, port), timeout=60) as door:
        door.sendall(b"GET / HTTP/1.1\r\nhost: local")
        assert door.recv(1) == b""


def test_who_has_no_token_holds_no_connection(address: tuple[str, int, str]) -> None:
    host, port, _ = address
    for line in (b"GET / HTTP/1.1\r\nhost: localhost", b"POST / HTTP/1.1\r\nhost: localhost",
                 b"GET / HTTP/1.1\r\nhost: elsewhere"):  # fmt: skip
        with socket.create_connection((host, port), timeout=60) as door:
            door.sendall(line + b"\r\n\r\n")
            answer = b""
            while part := door.recv(1024):
                answer += part
            assert b"connection: close" in answer.lower()


def test_a_slow_figure_is_computed_once_until_its_files_change(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    async def counted(what: str, page: Any) -> dict[str, Any]:
        calls.append(what)
        return {"unsigned": True}

    monkeypatch.setattr(server, "run_work", counted)
    monkeypatch.setattr(server, "REST_SECONDS", 0.0)
    browser = client(run)
    browser.get(f"/?token={TOKEN}")
    for _ in range(3):
        assert browser.get("/slow/verified").status_code == 200
    assert len(calls) == 1
    (run / "evidence.json").write_text("{}")
    browser.get("/slow/verified")
    assert len(calls) == 2
