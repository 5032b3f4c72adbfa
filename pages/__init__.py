"""Pages to look at: a run, several runs, a cache. Each is one HTML file that needs no network.

Folders are read as files; nothing here imports a stage. What people share must not tell of their
machine: pages show names of files and folders, never paths.
"""
