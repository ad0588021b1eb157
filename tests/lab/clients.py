# A program that hears of devices by libudev, as any of them would do it. It prints when, what and which.
import time

import pyudev

monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source="udev")
monitor.start()
print("listening", flush=True)
for device in iter(monitor.poll, None):
    print(f"{time.monotonic():.6f}", device.action, device.device_path, device.get("DEVNAME", ""), flush=True)
