"""`recipes/finetune.py` as on another system than Linux: ``SYSTEM=Darwin python tests/elsewhere.py FLAGS``.

What only Linux, or only Unixes have is taken away once the libraries are imported, and processes are spawned, not
forked: a loader process imports this file anew, so it is taken away there as well.
"""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import multiprocessing.popen_spawn_posix
import os
import platform
import signal
import sys
from pathlib import Path
from typing import Any

import recipe_runs

import tuning.data.pictures  # noqa: F401  # what a loader process imports

LINUX_ONLY = {
    os: ("sched_getaffinity", "memfd_create", "register_at_fork", "O_DIRECTORY"),
    signal: ("sigtimedwait",),
}
UNIX_ONLY = {
    os: ("fork", "forkpty", "killpg", "setsid", "getuid", "geteuid", "getpgid", "uname", "pwrite", "nice"),
    signal: ("SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGALRM", "pthread_sigmask", "setitimer", "alarm"),
    mmap: ("PROT_READ", "MAP_SHARED"),
}
SYSTEMS: dict[str, tuple[str, Any]] = {"Darwin": ("darwin", LINUX_ONLY), "Windows": ("win32", UNIX_ONLY)}
UNIX_MODULES = ("fcntl", "resource", "termios", "pwd", "grp")


def become(system: str) -> None:
    """Take away what *system*, as `platform.system` calls it, doesn't have; there is no libc either."""
    for module, names in (*LINUX_ONLY.items(), *SYSTEMS[system][1].items()):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    if system == "Windows":
        sys.modules.update(dict.fromkeys(UNIX_MODULES))  # importing one raises ImportError
    platform.system = lambda: system
    platform.libc_ver = lambda *args, **options: ("", "")  # type: ignore[assignment]
    ctypes.CDLL = _refused  # type: ignore[assignment,misc]
    sys.platform = SYSTEMS[system][0]


def _refused(*args: object, **options: object) -> None:
    raise OSError(f"CDLL{args}: not on this system")


if __name__ == "__main__":
    recipe_runs.import_once()
if __name__ in ("__main__", "__mp_main__"):
    become(os.environ["SYSTEM"])
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    sys.path.insert(0, str(Path(recipe_runs.ROOT) / "recipes"))
    sys.exit(recipe_runs.finetune_here(*sys.argv[1:]))
