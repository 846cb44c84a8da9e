"""The command line as a module: ``python -m keepstream_worker.commands``."""

from keepstream_worker.commands.entry import main

main()
