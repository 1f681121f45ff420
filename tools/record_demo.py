"""Record ``lazarus demo`` in a terminal of its own and write docs/demo.svg.

    python tools/record_demo.py

The picture moves without any script or network. Run this on a machine that is otherwise quiet: the
times in it are real, but for pauses of more than a second, which are cut to one. The recording (an
asciicast, version 2) is rendered by termtosvg, which is installed into a folder of its own.
"""

from __future__ import annotations

import codecs
import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import tempfile
import termios
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS, PICTURE = ROOT / "build" / "termtosvg", ROOT / "docs" / "demo.svg"
COLUMNS, ROWS = 100, 26
LONGEST_PAUSE_MS, END_MS = 1000, 5000


def record(command: list[str], cast: Path, *, folder: str) -> int:
    """Run a command in a new terminal, write what it shows with its times, return its exit code.

    The name of the temporary folder that the record goes to is shown as ``runs/demo``.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", TERM="xterm-256color")
        os.execv(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    began, decoder = time.monotonic(), codecs.getincrementaldecoder("utf-8")("replace")
    with cast.open("w") as file:
        file.write(json.dumps({"version": 2, "width": COLUMNS, "height": ROWS}) + "\n")
        typed = "$ make demo\r\n"
        file.write(json.dumps([0.0, "o", typed]) + "\n")
        while True:
            try:
                data = os.read(terminal, 65536)
            except OSError:  # the other end of the terminal is closed
                break
            if not data:
                break
            text = decoder.decode(data).replace(folder, "runs/demo")
            sys.stdout.write(text)
            file.write(json.dumps([time.monotonic() - began, "o", text]) + "\n")
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def render(cast: Path) -> None:
    """The recording as one SVG."""
    tool = TOOLS / "bin" / "termtosvg"
    if not tool.exists():
        venv.create(TOOLS, with_pip=True)
        pip = [str(TOOLS / "bin" / "pip"), "install", "--quiet", "termtosvg==1.1.0"]
        subprocess.run(pip, check=True)
    limits = ["-m", "100", "-M", str(LONGEST_PAUSE_MS), "-D", str(END_MS)]
    subprocess.run([str(tool), "render", str(cast), str(PICTURE), *limits], check=True)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        cast, run = Path(folder) / "demo.cast", Path(folder) / "run"
        command = [sys.executable, "-m", "lazarus", "demo", "--run-dir", str(run)]
        if code := record(command, cast, folder=str(run)):
            return code
        render(cast)
    print(f"wrote {PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
