"""Adapters to training frameworks: a module each, imported by name; importing one patches nothing."""
