"""`python -m abyssal`."""

from abyssal.cli import main

main()
