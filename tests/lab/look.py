# Runs a program again and again, and prints when each run began and ended and whether its output has a text.
import subprocess
import sys
import time

text, *command = sys.argv[1:]
while True:
    begun = time.monotonic()
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    print(f"{begun:.6f}", f"{time.monotonic():.6f}", "there" if text in output else "not there", flush=True)
    # The machine has one processor, which is measured.
    time.sleep(0.03)
