"""Speed and memory, each against a floor or a peer in the same run."""

from runtime.errors import silence_libraries

silence_libraries()
