"""Wall clocks that a test sets, in every process of a run at once, without asking the processes.

A small library is loaded before all others (LD_PRELOAD). It adds to the time of day what stands in
a file that all processes have mapped; the monotonic clock it leaves alone. Each process that it
reached leaves its number.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import time
from pathlib import Path

import pytest

_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile double *shift_s;
static int (*true_gettime)(clockid_t, struct timespec *);

static void reached(void) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%d", getenv("SET_CLOCKS_REACHED"), (int)getpid());
  int out = open(path, O_CREAT | O_WRONLY, 0600);
  if (out >= 0) close(out);
}

__attribute__((constructor)) static void begin(void) {
  true_gettime = dlsym(RTLD_NEXT, "clock_gettime");
  int in = open(getenv("SET_CLOCKS_SHIFT"), O_RDONLY);
  if (in < 0) return;
  void *at = mmap(0, sizeof(double), PROT_READ, MAP_SHARED, in, 0);
  close(in);
  if (at == MAP_FAILED) return;
  shift_s = at;
  reached();
  pthread_atfork(0, 0, reached);
}

int clock_gettime(clockid_t which, struct timespec *at) {
  if (!true_gettime) true_gettime = dlsym(RTLD_NEXT, "clock_gettime");
  int failed = true_gettime(which, at);
  if (!failed && shift_s && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) {
    double all = (double)at->tv_nsec * 1e-9 + *shift_s;
    double whole = floor(all);
    at->tv_sec += (time_t)whole;
    at->tv_nsec = (long)((all - whole) * 1e9) % 1000000000L;
  }
  return failed;
}

int gettimeofday(struct timeval *at, void *zone) {
  struct timespec now;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &now);
  at->tv_sec = now.tv_sec;
  at->tv_usec = now.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *at) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (at) *at = now.tv_sec;
  return now.tv_sec;
}
"""


class SetClocks:
    """The shared clock of all processes that are started with ``environment``."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            pytest.skip("no C compiler to build the clock with")
        folder.mkdir(parents=True, exist_ok=True)
        source, library = folder / "clock.c", folder / "clock.so"
        source.write_text(_SOURCE)
        libraries = ("-ldl", "-lm", "-lpthread")
        build = [compiler, "-O1", "-shared", "-fPIC", "-o", library, source, *libraries]
        subprocess.run(build, check=True)
        self._shift = folder / "shift"
        self._reached = folder / "reached"
        self._reached.mkdir()
        self.set(0.0)
        self.environment = {
            **os.environ,
            "LD_PRELOAD": str(library),
            "SET_CLOCKS_SHIFT": str(self._shift),
            "SET_CLOCKS_REACHED": str(self._reached),
        }

    def set(self, ahead_s: float) -> None:
        """From now on the time of day is ahead of the true one by so much, everywhere."""
        if not self._shift.exists():
            self._shift.write_bytes(struct.pack("d", ahead_s))
            return
        with self._shift.open("r+b") as out:
            out.write(struct.pack("d", ahead_s))

    def reached(self) -> set[int]:
        """Numbers of all processes that have had this clock."""
        return {int(path.name) for path in self._reached.iterdir()}

    def says(self) -> float:
        """What a process with this clock takes for the distance from the true time of day."""
        told = subprocess.run(
            ["python3", "-c", "import time; print(time.time())"],
            env=self.environment,
            capture_output=True,
            check=True,
            text=True,
        )
        return float(told.stdout) - time.time()
