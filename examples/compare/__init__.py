"""What other projects do, shown by their own code: docs/comparison.md explains each line.

    python -m examples.compare.flower     # and opacus; both come with fedtune
    python -m examples.compare.ours       # the same questions, answered by fedtune
    python -m examples.compare.pfl        # needs pip install pfl
    python -m examples.compare.nvflare    # needs pip install nvflare

Each module has `differences()`, which runs the other project's code on generated numbers and yields
what it shows, a line each.
"""
