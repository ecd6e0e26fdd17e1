"""Run the command `fedtune` by `python -m fedtune`, with the interpreter that runs this module."""

from fedtune.cli.main import main

if __name__ == "__main__":
    main()
