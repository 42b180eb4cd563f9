"""``python -m lightning_lora`` is ``lightning-lora``."""

from lightning_lora.cli.main import main

if __name__ == "__main__":
    main()
