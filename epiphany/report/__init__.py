"""What a run leaves behind and shows: its folder, metrics, live table and evaluation."""
