"""One merge in a warm interpreter: start-up and work timed apart. Prints one JSON line.

``in_process.py RECIPE OUT WARM_RECIPE WARM_OUT`` is run in the folder that the recipes' models are relative to. The
warm-up merge, of a model of a few kilobytes with the same method, brings in every module that is imported on first
use; it counts as start-up.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    """Merge twice, time the second."""
    born = time.perf_counter()
    from mergekit_lr import merge

    recipe, out, warm_recipe, warm_out, *memory = sys.argv[1:]
    merge(warm_recipe, warm_out, device="cpu")
    started, cpu = time.perf_counter(), time.process_time()
    merge(recipe, out, device="cpu", max_memory=memory[0] if memory else None)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "cpu": time.process_time() - cpu, "start_up": started - born}))


if __name__ == "__main__":
    main()
