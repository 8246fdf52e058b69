"""`homelab monitor`: one frame, a picture, data, a recording, a terminal, and no terminal."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from watched_lab import WatchedLab

from homelab_scaling.watch import link

COMMAND = [sys.executable, "-m", "homelab_scaling", "monitor"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return WatchedLab.in_flight(tmp_path_factory.mktemp("monitor") / "lab", every=40).lab


@pytest.fixture(autouse=True)
def machine(lab, monkeypatch):
    monkeypatch.setenv(link.MACHINE_VARIABLE, str(lab / "machine"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)


def replay(lab, *more):
    return ("monitor", "--replay", lab / "machine" / "gpu.jsonl", "--once", *more)


@pytest.mark.parametrize("width", [40, 80, 100, 160])
def test_one_frame_as_text(homelab, lab, width):
    said = homelab(*replay(lab, "--width", width))
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert {len(line) for line in lines} == {width}
    assert "gpt2_5m_120m" in lines[0] and "51m" in lines[0]
    assert "\x1b" not in said.out


def test_one_frame_of_a_height(homelab, lab):
    assert len(homelab(*replay(lab, "--width", 80, "--height", 24)).out.splitlines()) == 24


def test_one_frame_from_the_files(homelab, lab):
    said = homelab("monitor", lab, "--once", "--width", 100)
    assert said.code == 0
    assert "gpt2_5m_120m" in said.out and "GPU 1" in said.out
    assert homelab("monitor", lab / "gpt2_5m_120m", "--once", "--run", "12m").out.count("12m") >= 2


def test_one_document(homelab, lab):
    said = homelab(*replay(lab, "--json"))
    frame = json.loads(said.out)
    assert (said.code, frame["run"]["rung"], frame["watchdog"]["level"]) == (0, "51m", "slow")


def test_a_picture(homelab, lab, tmp_path):
    path = tmp_path / "a.svg"
    said = homelab(*replay(lab, "--svg", path, "--width", 90))
    assert (said.code, said.out.strip()) == (0, str(path))
    text = path.read_text()
    assert text.startswith("<svg") and "cdnjs" not in text


def test_a_place_in_the_recording(homelab, lab):
    early = json.loads(homelab(*replay(lab, "--json", "--at", 60)).out)
    late = json.loads(homelab(*replay(lab, "--json")).out)
    assert late["t_s"] - early["t_s"] == pytest.approx(660, abs=2)
    assert early["run"]["update"] < late["run"]["update"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--width", 80], "--width is for one frame; add --once"),
        (["--json"], "--json is for one frame; add --once"),
        (["--once", "--json", "--svg", "x.svg"], "choose one"),
        (["--at", 5], "add --replay"),
        (["--once", "--width", 10], "wants 40 or more"),
        (["--once", "--height", 1], "wants 5 or more"),
        (["--speed", 0], "wants a positive number"),
        (["--every", 0], "wants 0.1 to 3600"),
        (["/nowhere", "--once"], "no such folder"),
        (["--replay", "/nowhere.jsonl", "--once"], "no such recording"),
        (["--once", "--run", "7b"], "no run begins with 7b"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(homelab, lab, words, said):
    place = [] if "/nowhere" in map(str, words) else [lab]
    found = homelab("monitor", *place, *words)
    assert found.code == 2
    assert found.err.count("\n") == 1
    assert said in found.err


def test_without_a_lab_it_still_answers(homelab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(link.MACHINE_VARIABLE, str(tmp_path / "machine"))
    said = homelab("monitor", "--once", "--width", 80)
    assert said.code == 0
    assert "There is no ladder in lab yet" in said.out
    assert not (tmp_path / "lab").exists(), "it only looks"
    assert not (tmp_path / "machine").exists()


def test_it_writes_nothing(homelab, lab):
    def state():
        return {str(p): p.stat().st_mtime_ns for p in sorted(lab.rglob("*"))}

    before = state()
    homelab("monitor", lab, "--once")
    homelab(*replay(lab))
    assert state() == before


def test_help_is_quick_and_needs_no_heavy_imports():
    heavy = "[m for m in ('torch', 'numpy', 'rich.live') if m in sys.modules]"
    code = f"import sys; from homelab_scaling import cli; cli.main(['monitor', '--help']); print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "The second terminal" in done.stdout


def test_a_frame_needs_no_torch(lab):
    words = ["monitor", str(lab), "--once"]
    code = f"import sys; from homelab_scaling import cli; cli.main({words}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_without_a_terminal_it_is_a_line_a_minute(lab, monkeypatch, capsys):
    from homelab_scaling.tools import monitor

    naps, really_sleep = [], time.sleep

    def sleep(seconds):
        if len(naps) == 3:  # interrupted already: what is closed may wait a moment
            really_sleep(seconds)
            return
        naps.append(seconds)
        if len(naps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(monitor.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        monitor.main(monitor.Args(lab=lab))
    lines = capsys.readouterr().out.splitlines()
    assert naps == [60.0] * 3
    assert len(lines) == 3
    assert all("51m" in line and "\x1b" not in line for line in lines)


# ----------------------------------------------------------------------------------------------------------- a terminal


class Terminal:
    """A pseudo-terminal with `homelab monitor` in it."""

    def __init__(self, words, columns=80, rows=24, **environ):
        self.ours, theirs = pty.openpty()
        self.resize(columns, rows)
        env = {**os.environ, "TERM": "xterm-256color", **environ}
        self.process = subprocess.Popen(
            # A suite started in the background of a script inherits an ignored interrupt; a terminal's does not.
            ["env", "--default-signal=INT", *COMMAND, *map(str, words)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=env,
            start_new_session=True,
        )
        os.close(theirs)
        self.seen = b""

    def resize(self, columns, rows):
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read_until(self, pattern, seconds=20.0):
        """What came since the last call, up to the pattern."""
        deadline, new = time.monotonic() + seconds, b""
        while time.monotonic() < deadline:
            if select.select([self.ours], [], [], 0.1)[0]:
                try:
                    new += os.read(self.ours, 1 << 16)
                except OSError:
                    break
            if re.search(pattern, new, re.DOTALL):
                self.seen += new
                return new.decode(errors="replace")
        raise AssertionError(f"{pattern!r} did not come; got {new[-500:]!r}")

    def end(self, key):
        """Presses a key (None: interrupts) and waits; the exit code."""
        if key is None:
            self.process.send_signal(signal.SIGINT)
        else:
            os.write(self.ours, key)
        deadline = time.monotonic() + 10
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self.ours], [], [], 0.05)[0]:
                try:
                    self.seen += os.read(self.ours, 1 << 16)
                except OSError:
                    break
        return self.process.wait(timeout=5)

    def close(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self.ours)


@pytest.fixture
def terminal(lab):
    opened = []

    def start(*words, **kwargs):
        opened.append(Terminal(words, **kwargs))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


@pytest.mark.parametrize("key", [b"q", None])
def test_it_lives_on_a_terminal_until_q_or_an_interrupt_ends_it(terminal, lab, key):
    screen = terminal("--replay", lab / "machine" / "gpu.jsonl", "--speed", 20, "--every", 0.2)
    assert "gpt2_5m_120m" in screen.read_until(rb"runs.*51m.*\xe2\x95\xaf")
    first = set(re.findall(rb"\d\d:\d\d:\d\d", screen.seen))
    screen.read_until(b"(?:runs.*){4}")
    assert set(re.findall(rb"\d\d:\d\d:\d\d", screen.seen)) != first, "the recording goes on"
    assert screen.end(key) == 0
    assert b"\x1b[?1049l" in screen.seen, "the screen that was there before comes back"
    assert b"Traceback" not in screen.seen


def test_it_follows_the_size_of_the_terminal(terminal, lab):
    screen = terminal("--replay", lab / "machine" / "gpu.jsonl", "--every", 0.5, columns=80, rows=24)
    screen.read_until(rb"51m")
    screen.resize(160, 45)
    os.kill(screen.process.pid, signal.SIGWINCH)
    wide = screen.read_until("(?:─){90}".encode())
    assert "51m" in wide
    screen.resize(80, 24)
    assert screen.end(b"q") == 0


def test_no_color_on_a_terminal(terminal, lab):
    screen = terminal("--replay", lab / "machine" / "gpu.jsonl", NO_COLOR="1")
    screen.read_until(rb"51m.*finished")
    assert not re.search(rb"\x1b\[[\d;]*3[0-7]", screen.seen)
    assert screen.end(b"q") == 0
