"""One process at a time in a work directory."""

import os
import socket
from pathlib import Path
from types import TracebackType

from vitft_jax import processes
from vitft_jax.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FILE = "lock"


class Lock:
    """Holds a work directory for this process; a context manager.

    The directory is made where there is none, and removed again at the end if nothing was put into it. The lock is the
    kernel's (flock on a file `lock`), so it goes with the process, however that ends; the file alone means nothing. Of several
    processes that train together, the first holds it for all. Where a system has no flock, nothing is held.
    """

    def __init__(self, folder: Path, flag: str = "--workdir") -> None:
        """Of a folder that the user named by this flag."""
        self._file = folder / FILE
        self._flag = flag
        self._made: list[Path] = []  # inner to outer
        self._descriptor: int | None = None

    def __enter__(self) -> "Lock":
        """Raises InputError if another process has the directory, or it cannot be one."""
        if processes.first():
            folder = self._file.parent
            try:
                self._made = [path for path in (folder, *folder.parents) if not path.exists()]
                folder.mkdir(parents=True, exist_ok=True)
                self._take()
            except FileExistsError:
                raise InputError(f"{self._flag} {folder}: is a file") from None
            except OSError as error:
                self.__exit__(None, None, None)
                raise InputError(
                    f"{self._flag} {folder}: {error.strerror}; choose one that can be written to"
                ) from error
        return self

    def _take(self) -> None:
        while True:
            self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if fcntl is None:
                    break
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(self._descriptor, 200).decode(errors="replace")
                os.close(self._descriptor)
                self._descriptor = None
                raise InputError(
                    f"{self._flag} {self._file.parent}: in use by {owner or 'another process'}; "
                    f"wait for it to end, or choose another {self._flag}"
                ) from None
            # The holder before may have removed the file since it was opened; what counts is the one that is there now.
            if self._file.exists() and os.path.samestat(os.fstat(self._descriptor), self._file.stat()):
                break
            os.close(self._descriptor)
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._descriptor is not None:
            self._file.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None
        for folder in self._made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
