"""What a run needs of the machine: files, signals, threads, processes, a terminal."""
