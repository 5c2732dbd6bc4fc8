"""One merge in a warm interpreter: start-up and work timed apart. Prints one JSON line.

``in_process.py RECIPE OUT WARM_RECIPE WARM_OUT`` is run in the folder that the recipes' models are relative to. The
warm-up merge, of a model of a few kilobytes with the same method, brings in every module that is imported on first
use; it counts as start-up.
"""

from __future__ import annotations

import json
import resource
import sys
import time


def cpu_seconds() -> float:
    """CPU time of this process and of the children it has waited for."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def main() -> None:
    """Merge twice, time the second."""
    born = time.perf_counter()
    from mergekit_lr import merge

    recipe, out, warm_recipe, warm_out, *memory = sys.argv[1:]
    merge(warm_recipe, warm_out, device="cpu")
    started, cpu = time.perf_counter(), cpu_seconds()
    merge(recipe, out, device="cpu", max_memory=memory[0] if memory else None)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "cpu": cpu_seconds() - cpu, "start_up": started - born}))


if __name__ == "__main__":
    main()
