"""The page of a run: one HTML file that opens anywhere and loads nothing."""
