"""`python -m questctl`: the same program, by the interpreter that is wanted."""

from .cli.app import main

if __name__ == "__main__":
    main()
