"""A file has its final name only when it is whole and on the disk; whoever is in the way is named."""

import errno
import fcntl
import inspect
import os
import pty
import resource
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ffcv_imnet.core import progress
from ffcv_imnet.core.atomic import (
    NotWritten,
    atomic_write,
    drop_cached,
    force,
    link,
    locked,
    make_folder,
)
from ffcv_imnet.core.errors import RunError, not_written, said_of
from ffcv_imnet.train import checkpoint


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A real refusal in the middle of writing: no file of this process may become larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with atomic_write(path, "w") as file:
        file.write("ö\n")
        file.flush()
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == "ö\n"
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    with (
        largest_file(1 << 20),
        pytest.raises(NotWritten, match=r"a\.json could not be written \(File too large\): raise"),
        atomic_write(path) as file,
    ):
        file.write(bytes(3 << 20))
    with largest_file(1000), pytest.raises(NotWritten), atomic_write(path) as file:
        file.write(bytes(2000))  # refused when the buffer is flushed at the end
    with (
        pytest.raises(NotWritten, match=r"gone/b could not .*No such file.*still there"),
        atomic_write(tmp_path / "gone/b"),
    ):
        pass
    (tmp_path / "folder").mkdir()
    with (
        pytest.raises(NotWritten, match=r"folder could not .*Is a directory"),
        atomic_write(tmp_path / "folder"),
    ):
        pass
    assert path.read_text(encoding="utf-8") == "ö\n"
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "folder"}


def test_what_cannot_get_its_name_is_not_left(tmp_path: Path) -> None:
    """A folder stands in the way, which a rename refuses as a full disk may."""
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").mkdir()
    with pytest.raises(NotWritten, match=r"b could not be written \(Is a directory\)"):
        link(tmp_path / "a", tmp_path / "b")
    with pytest.raises(RunError, match=r"b could not be written \(Is a directory\)"):
        checkpoint.save({}, tmp_path / "a", tmp_path / "b")  # the checkpoint before is kept there
    with pytest.raises(RunError, match=r"b could not be written \(Is a directory\)"):
        checkpoint.save({}, tmp_path / "b")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    assert (tmp_path / "a").read_text() == "x"
    failed = OSError(errno.EIO, "Input/output error")
    assert not_written("a", failed).endswith("(Input/output error): is its disk sound?")


def test_an_error_of_something_else_is_not_called_an_error_of_writing(tmp_path: Path) -> None:
    """A shared memory that is full, a source that cannot be read, a worker that cannot start."""
    others = [
        OSError(errno.EROFS, "Read-only file system", "/dev/shm/x"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "source.jpg"),
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
    ]
    for error in others:
        with pytest.raises(type(error)) as caught, atomic_write(tmp_path / "a") as file:
            file.write(b"x")
            raise error
        assert caught.value is error
    assert not list(tmp_path.iterdir())
    assert said_of(others[0]).startswith("/dev/shm/x: Read-only file system: ")
    assert "no more processes" in said_of(others[2]) and "Errno" not in said_of(others[2])


def test_the_disk_has_the_bytes_before_the_name_and_then_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def forced(number: int) -> None:
        done.append("fsync " + Path(f"/proc/self/fd/{number}").readlink().name)
        fsync(number)

    def renamed(self: Path, target: Path) -> Path:
        done.append(f"rename {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", forced)
    monkeypatch.setattr(Path, "replace", renamed)
    make_folder(tmp_path / "new" / "run")
    assert done == [f"fsync {tmp_path.name}", "fsync new"]
    most = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(len(inspect.stack()) + 100)
        make_folder(tmp_path / "/".join("x" * 150))  # deeper than Python calls itself
    finally:
        sys.setrecursionlimit(most)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "file")
    done.clear()
    with atomic_write(tmp_path / "a") as file:
        file.write(b"x")
    link(tmp_path / "a", tmp_path / "b")
    assert done == [
        "fsync a.partial",
        "rename a",
        f"fsync {tmp_path.name}",
        "rename b",
        f"fsync {tmp_path.name}",
    ]
    assert (tmp_path / "a").samefile(tmp_path / "b")
    done.clear()
    with atomic_write(tmp_path / "heartbeat", "w", sync=False) as file:
        file.write("x")
    assert done == ["rename heartbeat"]

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    done.clear()
    link(tmp_path / "a", tmp_path / "c")
    assert done[0] == "fsync c.partial" and (tmp_path / "c").read_bytes() == b"x"
    assert not (tmp_path / "a").samefile(tmp_path / "c")


