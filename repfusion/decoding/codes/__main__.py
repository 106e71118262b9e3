"""`python -m repfusion.decoding.codes CONFIG.yaml [key.path=value ...]`: trains a tokenizer of images on
image shards; under torchrun on several ranks.
"""

from repfusion.decoding.codes.config import TokenizerTrainingConfig
from repfusion.decoding.codes.train import train_tokenizer
from repfusion.decoding.command import run_command


def main() -> None:
    run_command("repfusion.decoding.codes", __doc__, TokenizerTrainingConfig, train_tokenizer)


if __name__ == "__main__":
    main()
