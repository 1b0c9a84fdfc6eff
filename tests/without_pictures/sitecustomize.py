"""On the path of the runs that tests start: no picture at their ends, which is a fifth of the time of a tiny run.

The picture itself is in tests/train/run/test_report.py.
"""

import sys

sys.modules["matplotlib"] = None  # pyright: ignore[reportArgumentType]
