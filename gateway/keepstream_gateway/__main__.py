"""A gateway process: ``python -m keepstream_gateway``."""

from keepstream_gateway.server import main

if __name__ == "__main__":
    main()
