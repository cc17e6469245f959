"""Run the command line as `python -m questctl`, with the interpreter of your choice."""

from .cli.app import main

if __name__ == "__main__":
    main()
