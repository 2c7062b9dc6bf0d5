"""Run the command line as `python -m tmemfs`."""

from tmemfs.cli import main

if __name__ == "__main__":
    main()
