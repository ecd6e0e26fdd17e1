"""A clock that a test can set, for the programs of one machine.

They see the time of day through a library that is loaded before libc and adds to it what a file
says, so that a jump reaches Python, Flower and OpenSSL alike, in every process, also while it runs.
Monotonic time is left as it is, as it is where somebody sets a clock.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
LIBRARY = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile long long *ahead;  /* seconds, in a file that a test writes */

__attribute__((constructor)) static void begin(void) {
    int file = open(CLOCK_AHEAD, O_RDONLY | O_CLOEXEC);
    void *seen = file < 0 ? MAP_FAILED : mmap(0, 8, PROT_READ, MAP_SHARED, file, 0);
    if (file >= 0) close(file);
    ahead = seen == MAP_FAILED ? 0 : seen;
}

int clock_gettime(clockid_t which, struct timespec *found) {
    int failed = syscall(SYS_clock_gettime, which, found);
    if (!failed && ahead && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE))
        found->tv_sec += *ahead;
    return failed;
}

int gettimeofday(struct timeval *restrict found, void *restrict zone) {
    struct timespec now;
    int failed = clock_gettime(CLOCK_REALTIME, &now);
    found->tv_sec = now.tv_sec, found->tv_usec = now.tv_nsec / 1000;
    return failed;
}

time_t time(time_t *found) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (found) *found = now.tv_sec;
    return now.tv_sec;
}
"""


class Clock:
    """folder: where the library lies, which all that go by this clock may read; environment: what
    they are started with."""

    def __init__(self, folder: Path) -> None:
        source, library = folder / "clock.c", folder / "clock.so"
        source.write_text(LIBRARY)
        self._ahead = folder / "clock.ahead"
        self._ahead.write_bytes(bytes(8))
        words = ["cc", "-shared", "-fPIC", "-O2", f'-DCLOCK_AHEAD="{self._ahead}"']
        subprocess.run([*words, "-o", library, source], check=True)
        self.environment = {"LD_PRELOAD": str(library)}

    def set(self, hours: int) -> None:
        """Set it, so many hours before the true time."""
        with self._ahead.open("r+b") as file:  # the same file: programs have it mapped
            file.write((hours * 3600).to_bytes(8, "little", signed=True))
