"""``python -m launch TARGET [options] -- recipes/X.py FLAGS``."""

import sys

from launch.command_line import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
