"""Adapters to training frameworks, a module each; importing one patches nothing."""
