"""The main job at the command line: `python -m jaxbptt`."""

import sys

from jaxbptt._demo.cli import main

if __name__ == "__main__":
    sys.exit(main())
