"""python3 -m hack.kueue: build Kueue into the cache, unless it is there."""

from hack.kueue.build import build

print(build())
