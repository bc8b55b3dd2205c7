"""Writing files: whole or not at all. Whatever Festina writes goes through `replacing` or `append`."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def check_target(path: str | os.PathLike[str], *, may_be_device: bool = False) -> Path:
    """The file that a write to `path` changes, symbolic links followed. Nothing is written.

    Args:
        path: where a file is to be written.
        may_be_device: it may be a device or pipe, which can be written to but not replaced.

    Raises:
        FileNotFoundError: its folder does not exist.
        IsADirectoryError, NotADirectoryError: it is a folder, or lies in what is not one.
        PermissionError: it is write-protected.
        OSError: it is a loop of links, or a device, pipe or socket.
    """
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    if target.is_dir():
        raise IsADirectoryError(f"{path} must be a file to write, but is a folder; add a name to it")
    if not target.parent.exists():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {target.parent}; create it first")
    if not target.parent.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {target.parent} is not a folder")
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(f"{path} cannot be written: it is write-protected")
    if target.exists() and not target.is_file() and not may_be_device:
        raise OSError(f"{path} must be a regular file to be replaced, but is a device, pipe or socket")
    return target


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write the new content of `path`: once the block ends, `path` has it; if the block fails, `path` is as before.

    The block writes to a file of the same name in a temporary folder beside `path`, which is flushed to the disk and renamed.
    Any other file that the block writes beside it moves along, before it. The new file has the permissions and, as far as the
    system allows, the owner of the old one; those of any new file, if there was none. A symbolic link stays one: the file that
    it names is replaced.

    Raises:
        OSError: as `check_target`, or the disk fails.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(Path(folder) / "a.txt") as unfinished:
    ...         _ = unfinished.write_text("all of it")
    ...     (Path(folder) / "a.txt").read_text()
    'all of it'
    """
    target = check_target(path)
    before = target.stat() if target.exists() else None
    folder = target.with_name(f".festina-{secrets.token_hex(8)}")
    try:
        folder.mkdir()
        yield folder / target.name
        # The folder has what the umask or the parent's default ACL leaves of 0o777; some writers make files of 0o600.
        mode = before.st_mode if before else folder.stat().st_mode & 0o666
        beside = [file for file in folder.iterdir() if file.name != target.name]
        written = [*beside, folder / target.name]
        for file in written:
            _flush(file)
            if before:
                with suppress(OSError):  # only an administrator can give a file away
                    os.chown(file, before.st_uid, before.st_gid)
            file.chmod(stat.S_IMODE(mode))
        for file in written:
            file.replace(target.with_name(file.name))
    except OSError as error:
        if error.errno is not None:
            error.filename, error.filename2 = str(path), None  # the user knows nothing of the temporary folder
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # the file is in place; not every file system can flush a folder
        _flush(target.parent)


def append(path: str | os.PathLike[str], text: str) -> None:
    """Append text in UTF-8 to a file, all of it or, after an error, none; the file is created if it is missing.

    Raises:
        OSError: as `check_target`, or the disk fails.
    """
    target = check_target(path, may_be_device=True)
    is_regular = target.is_file() or not target.exists()
    with target.open("ab", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        rest = text.encode()
        try:
            while rest:
                rest = rest[file.write(rest) :]
            if is_regular:
                os.fsync(file.fileno())
        except BaseException:
            if is_regular:
                os.ftruncate(file.fileno(), end)
            raise


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
