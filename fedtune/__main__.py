"""`python -m fedtune`: the command `fedtune`, of the interpreter that runs it."""

from fedtune.cli.main import main

if __name__ == "__main__":
    main()
