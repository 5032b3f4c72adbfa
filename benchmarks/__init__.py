"""Speed and memory, each against a floor or a peer in the same run."""

from cli_door import hush_libraries

hush_libraries()
