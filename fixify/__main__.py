"""Run `python -m fixify`, which is also what torchrun starts."""

from fixify.cli import main

if __name__ == "__main__":
    main()
