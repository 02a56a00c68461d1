"""`python -m persona_rlhf` is `persona-rlhf`."""

from persona_rlhf.cli.app import main

if __name__ == "__main__":
    main()
