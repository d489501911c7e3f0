"""Backbones that the suite adds to the frameworks' own registries; importing a module here registers them."""
