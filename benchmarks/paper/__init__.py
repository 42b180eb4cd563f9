"""The claims of the LoRA paper, on what runs here."""
