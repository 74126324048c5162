"""All tests of this project, and its benchmark, with no network and nothing but the four packages.

    python test_qcrd.py              every test; ends with the line `N passed, N failed`
    python test_qcrd.py vote loss    the tests whose names contain one of these words
    python test_qcrd.py bench        speed and memory, no pass or fail
"""
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"            # real data for more tests, where it is there


class Skip(Exception):
    """Raised by a test that cannot run here; its text says what is missing."""


# ---------------------------------------------------------------- t5.py

# ---------------------------------------------------------------- fetch_data.py

# ---------------------------------------------------------------- qcrd.py

# ---------------------------------------------------------------- benchmark


def bench() -> None:
    print("nothing to time yet")


def main() -> int:
    words = sys.argv[1:]
    if words == ["bench"]:
        bench()
        return 0
    tests = [(name, f) for name, f in globals().items() if name.startswith("test_") and callable(f)]
    tests = [(name, f) for name, f in tests if not words or any(w in name for w in words)]
    passed = failed = skipped = 0
    for name, f in tests:
        start = time.perf_counter()
        try:
            f()
            passed, verdict = passed + 1, "ok"
        except Skip as why:
            skipped, verdict = skipped + 1, f"skipped: {why}"
        except Exception:
            failed, verdict = failed + 1, "FAILED\n" + traceback.format_exc()
        print(f"{time.perf_counter() - start:6.1f} s  {name}  {verdict}", flush=True)
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return 1 if failed or not tests else 0


if __name__ == "__main__":
    sys.exit(main())
