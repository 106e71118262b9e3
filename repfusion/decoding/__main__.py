"""`python -m repfusion.decoding CONFIG.yaml [key.path=value ...]`: trains a decoder on image shards;
under torchrun on several ranks.
"""

from repfusion.decoding.command import run_command
from repfusion.decoding.config import DecoderTrainingConfig
from repfusion.decoding.train import train_decoder


def main() -> None:
    run_command("repfusion.decoding", __doc__, DecoderTrainingConfig, train_decoder)


if __name__ == "__main__":
    main()
