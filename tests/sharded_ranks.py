"""What the ranks of a test run: several stages one after the other, for one start of the processes.

``python sharded_ranks.py JOB.json ...``, started as ``ftpipe.worker`` is.
"""

from __future__ import annotations

import gc
import sys

from ftpipe import worker


def main(jobs: list[str]) -> int:
    for job in jobs:
        code = worker.main([job])
        if code:
            return code
        gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
