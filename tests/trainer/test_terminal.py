"""What a person sees of a run in a terminal, and what stands in a file instead."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading

import pytest
from command_server import commands
from training_runs import losses, metrics, tiny_flags, write_tokens

from fastlm import LivePlotter
from fastlm.run.log import RunLog
from fastlm.run.output import Missing

COLUMNS = 90


class Terminal:
    """A pseudo-terminal of 90 columns, and what has been written on it."""

    def __init__(self):
        self._master, self._slave = pty.openpty()
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, COLUMNS, 0, 0))
        self.path = os.ttyname(self._slave)
        self._parts: list[bytes] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        try:
            while part := os.read(self._master, 65536):
                self._parts.append(part)
        except OSError:  # the last one who could write has gone
            pass

    def close(self) -> str:
        """All that was written."""
        os.close(self._slave)
        self._reader.join()
        os.close(self._master)
        return b"".join(self._parts).decode()


def screen(text: str) -> list[str]:
    """The lines that are left: a carriage return writes over what stands there; "erase to the
    end", the only other control sequence, erases."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        cells, column = [], 0
        for piece in re.split(r"(\r|\x1b\[[0-9;]*[A-Za-z])", line):
            if piece == "\r":
                column = 0
            elif piece.startswith("\x1b"):
                assert piece in ("\x1b[K", "\x1b[0K"), repr(piece)
                del cells[column:]
            else:
                cells[column : column + len(piece)] = piece
                column += len(piece)
        lines.append("".join(cells).rstrip())
    return lines


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """(directory, what the terminal got) of a run with an evaluation and a checkpoint."""
    directory = tmp_path_factory.mktemp("terminal")
    write_tokens(directory)
    terminal = Terminal()
    argv = tiny_flags(total_steps=60, eval_every=20, ckpt_every=40)
    command = ["stdout", terminal.path, *argv]
    result = commands().run(command, directory, call="command_programs:train_onto")
    text = terminal.close()
    assert result.returncode == 0, result.output + text
    assert result.output == ""  # on stderr nothing
    return directory, text


def test_a_terminal_has_one_line_of_progress(shown):
    _, text = shown
    lines = screen(text)
    bars = [line for line in lines if line.startswith("step ")]
    form = r"step 60/60 \|█+\| loss \d\.\d{4}, lr \d\.\d\de-\d\d, [\d,]+ tok/s, ETA 00:00"
    assert len(bars) == 1 and re.fullmatch(form, bars[0]), bars
    assert len(bars[0]) <= COLUMNS
    assert not [line for line in lines if line.startswith("[train] step")]
    # It was drawn while the run went on, too.
    drawn = re.findall(r"\rstep (\d+)/60 .*?ETA (\S+)", text)
    assert len({step for step, _ in drawn}) >= 2


def test_what_happens_seldom_stands_above_it(shown):
    _, text = shown
    lines = [line for line in screen(text) if line]
    events = [
        line.split("checkpoint_")[-1] for line in lines if line.startswith(("[VAL]", "[CKPT]"))
    ]
    assert [e[:17] for e in events if e.startswith("[VAL]")] == [
        "[VAL] step 000020", "[VAL] step 000040", "[VAL] step 000059",
    ]  # fmt: skip
    assert {"40.pt", "final.pt", "model.pt"} <= set(events)
    assert len(lines) < 30


def test_the_files_are_the_same_as_without_a_terminal(shown):
    directory, _ = shown
    assert losses(directory / "run").keys() == set(range(60))
    log = (directory / "run" / "logs" / "train.log").read_text().splitlines()
    assert sum(" loss " in line for line in log) == 60
    assert len(metrics(directory / "run", "summary")) == 1


def test_a_pipe_gets_plain_lines_though_stderr_is_a_terminal(tmp_path):
    """As in `python -m fastlm.train | tee log`."""
    write_tokens(tmp_path)
    terminal = Terminal()
    argv = ["stderr", terminal.path, *tiny_flags(total_steps=5)]
    result = commands().run(argv, tmp_path, call="command_programs:train_onto")
    text = terminal.close()
    assert result.returncode == 0, result.output
    assert "step " not in text
    steps = re.findall(
        r"^\[train\] step (\d)/5 \| avg_loss=.* \| ETA \d:\d\d$", result.stdout, re.M
    )
    assert steps == list("01234")


def test_it_moves_on_behind_a_rollback(tmp_path, monkeypatch):
    terminal = Terminal()
    with open(terminal.path, "w") as tty:
        monkeypatch.setattr(sys, "stdout", tty)
        missing = Missing()
        log = RunLog(
            tmp_path, "train", missing=missing, resuming=False, start_step=0, total_steps=1000
        )
        bar = log._bar
        for step in (400, 20):
            for _ in range(step):
                bar.last_print_t -= 1  # a second goes by
                log.advance()
            log.rewind(100)
        log.close()
        log.flush()
        monkeypatch.undo()
    drawn = [int(step) for step in re.findall(r"\rstep (\d+)/1000", terminal.close())]
    assert {105, 119} < set(drawn[drawn.index(400) :]) and not missing


def test_live_plotter_says_nothing_in_a_terminal(tmp_path, monkeypatch):
    """It draws in notebooks; a script saves its picture."""
    terminal = Terminal()
    with open(terminal.path, "w") as tty:
        monkeypatch.setattr(sys, "stdout", tty)
        plotter = LivePlotter(dpi=40)
        for step in range(100):
            plotter.log_train(step, 4 - step / 50, lr=1e-3)
            plotter.draw()
        plotter.save(tmp_path / "curve.png")
        monkeypatch.undo()
    assert screen(terminal.close()) == [
        f"[plotter] Saved training curve to {tmp_path}/curve.png",
        "",
    ]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
