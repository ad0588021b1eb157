# Copies lines, each with the time at which it came.
import sys
import time

for line in sys.stdin:
    print(f"{time.monotonic():.6f}", line, end="", flush=True)
