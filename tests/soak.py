"""Mixed calls from several Python threads for three minutes (or the seconds given): the memory of
the process must stay flat and every result the same as at first.

    python tests/soak.py [seconds]
"""

import sys
import threading
import time
from pathlib import Path

import numpy as np

import fastnorm

THREADS = 4


def resident():
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def calls():
    """Functions that compute the same bytes every time."""
    rng = np.random.default_rng(0)
    for shape in ((8, 32, 28, 28), (2, 64, 7, 7), (300, 96), (1, 3, 65, 67), (64, 768)):
        for dtype in (np.float32, np.float64, np.float16):
            x, dy, residual = rng.normal(1, 2, (3, *shape)).astype(dtype)
            for activation in (None, "relu", "gelu"):
                after = {"activation": activation, "residual": residual}

                def batch(x=x, dy=dy, after=after):
                    y, stats = fastnorm.batch_norm(x, training=True, return_stats=True, **after)
                    return y, *fastnorm.batch_norm_backward(dy, x, stats, **after)

                def rows(x=x, after=after):
                    return fastnorm.layer_norm(x, x.shape[-1], **after)

                yield batch
                yield rows


def digest(arrays):
    return hash(tuple(a.tobytes() for a in arrays))


def main(seconds):
    work = [(call, digest(call())) for call in calls()]
    counts, wrong = [0] * THREADS, []
    end = time.monotonic() + seconds

    def run(thread):
        rng = np.random.default_rng(thread)
        while time.monotonic() < end and not wrong:
            call, wanted = work[rng.integers(len(work))]
            if digest(call()) != wanted:
                wrong.append(call)
            counts[thread] += 1

    threads = [threading.Thread(target=run, args=(n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    time.sleep(min(10, seconds / 4))  # allocators have found their level
    before = resident()
    for thread in threads:
        thread.join()
    grown = resident() - before
    print(f"{sum(counts)} calls, memory grew by {grown / 2**20:.1f} MiB of {before / 2**20:.0f}")
    if wrong:
        sys.exit("a result changed")
    if grown > 32 << 20:
        sys.exit("memory grows")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 180)
