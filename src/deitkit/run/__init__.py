"""Run folders: their files, reading and writing them, and the interface of an observer. Nothing here trains."""
