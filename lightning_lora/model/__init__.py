"""Adapters in any nn.Module: put in, take out, merge, choose, collect. Nothing here knows of Lightning."""