def cached(path: Path) -> list[bool]:
    """Whether the system has the first byte of each megabyte without asking the disk."""
    with path.open("rb") as file:
        found = []
        for offset in range(0, path.stat().st_size, 1 << 20):
            try:
                os.preadv(file.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT)
                found.append(True)
            except BlockingIOError:
                found.append(False)
            except OSError as error:
                pytest.skip(f"this file system does not say what it caches: {error}")
    return found


def test_what_was_forced_to_the_disk_can_be_read_from_there(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.write(bytes(8 << 20))
        force(file)
    if not all(cached(path)):
        pytest.skip("this file system does not cache what it writes")
    with path.open("rb") as file:
        drop_cached(file, (4 << 20) + 1, 100)
        after = cached(path)
        drop_cached(file)
        if any(cached(path)):
            pytest.skip("this file system keeps what it was asked to forget")
    assert not after[4] and all(after[:4])


def test_a_lock_has_one_holder_until_it_closes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with path.open("w") as first, path.open("w") as second:
        assert locked(first) and not locked(second)
    with path.open("w") as third:
        assert locked(third)


def test_a_reader_that_goes_is_no_error_and_another_pipe_is() -> None:
    code = "from ffcv_imnet.core.errors import run_main\nrun_main(lambda: print('x' * 1000000))"
    words = f'{sys.executable} -c "{code}" | head -c 1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("x141\n", "")
    code = (
        "import os; from ffcv_imnet.core.errors import run_main\n"
        "def main():\n    a, b = os.pipe(); os.close(a); os.write(b, b'x')\nrun_main(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "error: Broken pipe\n")


def test_streams_that_were_closed_are_not_given_to_files(tmp_path: Path) -> None:
    """Else what is printed goes into whatever is opened next: a checkpoint, a .beton."""
    code = (
        "import os, sys; from ffcv_imnet.core.errors import run_main\n"
        "def main():\n"
        "    with open(sys.argv[1], 'w') as file:\n"
        "        print('printed'); sys.stdout.flush(); os.write(2, b'written')\n"
        "        file.write(str(file.fileno() > 2))\n"
        "run_main(main)"
    )
    words = f'{sys.executable} -c "{code}" {tmp_path}/file <&- >&- 2>&-'
    assert subprocess.run(["bash", "-c", words]).returncode == 0
    assert (tmp_path / "file").read_text() == "True"


def test_an_output_that_cannot_be_written_is_named() -> None:
    code = "from ffcv_imnet.core.errors import run_main\nrun_main(lambda: print('x', flush=True))"
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True
        )
        assert done.returncode == 1
        assert done.stderr.startswith("error: the standard output: No space left on device")
        assert done.stderr.count("\n") == 1
        assert (
            subprocess.run([sys.executable, "-c", code], stdout=full, stderr=full).returncode == 1
        )


def test_a_terminal_of_no_width_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """As some CI and `script` make one: tqdm draws nothing there, so neither bar nor lines were seen."""
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
        for columns, drawn in ((0, False), (80, True)):
            fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            with progress.Progress(10, "epoch 3") as shown:
                assert (shown.bar is not None) == drawn
                shown.update(5)
            said = os.read(leader, 4096).decode()
            assert "5/10" in said or drawn
    os.close(leader)


def test_a_folder_that_is_gone_and_imports_without_memory(tmp_path: Path) -> None:
    begin = "from ffcv_imnet.core.errors import begin_script\nbegin_script(lambda: None)\n"
    code = begin + "raise ImportError('libtorch.so: failed to map segment from shared object')"
    cases = {f"cd {tmp_path}; rmdir {tmp_path}": (begin, 2), "true": (code, 1)}
    for before, (text, status) in cases.items():
        words = f'{before}; exec {sys.executable} -c "{text}"'
        done = subprocess.run(
            ["bash", "-c", words],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(Path.cwd())},
        )
        assert (done.returncode, done.stderr.count("\n")) == (status, 1), done.stderr
        assert done.stderr.startswith(("error: the current folder is gone", "error: out of memory"))


def test_too_little_memory_for_the_imports_is_one_sentence() -> None:
    code = "from ffcv_imnet.core.errors import run_main\ndef main():\n    raise {}\nrun_main(main)"
    for error in ("MemoryError", "ImportError('libtorch.so: failed to map segment')"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(error)], capture_output=True, text=True
        )
        assert done.returncode == 1 and done.stderr.startswith("error: out of memory")
        assert done.stderr.count("\n") == 1


def test_a_link_to_itself_leaves_nothing(tmp_path: Path) -> None:
    """A rename between two names of one file does nothing, and would leave the partial name."""
    (tmp_path / "last").write_bytes(b"x")
    for _ in range(2):
        link(tmp_path / "last", tmp_path / "best")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "last"]
