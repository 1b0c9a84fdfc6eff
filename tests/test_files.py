"""Writing: whole or not at all, under names that cannot be foreseen, with the old one's mode, and through no link."""

import errno
import os
import re
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from smollm3_jax import files
from smollm3_jax.errors import SaveError

ROOT = Path(__file__).parents[1]


def tree(folder: Path) -> dict[str, bytes | str | None]:
    """Everything below a folder: contents of files, targets of links, None for folders."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture
def victim(tmp_path) -> Iterator[Path]:
    """A folder outside that nothing may change; checked at the end."""
    folder = tmp_path / "elsewhere" / "victim"
    folder.mkdir(parents=True)
    (folder / "diary.txt").write_text("dear diary")
    (folder / "deep").mkdir()
    yield folder
    assert tree(folder) == {"diary.txt": b"dear diary", "deep": None}


@pytest.fixture
def base(tmp_path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    return folder


# Files


@pytest.mark.parametrize("content", [b"\x00\xff", "ä", ""])
def test_write(content, base):
    """Replaces and makes, and leaves nothing beside."""
    for _ in range(2):
        files.write(base / "file", content)
        assert tree(base) == {"file": content.encode() if isinstance(content, str) else content}


def test_names_cannot_be_foreseen(base, monkeypatch):
    """Two writings of a file go through two names, each new: what lies there already is not written to."""
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(Path(a).name), replace(a, b)))
    for _ in range(2):
        files.write(base / "file", b"x")
    assert len(set(seen)) == 2 and all(re.fullmatch(r"\.file\.[0-9a-f]{16}\.tmp", name) for name in seen)
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "0")
    (base / ".file.0.tmp").write_text("somebody's")
    with pytest.raises(FileExistsError):
        files.write(base / "file", b"y")
    assert tree(base) == {"file": b"x", ".file.0.tmp": b"somebody's"}


def test_a_planted_temporary_name_is_not_followed(base, victim, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "0")
    for target in (victim / "diary.txt", victim / "new.txt"):
        (base / ".file.0.tmp").symlink_to(target)
        with pytest.raises(FileExistsError):
            files.write(base / "file", b"y")
        (base / ".file.0.tmp").unlink()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o666, 0o755, 0o4711])
def test_mode_is_kept(mode, base):
    file = base / "file"
    file.write_text("old")
    file.chmod(mode)
    files.write(file, b"new")
    assert file.read_bytes() == b"new" and mode_of(file) == mode


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_umask_decides_on_what_is_new(umask, base):
    before = os.umask(umask)
    try:
        files.write(base / "file", b"x")
        files.append(base / "log", b"x")
        os.close(files.locked(base / "lock"))
        with files.new_folder(base / "folder") as new:
            assert mode_of(new) == 0o700
            files.write(new / "file", b"x")
    finally:
        os.umask(before)
    assert mode_of(base / "file") == mode_of(base / "log") == mode_of(base / "lock") == 0o666 & ~umask
    assert mode_of(base / "folder") == 0o777 & ~umask and mode_of(base / "folder" / "file") == 0o666 & ~umask


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_owner_and_setgid_are_kept(base):
    file, folder = base / "file", base / "folder"
    file.write_text("old")
    folder.mkdir()
    (folder / "a").write_text("old")
    (folder / "kept").mkdir()
    for path, uid in ((file, 1234), (folder, 1235), (folder / "a", 1236), (folder / "kept", 1237)):
        os.chown(path, uid, 4321)
    folder.chmod(0o2750)
    file.chmod(0o4750)  # set anew after the owner, who takes it away
    files.write(file, b"new")
    with files.new_folder(folder) as new:
        files.write(new / "a", b"new")
        files.write(new / "b", b"new")
        files.carry(folder / "kept", new / "kept")
    found = {path: (path.stat().st_uid, path.stat().st_gid) for path in (file, folder, *folder.iterdir())}
    assert found == {
        file: (1234, 4321),
        folder: (1235, 4321),
        folder / "a": (1236, 4321),
        folder / "b": (0, 4321),  # as for any file that is made in a folder with setgid
        folder / "kept": (1237, 4321),
    }
    assert mode_of(file) == 0o4750 and mode_of(folder) == 0o2750


def test_a_group_that_cannot_be_kept_gets_no_more_than_everybody(base, monkeypatch):
    file = base / "file"
    file.write_text("old")
    file.chmod(0o2664)

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "chown", refuse)
    stat_ = os.stat

    def another_group(path, **more):
        found = stat_(path, **more)
        return os.stat_result([*found[:5], found.st_gid + 1, *found[6:10]])

    monkeypatch.setattr(os, "stat", another_group)
    files.write(file, b"new")
    assert mode_of(file) == 0o644


@pytest.mark.parametrize("what", ["file", "nothing", "folder", "itself"])
def test_a_link_is_refused(what, base, victim):
    link = base / "link"
    target = {"file": victim / "diary.txt", "nothing": victim / "new", "folder": victim, "itself": link}[what]
    link.symlink_to(target)
    for call in (
        lambda: files.write(link, b"x"),
        lambda: files.append(link, b"x"),
        lambda: files.locked(link),
        lambda: files.new_folder(link).__enter__(),
    ):
        with pytest.raises(
            OSError, match=rf"it is a link, to {re.escape(str(target))}; name the f\w+ itself"
        ) as caught:
            call()
        assert caught.value.errno == errno.ELOOP
    assert tree(base) == {"link": str(target)}


@pytest.mark.parametrize("what", ["pipe", "folder"])
def test_what_is_no_file_is_refused(what, base):
    """And without waiting for somebody at the other end of a pipe."""
    path = base / "x"
    os.mkfifo(path) if what == "pipe" else path.mkdir()
    for call in (files.write, files.append):
        with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
            call(path, b"x")
    with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
        files.locked(path)
    assert [entry.name for entry in base.iterdir()] == ["x"]


def test_devices_are_written_to(capfdbinary):
    """A user who writes a chart to /dev/stdout or /dev/null means that, and root could replace it."""
    for name in ("/dev/stdout", "/dev/fd/1"):
        files.write(name, name)
        assert capfdbinary.readouterr().out == name.encode()
    files.write("/dev/null", b"nothing")
    assert Path("/dev/stdout").is_symlink() and stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_fails_leaves_the_file_alone(old, error, base):
    if old is not None:
        (base / "file").write_bytes(old)
    before = tree(base)
    with pytest.raises(error), files.new_file(base / "file") as file:
        file.write(b"half of it")
        raise error
    with pytest.raises(UnicodeEncodeError):
        files.write(base / "file", "\ud800")
    assert tree(base) == before


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_fails(step, base, monkeypatch):
    """X3: the old content stays, and nothing beside it."""
    files.write(base / "file", b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        files.write(base / "file", b"new")
    assert tree(base) == {"file": b"old"}


def test_on_the_disk_before_it_is_in_place(base, monkeypatch):
    events = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_ino), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    files.write(base / "file", b"x")
    assert events == [(base / "file").stat().st_ino, "replace", base.stat().st_ino]


def test_a_library_may_open_it_by_name(base):
    with files.new_file(base / "file") as file:
        Path(file.name).write_bytes(b"by name")
        assert not (base / "file").exists()
    assert tree(base) == {"file": b"by name"}


@pytest.mark.parametrize("name", ["none/file", "folder", "link", "a\0b", "x" * 300])
def test_what_a_user_names(name, base):
    (base / "folder").mkdir()
    (base / "link").symlink_to("elsewhere")
    with pytest.raises(SaveError, match=r"cannot be written: \S") as caught:
        files.write_output(base / name, "text")
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
    files.write_output(base / "file", "text")
    assert tree(base) == {"folder": None, "link": "elsewhere", "file": b"text"}


def test_what_kills_left_of_files_is_found(base):
    """Those of the names that `write` draws alone, and where asked only after a while."""
    for name in (f".log.{'0' * 16}.tmp", f".log.{'x' * 16}.tmp", ".tmp", "log.tmp", f".new.{'1' * 16}.partial"):
        files.write(base / name, "half")
    (base / f".link.{'0' * 16}.tmp").symlink_to("log.tmp")
    assert [path.name for path in files.unfinished(base)] == [f".log.{'0' * 16}.tmp"]
    assert files.unfinished(base, 60.0) == []


def test_append(base):
    for text in ("a\n", "ä\n"):
        files.append(base / "log", text)
    assert (base / "log").read_text(encoding="utf-8") == "a\nä\n"


def test_what_is_appended_is_whole_or_not_there(base):
    """A disk that is full after three bytes of it."""
    files.append(base / "log", "a\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            files.append(base / "log", "half a line\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    files.append(base / "log", "b\n")
    assert (base / "log").read_text() == "a\nb\n"


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127, "new\nline", "-f"])
def test_odd_names(name, base):
    files.write(base / name, b"x")
    assert tree(base) == {name: b"x"}
    files.remove(base / name)
    with files.new_folder(base / name) as new:
        files.write(new / name, b"y")
    assert tree(base) == {name: None, f"{name}/{name}": b"y"}


def test_object_stores(base, monkeypatch):
    """There, an object is whole or not there."""
    from etils import epath

    written = []
    store = type(epath.Path("gs://bucket/x"))
    monkeypatch.setattr(store, "write_bytes", lambda path, content: written.append((os.fspath(path), content)))
    files.write("gs://bucket/x", "text")
    files.write(epath.Path("gs://bucket/y"), b"bytes")
    assert written == [("gs://bucket/x", b"text"), ("gs://bucket/y", b"bytes")]


# Locks


def test_lock(base):
    script = (
        "import sys; from smollm3_jax.files import locked; locked(sys.argv[1]); print('locked', flush=True); input()"
    )
    command = [sys.executable, "-c", script, str(base / "lock")]
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    with subprocess.Popen(command, text=True, **options) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(BlockingIOError):
            files.locked(base / "lock")
        other.kill()
        other.wait()
        os.close(files.locked(base / "lock"))  # it died with its process


def test_a_lock_leaves_what_is_there(base):
    (base / "lock").write_text("somebody's")
    os.close(files.locked(base / "lock"))
    assert tree(base) == {"lock": b"somebody's"}


# Folders


def test_new_folder(base):
    for content in (b"1", b"2"):
        with files.new_folder(base / "deep" / "down") as new:
            files.write(new / "file", content)
        assert tree(base) == {"deep": None, "deep/down": None, "deep/down/file": content}


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o750, 0o2770])
def test_modes_of_a_folder_are_kept(mode, base):
    """Also of the files in it: one of a new name is open to no more than those of the same kind were."""
    folder = base / "folder"
    folder.mkdir()
    folder.chmod(mode)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("old")
        (folder / name).chmod(0o600)
    (folder / "kept").mkdir()
    (folder / "kept").chmod(0o711)
    (folder / "kept" / "deep.txt").touch(mode=0o640)
    with files.new_folder(folder) as new:
        for name in ("config.json", "model-00001-of-00002.safetensors", "notes.txt"):
            files.write(new / name, b"new")
        files.carry(folder / "kept", new / "kept")
    assert mode_of(folder) == mode
    assert {name: mode_of(folder / name) for name in ("config.json", "model-00001-of-00002.safetensors")} == {
        "config.json": 0o600,
        "model-00001-of-00002.safetensors": 0o600,
    }
    assert mode_of(folder / "notes.txt") == 0o666 & ~_umask()
    assert mode_of(folder / "kept") == 0o711 and mode_of(folder / "kept" / "deep.txt") == 0o640


def _umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(
    "end", ["partial", "previous", "lock", "0123456789abcdef.partial", "0123456789abcdef.previous"]
)
def test_links_beside_a_folder_are_not_followed(end, there, base, victim):
    """What lies beside under any of our names may lead anywhere: nothing of it is deleted or written."""
    if there:
        with files.new_folder(base / "out") as new:
            files.write(new / "file", b"old")
    (base / f".out.{end}").symlink_to(victim)
    if end == "lock":
        with pytest.raises(OSError, match="it is a link"), files.new_folder(base / "out"):
            pass
    else:
        with files.new_folder(base / "out") as new:
            files.write(new / "file", b"new")
        assert (base / "out" / "file").read_bytes() == b"new"
    assert os.readlink(base / f".out.{end}") == str(victim)


def test_links_within_what_is_removed_are_not_followed(base, victim):
    left = base / ".out.0123456789abcdef.partial"
    left.mkdir()
    (left / "link").symlink_to(victim)
    (left / "file").symlink_to(victim / "diary.txt")
    with files.new_folder(base / "out") as new:
        (new / "link").symlink_to(victim)
    assert tree(base) == {"out": None, "out/link": str(victim)}
    files.remove(base / "out")
    (base / "link").symlink_to(victim)
    files.remove(base / "link")
    assert tree(base) == {}


def test_what_is_not_ours_beside_a_folder_stays(base):
    others = [".out.partial", ".out.previous", ".out.x.partial", ".out.0123456789ABCDEF.partial", "out.partial"]
    for name in others:
        (base / name).mkdir()
        (base / name / "file").write_text("x")
    (base / ".out.lock").write_text("somebody's")
    with files.new_folder(base / "out"):
        pass
    assert {path.name for path in base.iterdir()} == {*others, "out", ".out.lock"}


def test_one_writer_at_a_time(base):
    with files.new_folder(base / "out") as new:
        files.write(new / "file", b"first")
        with pytest.raises(BlockingIOError), files.new_folder(base / "out"):
            pass
        with files.new_folder(base / "other"):
            pass
    assert tree(base) == {"out": None, "out/file": b"first", "other": None}


def test_carry(base, victim):
    old, new = base / "old", base / "new"
    (old / "deep").mkdir(parents=True)
    new.mkdir()
    (old / "file").write_text("x")
    (old / "link").symlink_to(victim)
    (old / "deep" / "link").symlink_to("nowhere")
    os.mkfifo(old / "deep" / "pipe")
    for path in old.iterdir():
        files.carry(path, new / path.name)
    assert tree(new) == tree(old)


def test_carry_without_hard_links(base, monkeypatch):
    """The copies have the mode of what they are copies of."""
    (base / "old").mkdir()
    (base / "old" / "file").write_text("x")
    (base / "old" / "file").chmod(0o640)
    (base / "old" / "link").symlink_to("nowhere")

    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    files.carry(base / "old", base / "new")
    assert tree(base / "new") == tree(base / "old") and mode_of(base / "new" / "file") == 0o640


# The whole tree

# What makes, replaces or locks a file by itself.
BY_ITSELF = re.compile(
    r"""\bos\.(replace|rename|renames|link|symlink|truncate|chmod|chown)\(|\bos\.open\((?!os\.devnull)"""
    r"""|\.(write_text|write_bytes|rmtree)\(|\bshutil\.(copy|copy2|copyfile|copytree|move|rmtree)\(|\bfcntl\."""
    r"""|\bopen\([^"'\n]*["'][rbt+]*[wax+][rbt+]*["']|\bsavefig\((?!drawn|file\b)|\bnp\.save"""
)
# Into one that files.py has opened; to read; nowhere; standard output.
BELONGS = ("gzip.open(file,", "os.open(path, os.O_RDONLY ", "open(os.devnull, ", "open(os.dup(1), ")


def test_nothing_else_writes_a_file():
    """Every place that writes goes through files.py; what libraries write (Orbax, TensorBoard, JAX) is theirs."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in ("smollm3_jax", "sharding", "scripts")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.name != "files.py"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if BY_ITSELF.search(line) and not any(part in line for part in BELONGS)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        *('open(path, "w")', "open(x, mode='ab')", 'path.open("xb")', "os.replace(a, b)", "p.write_text(x)"),
        *("shutil.rmtree(x)", "shutil.copyfile(a, b)", "fcntl.flock(f, 2)", "figure.savefig(path)", "os.open(x, 1)"),
    ],
)
def test_that_test(line):
    assert BY_ITSELF.search(line)
