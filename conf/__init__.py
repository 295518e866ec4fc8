"""Settings: the schema*.py files hold every default, the YAML files are presets that people edit."""
