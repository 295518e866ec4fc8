"""The settings: schema.py holds every default, the YAML groups beside it are what people edit."""
