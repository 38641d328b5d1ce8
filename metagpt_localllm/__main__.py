"""``python -m metagpt_localllm``: the command line."""

from metagpt_localllm.cli import main

if __name__ == "__main__":
    main(prog_name="metagpt-localllm")
