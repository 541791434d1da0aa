"""`python -m llmtrain` is `llmtrain`, in the interpreter that is named."""

from llmtrain.cli import main

if __name__ == "__main__":
    main()
