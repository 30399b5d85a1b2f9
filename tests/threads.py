"""Threads that switch as often as Python allows."""

import sys
import threading


def run_threads(work, count=4):
    """Call `work(k)` in `count` threads at once, and switch threads every microsecond."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(k,)) for k in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
